"""What can go wrong between a client and the service."""

from __future__ import annotations

from typing import Any

import httpx


class ClientError(Exception):
    """Base of every error that this client raises."""


class UnreachableError(ClientError):
    """No answer: the service is down, the address is wrong, or the connection broke."""


class JobTimeoutError(ClientError):
    """The job had not finished when the caller's patience ended. The job goes on."""


class DamagedDownloadError(ClientError):
    """What arrived does not have the digest that the service stated."""


class DramApiError(ClientError):
    """The service refused. `detail` says what, where and how to mend it; `errors` lists every finding."""

    def __init__(
        self, status: int, code: str, detail: str, errors: list[dict[str, Any]], request_id: str | None
    ) -> None:
        super().__init__(f"{detail} [{code}]")
        self.status = status
        self.code = code
        self.detail = detail
        self.errors = errors
        self.request_id = request_id

    @classmethod
    def of(cls, response: httpx.Response) -> DramApiError:
        """The error in an answer whose body has been read."""
        try:
            document = response.json()
        except ValueError:
            document = None
        if not isinstance(document, dict):  # a proxy in between, not the service
            document = {"detail": f"the service answered {response.status_code} {response.reason_phrase}"}
        return cls(
            status=response.status_code,
            code=str(document.get("code", f"http_{response.status_code}")),
            detail=str(document.get("detail") or document.get("title") or response.reason_phrase),
            errors=list(document.get("errors") or _failed(document.get("checks"))),
            request_id=document.get("request_id") or response.headers.get("X-Request-ID"),
        )


def _failed(checks: Any) -> list[dict[str, Any]]:
    """What a service that is not ready says of its parts, as findings."""
    if not isinstance(checks, dict):
        return []
    missing = {name: check for name, check in checks.items() if not check.get("ok")}
    return [{"code": name, "detail": f"{name}: {check.get('reason', '')}"} for name, check in missing.items()]
