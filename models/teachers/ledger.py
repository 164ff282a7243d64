"""Asking a black box: each image once in its life, never more than the job may ask, many at a time.

Every answer is kept under (teacher, digest of the image) before it is used; a question is counted before it is
sent. So a job that is killed and goes on, or a second job on the same images, asks only what was never answered,
and what may have been paid is never counted too low.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from models.errors import BudgetSpent, TeacherError, TryAgain
from models.pipeline import Ledger
from models.teachers.black_box import Answers, BlackBox, Pixels

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
#: A teacher that asks for a longer pause than this ends the job, which can be retried.
MOST_PATIENCE_S = 300.0


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
        return {image: self.answers[teacher, image] for image in images if (teacher, image) in self.answers}

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
        self.answers.update({(teacher, image): answer for image, answer in answers.items()})


def ask(
    box: BlackBox,
    images: Sequence[Pixels],
    ledger: Ledger,
    progress: Callable[[int], None] = lambda done: None,
) -> Answers:
    """The answers [N, C] to images [H, W, 3] of any sizes, from the ledger where it has them, else from `box`.

    Raises `BudgetSpent`, or `TeacherError` where the teacher does not answer as it must. What was answered until
    then is kept.
    """
    names = [digest_of(image) for image in images]
    found = {name: from_bytes(answer) for name, answer in ledger.known(box.key, sorted(set(names))).items()}
    unknown = {name: image for name, image in zip(names, images, strict=True) if name not in found}
    done = len(images) - len(unknown)
    progress(done)
    batches = [list(unknown)[at : at + box.batch_size] for at in range(0, len(unknown), box.batch_size)]
    stopping = threading.Event()

    def settle(batch: list[str]) -> Answers:
        rows = _patiently(box, [unknown[name] for name in batch], ledger, stopping)
        ledger.record(box.key, {name: to_bytes(row) for name, row in zip(batch, rows, strict=True)})
        return rows

    with ThreadPoolExecutor(box.concurrency, "ask") as threads:
        # Not all at once: an error must not leave hundreds of questions queued.
        for start in range(0, len(batches), 4 * box.concurrency):
            group = batches[start : start + 4 * box.concurrency]
            futures = {threads.submit(settle, batch): batch for batch in group}
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in ended):
                stopping.set()
            for future, batch in futures.items():
                found.update(zip(batch, future.result(), strict=True))
                done += len(batch)
                progress(done)
    return np.stack([found[name] for name in names]) if names else np.empty((0, len(box.classes)), np.float32)


def _patiently(box: BlackBox, images: list[Pixels], ledger: Ledger, stopping: threading.Event) -> Answers:
    """One request, tried again after a pause where that may help."""
    for attempt in range(box.retries + 1):
        if stopping.is_set():
            raise TeacherError("another question to the teacher failed")
        ledger.reserve(len(images))
        try:
            return _checked(box.answer(images), len(images), box)
        except TryAgain as error:
            if not error.counted:
                ledger.release(len(images))
            if attempt == box.retries or (error.after or 0) > MOST_PATIENCE_S:
                raise
            pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)
            pause = max(error.after or 0.0, pause * random.uniform(0.5, 1.0))
            stopping.wait(pause)
    raise AssertionError("unreachable")


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
