"""Child side: the ledger of a stage that asks its teacher, kept by the parent (`workers.answering`).

One call at a time goes up the pipe as a message, and one line comes back. Answers travel as base64, at most some
hundred in a message, so that neither side waits long for the other.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

from models.errors import BudgetSpent

_ROWS = 200  # answers in one message


class PipeLedger:
    """A `models.pipeline.Ledger`. Safe to call from several threads."""

    def __init__(self, say: Callable[..., None], replies: BinaryIO) -> None:
        self._say, self._replies = say, replies
        self._lock = threading.Lock()

    def known(self, teacher: str, images: Sequence[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for start in range(0, len(images), _ROWS):
            part = list(images[start : start + _ROWS])
            found |= decoded(self._asked("known", teacher=teacher, images=part))
        return found

    def reserve(self, count: int) -> None:
        self._asked("reserve", count=count)

    def release(self, count: int) -> None:
        self._asked("release", count=count)

    def record(self, teacher: str, answers: Mapping[str, bytes]) -> None:
        images = list(answers)
        for start in range(0, len(images), _ROWS):
            part = {image: answers[image] for image in images[start : start + _ROWS]}
            self._asked("record", teacher=teacher, answers=encoded(part))

    def _asked(self, call: str, **arguments: Any) -> Any:
        with self._lock:
            self._say("ask", call=call, arguments=arguments)
            line = self._replies.readline()
        if not line:
            raise ConnectionError("the worker that counts the questions has ended")
        reply = json.loads(line)
        if "refused" in reply:
            raise BudgetSpent(**reply["refused"])
        return reply["result"]


def encoded(answers: Mapping[str, bytes]) -> dict[str, str]:
    """Answers by image, as they travel."""
    return {image: base64.b64encode(answer).decode() for image, answer in answers.items()}


def decoded(answers: Mapping[str, str]) -> dict[str, bytes]:
    """The reverse of `encoded`."""
    return {image: base64.b64decode(answer) for image, answer in answers.items()}
