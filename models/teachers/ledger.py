"""Asking a black box: each image once in its life, never more than the job may ask, many at a time.

Every answer is kept under (teacher, digest of the image) before it is used; a question is counted before it is
sent. So a job that is killed and goes on, or a second job on the same images, asks only what was never answered,
and what may have been paid is never counted too low.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from models.errors import BudgetSpent, QuestionRefused, TeacherError, TryAgain
from models.pipeline import Ledger
from models.teachers.black_box import Answers, BlackBox, Pixels

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
#: A teacher that asks for a longer pause than this ends the job, which can be retried.
MOST_PATIENCE_S = 300.0
#: While nothing is answered, progress is repeated so often: a patient stage must not look like a dead one.
_SIGN_OF_LIFE_S = 60.0


def digest_of(image: Pixels) -> str:
    """Names an image [H, W, 3] by its pixels."""
    content = np.ascontiguousarray(image)
    return hashlib.sha256(str(content.shape).encode() + content.tobytes()).hexdigest()


def to_bytes(row: Answers) -> bytes:
    """An answer [C] as it is kept: little-endian float32."""
    return row.astype("<f4").tobytes()


def from_bytes(content: bytes) -> Answers:
    row: Answers = np.frombuffer(content, dtype="<f4").astype(np.float32)
    return row


@dataclass
class MemoryLedger:
    """A ledger without a database, for notebooks and benchmarks."""

    budget: int | None = None
    spent: int = 0
    answers: dict[tuple[str, str], bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def known(self, teacher: str, images: Sequence[str]) -> dict[str, bytes]:
        with self._lock:
            return {
                image: self.answers[teacher, image] for image in images if (teacher, image) in self.answers
            }

    def reserve(self, count: int) -> None:
        with self._lock:
            if self.budget is not None and self.spent + count > self.budget:
                raise BudgetSpent(
                    f"{self.spent} of {self.budget} questions are spent; {count} more are needed",
                    "Raise query_budget, or ask for fewer synthetic images.",
                )
            self.spent += count

    def release(self, count: int) -> None:
        with self._lock:
            self.spent -= count

    def record(self, teacher: str, answers: Mapping[str, bytes]) -> None:
        with self._lock:
            self.answers.update({(teacher, image): answer for image, answer in answers.items()})


def ask(
    box: BlackBox,
    images: Sequence[Pixels],
    ledger: Ledger,
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """The answers [N, C] to images [H, W, 3] of any sizes, from the ledger where it has them, else from `box`.

    `progress` hears from this thread how many images are answered; it hears the same number again while the teacher
    lets wait. Raises `BudgetSpent`, or `TeacherError` where the teacher does not answer as it must: the first such
    error, after the requests that were on their way have ended. What was answered until then is kept.
    """
    names = [digest_of(image) for image in images]
    found = {name: from_bytes(answer) for name, answer in ledger.known(box.key, sorted(set(names))).items()}
    unknown = {name: image for name, image in zip(names, images, strict=True) if name not in found}
    done = len(images) - len(unknown)
    progress(done)
    missing = list(unknown)
    rest = (missing[at : at + box.batch_size] for at in range(0, len(missing), box.batch_size))
    stopping = threading.Event()

    def settle(batch: list[str]) -> Answers:
        rows = _patiently(box, [unknown[name] for name in batch], ledger, stopping)
        ledger.record(box.key, {name: to_bytes(row) for name, row in zip(batch, rows, strict=True)})
        return rows

    with ThreadPoolExecutor(box.concurrency, "ask") as threads:
        asked: dict[Future[Answers], list[str]] = {}
        try:
            while True:
                for batch in itertools.islice(rest, box.concurrency - len(asked)):
                    asked[threads.submit(settle, batch)] = batch
                if not asked:
                    break
                ended, _ = wait(asked, timeout=_SIGN_OF_LIFE_S, return_when=FIRST_COMPLETED)
                for future in ended:
                    batch = asked.pop(future)
                    found.update(zip(batch, future.result(), strict=True))
                    done += len(batch)
                progress(done)
        finally:
            stopping.set()  # after an error: wakes who waits to try again
    return np.stack([found[name] for name in names]) if names else np.empty((0, len(box.classes)), np.float32)


def _patiently(box: BlackBox, images: list[Pixels], ledger: Ledger, stopping: threading.Event) -> Answers:
    """The answers to one request, tried again after a pause where that may help.

    What the teacher may have worked on stays counted, answered or not.
    """
    for attempt in range(1, box.retries + 2):
        ledger.reserve(len(images))
        try:
            return _checked(box.answer(images), len(images), box)
        except QuestionRefused:
            ledger.release(len(images))
            raise
        except TryAgain as error:
            if not error.counted:
                ledger.release(len(images))
            after = error.after or 0.0
            if after > MOST_PATIENCE_S:
                raise TryAgain(
                    f"{error.detail}; it asks to wait for {after:.0f} s", "Retry the job then.", after=after
                ) from None
            if attempt > box.retries:
                tries = "once" if attempt == 1 else f"{attempt} times"
                raise TryAgain(f"{error.detail}; tried {tries}", error.hint, after=error.after) from None
        pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempt - 1))
        if stopping.wait(max(after, pause * random.uniform(0.5, 1.0))):
            break
    raise TeacherError("another question to the teacher failed")  # `ask` raises that one's error


def _checked(rows: Answers, images: int, box: BlackBox) -> Answers:
    """The rows, or `TeacherError` in words a user can act on."""
    if rows.shape != (images, len(box.classes)):
        raise TeacherError(
            f"the teacher answered an array of shape {list(rows.shape)} to {images} images of"
            f" {len(box.classes)} classes",
            "Its class list must have one name for each of its outputs.",
        )
    return rows


def smoothed(rows: Answers, kind: str, label_smoothing: float) -> Answers:
    """Answers [N, C] as probabilities that are above 0 where nothing was said.

    top_k: what is left of 1 goes to the classes not named, evenly. label: `label_smoothing` goes to the others.
    """
    if kind == "top_k":
        unsaid = np.isnan(rows)
        rest = np.clip(1.0 - np.nansum(rows, axis=1, keepdims=True), 0.0, 1.0)
        share = rest / np.maximum(1, unsaid.sum(axis=1, keepdims=True))
        filled = np.where(unsaid, share, rows)
        whole: Answers = (filled / filled.sum(axis=1, keepdims=True)).astype(np.float32)
        return whole
    if kind == "label":
        others = label_smoothing / max(1, rows.shape[1] - 1)
        return np.where(rows > 0.5, 1.0 - label_smoothing, others).astype(np.float32)
    return rows
