"""A black box behind HTTP: puts a batch of images to a user's endpoint and says what went wrong. No torch."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from models.errors import QuestionRefused, TeacherError, TryAgain, Unreachable
from models.pipeline import Response, Transport
from models.teachers.black_box import Answers, HttpTeacher, Pixels
from models.teachers.formats import read_answers
from models.teachers.http_protocols import ADAPTERS

#: What is taken of an answer: beside its rows, and at all.
_SPARE_BYTES = 16 * 2**20  # other outputs that come along
_MOST_BYTES = 64 * 2**20
_BYTES_OF_A_VALUE = 64
_LONGEST_QUOTE = 200
#: A piece of a secret header that is shorter tells nothing, and stands in any text.
_SHORTEST_SECRET = 4
#: So many letters of a secret's beginning must not be shown either, where a text breaks off within it.
_TELLING_LETTERS = 8
_MASK = "***"


class HttpEndpoint:
    """A `models.teachers.black_box.BlackBox`. No message of it holds a header's value."""

    def __init__(self, spec: HttpTeacher, transport: Transport, headers: Mapping[str, str]) -> None:
        """`headers` are the user's secrets; the protocol's own headers go before them."""
        self.spec = spec
        self.key = spec.answers_key
        self.classes = spec.classes
        self.answers = spec.answers
        self.concurrency = spec.concurrency
        self.retries = spec.retries
        self._adapter = ADAPTERS[spec.protocol]
        self.batch_size = min(spec.batch_size, self._adapter.most_images)
        if spec.answers not in self._adapter.answers:
            raise TeacherError(
                f"answers '{spec.answers}' cannot be read by the protocol '{spec.protocol}'",
                "The protocols 'dram' and 'torchserve' carry answers of every kind.",
            )
        self._transport = transport
        self._headers = dict(headers)
        self._secrets = _secrets(headers)
        self._telling = re.compile("|".join(map(re.escape, self._secrets)), re.IGNORECASE)
        row = sum(len(json.dumps(name)) + _BYTES_OF_A_VALUE for name in spec.classes)
        self._most_bytes = min(_MOST_BYTES, _SPARE_BYTES + (self.batch_size + 1) * row)

    def answer(self, images: list[Pixels]) -> Answers:
        body, own = self._adapter.request(images, self.spec)
        taken = {name.lower() for name in own}
        headers = {**own, **{name: text for name, text in self._headers.items() if name.lower() not in taken}}
        try:
            response = self._transport.post(
                self.spec.source,
                body,
                headers,
                timeout_s=self.spec.timeout_s,
                max_bytes=self._most_bytes,
            )
        except Unreachable as error:
            if error.retryable:
                raise TryAgain(error.detail, error.hint, counted=error.sent) from None
            kind = TeacherError if error.sent else QuestionRefused
            raise kind(error.detail, error.hint) from None
        if not 200 <= response.status < 300:
            raise self._refusal(response)
        try:
            raw = self._adapter.parse(response, self.spec, len(images))
            return read_answers(raw, self.spec.answers, len(self.classes), len(images))
        except TeacherError as error:
            raise TeacherError(self._masked(error.detail), error.hint) from None

    def close(self) -> None:
        """Nothing: the transport is the caller's."""

    def _refusal(self, response: Response) -> TeacherError:
        """What a status other than 2xx means."""
        status = response.status
        if status in (401, 403):
            return QuestionRefused(
                f"the endpoint refuses the credentials (HTTP {status})", "Correct the teacher's headers."
            )
        if status in (408, 425, 429, 503):
            return TryAgain(
                f"the endpoint has no time now (HTTP {status})",
                "Lower concurrency, or ask its operator for a higher rate.",
                after=seconds_to_wait(response.headers.get("retry-after", ""), time.time()),
                counted=False,
            )
        if status >= 500:
            return TryAgain(f"the endpoint failed (HTTP {status})", "Look at its log.")
        if status == 413:
            return QuestionRefused(
                f"the endpoint finds {self.batch_size} images in a request too many (HTTP 413)",
                "Lower the teacher's batch_size.",
            )
        if 300 <= status < 400:
            place = self._quoted(response.headers.get("location", "nowhere"))
            return QuestionRefused(
                f"the endpoint redirects to {place} (HTTP {status}); redirects are not followed",
                "Register the teacher with the URL that answers itself.",
            )
        said = self._quoted(response.body.decode("utf-8", "replace"))
        return QuestionRefused(
            f"the endpoint rejects the request (HTTP {status}): {said or 'it says nothing more'}",
            "Check the teacher's URL, protocol, input_name and input format.",
        )

    def _quoted(self, text: str) -> str:
        """The beginning of a foreign text, on one line, without the secrets."""
        masked = self._masked(text)
        printable = "".join(letter if letter.isprintable() else " " for letter in masked)
        return " ".join(printable.split())[:_LONGEST_QUOTE]

    def _masked(self, text: str) -> str:
        """Without the secrets, and without the beginning of one where a quotation breaks off within it."""
        if not self._secrets:
            return text
        return re.sub(r"[^']+(?=')", self._without_beginning, self._telling.sub(_MASK, text))

    def _without_beginning(self, quotation: re.Match[str]) -> str:
        quoted = quotation[0]
        for start in range(len(quoted) - _TELLING_LETTERS + 1):
            end = quoted[start:].lower()
            if any(secret.lower().startswith(end) for secret in self._secrets):
                return quoted[:start] + _MASK
        return quoted


def seconds_to_wait(retry_after: str, now: float) -> float | None:
    """What a Retry-After header asks for: seconds, or a date (RFC 9110, section 10.2.3). None: nothing readable."""
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", retry_after):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _secrets(headers: Mapping[str, str]) -> list[str]:
    """What must not be shown, in any case, longest first: each header's value and its parts (`Bearer X`: X, too)."""
    found = set()
    for value in headers.values():
        found |= {value, json.dumps(value)[1:-1], *re.split(r"[\s,;=:\"]+", value)}
    return sorted((text for text in found if len(text) >= _SHORTEST_SECRET), key=len, reverse=True)
