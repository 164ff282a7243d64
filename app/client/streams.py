"""Answers that arrive in pieces: files that resume where they broke off, and events that do too.

The classes hold the state; `Dram` and `AsyncDram` feed them what arrives.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import httpx

from app.client.answers import JobEvent
from app.client.errors import DamagedDownloadError


class Download:
    """A file on its way to `target`, kept beside it as `NAME.partial` until its digest is checked."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = target.with_name(target.name + ".partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._digest = hashlib.sha256()
        self._size = 0
        self._resumed = False
        if self.partial.exists():
            with self.partial.open("rb") as kept:
                while chunk := kept.read(1 << 20):
                    self._digest.update(chunk)
                    self._size += len(chunk)
            self._resumed = self._size > 0

    def headers(self) -> dict[str, str]:
        """Ask for the rest only, and for bytes as they are: the digest is of those."""
        wanted = {"Accept": "*/*", "Accept-Encoding": "identity"}
        return {**wanted, "Range": f"bytes={self._size}-"} if self._size else wanted

    def begin(self, response: httpx.Response) -> None:
        """A whole file (200) replaces what was kept, a part (206) goes on from it."""
        if response.status_code != httpx.codes.PARTIAL_CONTENT:
            self.restart()
        self.partial.touch()

    def restart(self) -> None:
        self.partial.unlink(missing_ok=True)
        self._digest = hashlib.sha256()
        self._size = 0
        self._resumed = False

    def write(self, chunk: bytes) -> None:
        with self.partial.open("ab") as kept:
            kept.write(chunk)
        self._digest.update(chunk)
        self._size += len(chunk)

    def finish(self, headers: httpx.Headers) -> bool:
        """Check and rename. False: what was kept from an earlier try was of another file, so start again."""
        stated, arrived = stated_digest(headers), self._digest.hexdigest()
        if stated != arrived:
            resumed = self._resumed
            self.restart()
            if resumed:
                return False
            raise DamagedDownloadError(
                f"'{self.target.name}' arrived with sha-256 {arrived}, the service stated {stated}; "
                "nothing was kept"
            )
        self.partial.replace(self.target)
        return True


def stated_digest(headers: httpx.Headers) -> str | None:
    """The sha-256 of the whole file in hex: from Repr-Digest (RFC 9530), else from an ETag that is one."""
    named = re.search(r"sha-256=:([A-Za-z0-9+/=]+):", headers.get("Repr-Digest", ""))
    if named:
        return base64.b64decode(named[1]).hex()
    tag = headers.get("ETag", "").removeprefix("W/").strip('"')
    return tag if re.fullmatch(r"[0-9a-f]{64}", tag) else None


class EventFeed:
    """Server-Sent Events of one job, read line by line; remembers where to go on after a lost connection."""

    def __init__(self, after: int = 0) -> None:
        self.last = after
        self.finished = False  # the newest event is a final one
        self._fields: dict[str, str] = {}

    def headers(self) -> dict[str, str]:
        self._fields = {}
        return {"Accept": "text/event-stream", "Last-Event-ID": str(self.last)}

    def line(self, line: str) -> JobEvent | None:
        """Take one line; an empty one ends an event. Comments, and events seen before, give None."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data" and "data" in self._fields:
                value = f"{self._fields['data']}\n{value}"
            if name:
                self._fields[name] = value
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields or not fields.get("id", "").isdigit():
            return None
        number = int(fields["id"])
        if number <= self.last:
            return None
        payload = json.loads(fields["data"])
        whole = payload if "type" in payload else {"data": payload, "type": fields.get("event", "message")}
        event = JobEvent.model_validate({**whole, "id": number})
        self.last = number
        self.finished = event.final
        return event
