"""A real HTTP server that answers as a test prepared it, well or badly."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

#: What a downloaded student holds.
MODEL = bytes(range(256)) * 4000


@dataclass
class Answer:
    """What to send. `cut`: close the connection after so many bytes of the body, well before its end."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Script:
    """A real HTTP server that gives the prepared answers in turn, and keeps what it was asked."""

    answers: list[Answer | Callable[[Asked], Answer] | None] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        asked = Asked(self.command, self.path, dict(self.headers.items()), self.rfile.read(length))
        self.script.asked.append(asked)
        prepared = self.script.answers.pop(0)
        given = prepared(asked) if callable(prepared) else prepared
        if given is None:  # the connection is lost before an answer
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.send_response(given.status)
        for name, value in {"Content-Length": str(len(given.body)), **given.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(given.body if given.cut is None else given.body[: given.cut])
        if given.cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def log_message(self, format: str, *arguments: Any) -> None:
        return


@pytest.fixture
def script() -> Iterator[Script]:
    played = Script()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Played", (Handler,), {"script": played}))
    played.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield played
    server.shutdown()
    thread.join()
    server.server_close()


def job(status: str, **more: Any) -> Answer:
    document = {
        "object": "job", "id": "job_1", "status": status, "dataset_id": "ds_1", "teacher_id": "t", "method": "kd",
        "student": "conv4", **more,
    }  # fmt: skip
    return Answer(body=json.dumps(document).encode())


def problem(status: int, **members: Any) -> Answer:
    return Answer(status, json.dumps({"status": status, **members}).encode())


def file(content: bytes, **more: Any) -> Answer:
    digest = base64.b64encode(hashlib.sha256(MODEL).digest()).decode()
    return Answer(body=content, headers={"Repr-Digest": f"sha-256=:{digest}:"}, **more)


def stream(*events: tuple[int, str], cut: bool = False) -> Answer:
    """Server-sent events; `cut`: the connection breaks in the middle of what would be one more."""
    text = "".join(
        f"id: {number}\nevent: {kind}\ndata: {json.dumps({'id': number, 'type': kind, 'data': {}})}\n\n"
        for number, kind in events
    )
    body = f": hello\n\n{text}id: 99\nda".encode() if cut else text.encode()
    length = len(body) + (50 if cut else 0)
    return Answer(body=body, headers={"Content-Length": str(length)}, cut=len(body) if cut else None)
