"""The errors that the API answers with. No web framework: `problem.py` renders them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Findings that one answer lists; more would only repeat themselves.
MOST_FINDINGS = 100


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a stable code, a JSON pointer to where, and what to do about it."""

    code: str
    pointer: str
    detail: str


def findings_of(
    errors: Sequence[Mapping[str, Any]], *, below: str = "", in_request: bool = False
) -> tuple[Finding, ...]:
    """Findings from `pydantic.ValidationError.errors()`; the inputs themselves are never repeated.

    `below`: the pointer of the validated value, such as "/params". `in_request`: locations start with the part
    of the request ("body", "query", …), as FastAPI's do.
    """
    findings = []
    for error in errors[:MOST_FINDINGS]:
        location = list(error["loc"])
        if in_request and location[:1] == ["body"]:
            del location[0]
        pointer = below + "".join(f"/{_escaped(part)}" for part in location)
        findings.append(Finding(str(error["type"]), pointer, _words(error)))
    return tuple(findings)


def _escaped(part: int | str) -> str:
    return str(part)[:100].replace("~", "~0").replace("/", "~1")


def _words(error: Mapping[str, Any]) -> str:
    if error["type"] == "union_tag_invalid":  # pydantic's own sentence repeats the input
        return f"Input should be one of {error['ctx']['expected_tags']}"
    return str(error["msg"]).removeprefix("Value error, ")


class DramError(Exception):
    """Base. `detail` says what, where and how to mend it; `findings` lists every single thing wrong."""

    status = 500
    code = "internal_error"
    title = "Internal error"

    def __init__(
        self,
        detail: str,
        *,
        code: str = "",
        findings: tuple[Finding, ...] = (),
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or self.code
        self.findings = findings
        self.headers = headers or {}

    def document(self, **more: Any) -> dict[str, Any]:
        """RFC 9457 members."""
        return {
            "type": f"urn:dram:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "errors": [vars(finding) for finding in self.findings],
            **more,
        }


class BadRequest(DramError):
    status, code, title = 400, "bad_request", "Malformed request"


class Unauthenticated(DramError):
    status, code, title = 401, "unauthenticated", "No valid API key"


class Forbidden(DramError):
    status, code, title = 403, "forbidden", "Not allowed with this key"


class NotFound(DramError):
    status, code, title = 404, "not_found", "Not found"


class RequestTimeout(DramError):
    status, code, title = 408, "request_timeout", "The request took too long to arrive"


class Conflict(DramError):
    status, code, title = 409, "conflict", "Not possible in the present state"


class Gone(DramError):
    status, code, title = 410, "gone", "No longer here"


class TooLarge(DramError):
    status, code, title = 413, "too_large", "Request too large"


class UnsupportedMedia(DramError):
    status, code, title = 415, "unsupported_media_type", "Unsupported media type"


class RangeNotSatisfiable(DramError):
    status, code, title = 416, "range_not_satisfiable", "No such part of the file"


class Invalid(DramError):
    status, code, title = 422, "invalid", "Invalid input"


class TooMany(DramError):
    status, code, title = 429, "too_many_requests", "Too many requests"


class Unavailable(DramError):
    status, code, title = 503, "unavailable", "Not available at present"


class InsufficientStorage(DramError):
    status, code, title = 507, "insufficient_storage", "No room to store this"
