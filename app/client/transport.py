"""What both clients share below the operations: addresses, headers, and when a request is tried again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from app.client.calls import Call
from app.client.errors import DramApiError, UnreachableError

#: Answers of a service that is starting, overloaded or being restarted.
_PASSING = frozenset({429, 502, 503, 504})
_LONGEST_PAUSE_S = 10.0

#: What became of one request.
Outcome = httpx.Response | httpx.TransportError


@dataclass(frozen=True)
class Connection:
    url: str
    key: str | None
    timeout_s: float
    retries: int

    def options(self) -> dict[str, Any]:
        """What an httpx client is made with."""
        headers = {"User-Agent": "dram-client", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return {"base_url": self.url, "headers": headers, "timeout": self.timeout_s}

    def request(self, call: Call) -> dict[str, Any]:
        """What httpx sends for a call."""
        options: dict[str, Any] = {
            "method": call.method,
            "url": call.path,
            "params": call.query,
            "headers": call.headers,
            "json": call.json,
            "content": call.content,
            "data": call.form,
            "files": call.files,
        }
        if call.answer_s is not None:
            options["timeout"] = httpx.Timeout(self.timeout_s, read=call.answer_s)
        return {name: value for name, value in options.items() if value is not None}

    def pause_before_retry(self, call: Call, tries: int, outcome: Outcome) -> float | None:
        """Seconds to wait before the request is sent again; None: do not, the outcome stands."""
        if not call.repeatable or tries > self.retries:
            return None
        pause = min(_LONGEST_PAUSE_S, 0.25 * 2.0 ** (tries - 1))
        if isinstance(outcome, httpx.Response):
            if outcome.status_code not in _PASSING:
                return None
            asked = outcome.headers.get("Retry-After", "")
            return min(_LONGEST_PAUSE_S, float(asked)) if asked.isdigit() else pause
        return pause

    def unreachable(self, error: httpx.TransportError) -> UnreachableError:
        reason = str(error) or type(error).__name__
        return UnreachableError(
            f"no answer from {self.url}: {reason}. Is the service up? `dram up` starts one."
        )


def checked(response: httpx.Response) -> httpx.Response:
    """The answer itself if it is a good one. Raises DramApiError."""
    if response.is_success:
        return response
    raise DramApiError.of(response)
