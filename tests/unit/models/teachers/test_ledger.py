"""The engine that asks black boxes: each image once, never more than the budget, the root of an error told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import BudgetSpent, QuestionRefused, TeacherError, TryAgain
from models.teachers import ledger
from models.teachers.black_box import AnswerKind, Answers, Pixels
from models.teachers.ledger import MemoryLedger, ask, digest_of, from_bytes, smoothed, to_bytes


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_FIRST_PAUSE_S", 0.001)


def image(value: int) -> Pixels:
    """An image [2, 3, 3] that its teacher answers with `value`."""
    return np.full((2, 3, 3), value, np.uint8)


def row(value: int) -> list[float]:
    return [value / 256, 1 - value / 256]


@dataclass
class Box:
    """A teacher of two classes; `before` is called with the number of the call, and may raise."""

    before: Callable[[int], None] = lambda call: None
    batch_size: int = 4
    concurrency: int = 3
    retries: int = 2
    key: str = "box"
    classes: tuple[str, ...] = ("a", "b")
    answers: AnswerKind = AnswerKind.PROBABILITIES
    calls: list[list[int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, images: list[Pixels]) -> Answers:
        with self.lock:
            self.calls.append([int(pixels[0, 0, 0]) for pixels in images])
            call = len(self.calls)
        self.before(call)
        return np.array([row(int(pixels[0, 0, 0])) for pixels in images], np.float32)

    def close(self) -> None: ...

    @property
    def seen(self) -> list[int]:
        return [value for call in self.calls for value in call]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_answers_come_in_the_order_of_the_images(concurrency: int) -> None:
    box = Box(concurrency=concurrency, before=lambda call: time.sleep(0.002 * (call % 3)))
    answers = ask(box, [image(value) for value in range(50)], MemoryLedger())
    assert answers.dtype == np.float32
    assert answers.tolist() == [row(value) for value in range(50)]
    assert max(len(call) for call in box.calls) == 4


def test_no_image_is_no_question() -> None:
    assert ask(Box(), [], MemoryLedger(budget=0)).shape == (0, 2)


def test_an_image_is_asked_about_once_in_its_life() -> None:
    box, kept = Box(), MemoryLedger(budget=5)
    twice = [image(value) for value in (1, 2, 1, 3, 2, 1, 4, 5)]
    first = ask(box, twice, kept)
    assert sorted(box.seen) == [1, 2, 3, 4, 5]
    assert first.tolist() == [row(value) for value in (1, 2, 1, 3, 2, 1, 4, 5)]
    assert np.array_equal(ask(box, twice[::-1], kept), first[::-1])  # a second job, its budget spent
    assert len(box.seen) == 5
    assert kept.spent == 5


def test_another_teacher_does_not_profit_from_the_answers() -> None:
    kept, other = MemoryLedger(), Box(key="other")
    ask(Box(), [image(1)], kept)
    ask(other, [image(1)], kept)
    assert other.seen == [1]


def test_an_image_goes_by_its_pixels_and_shape() -> None:
    pixels = np.arange(36, dtype=np.uint8)
    tall, wide = pixels.reshape(6, 2, 3), pixels.reshape(2, 6, 3)
    assert digest_of(tall) != digest_of(wide)
    flipped = wide[:, ::-1]
    assert digest_of(flipped) == digest_of(np.ascontiguousarray(flipped)) != digest_of(wide)


def test_an_answer_is_kept_as_little_endian_float32() -> None:
    assert to_bytes(np.array([1.0, np.nan], np.float32))[:4] == b"\x00\x00\x80\x3f"
    kept = np.array([0.25, np.nan, 0.5], np.float32)
    assert np.array_equal(from_bytes(to_bytes(kept)), kept, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(
    budget=st.integers(0, 60), images=st.integers(0, 60), batch=st.integers(1, 9), concurrency=st.integers(1, 6)
)  # fmt: skip
def test_no_more_than_the_budget_is_ever_asked(
    budget: int, images: int, batch: int, concurrency: int
) -> None:
    box, kept = Box(batch_size=batch, concurrency=concurrency), MemoryLedger(budget=budget)
    try:
        answers = ask(box, [image(value) for value in range(images)], kept)
    except BudgetSpent:
        assert images > budget
    else:
        assert len(answers) == images <= budget
    assert len(box.seen) == kept.spent <= budget
    assert len(kept.answers) == kept.spent  # all that was paid is kept


def test_several_askers_share_one_budget() -> None:
    kept = MemoryLedger(budget=100)
    boxes = [Box(batch_size=1) for _ in range(4)]
    refused = []

    def work(number: int) -> None:
        try:
            ask(boxes[number], [image(50 * number + at) for at in range(50)], kept)
        except BudgetSpent as error:
            refused.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(box.seen) for box in boxes) == kept.spent == len(kept.answers) == 100
    assert len(refused) >= 2  # it is enough for two of the four
    assert all("100 of 100" in str(error) for error in refused)


def test_the_root_of_an_error_is_raised_and_not_its_echo() -> None:
    def before(call: int) -> None:
        if call == 3:
            time.sleep(0.05)
            raise TeacherError("the root")
        if call < 3:
            raise TryAgain("busy", after=100.0)  # these wait when the third fails

    box = Box(before, concurrency=3, batch_size=1)
    started = time.monotonic()
    with pytest.raises(TeacherError, match="the root"):
        ask(box, [image(value) for value in range(30)], MemoryLedger())
    assert time.monotonic() - started < 5  # they were woken
    assert len(box.calls) == 3


def test_answers_before_and_beside_an_error_are_kept() -> None:
    both_asked = threading.Barrier(2)

    def before(call: int) -> None:
        if call in (3, 4):
            both_asked.wait(5)
        if call == 3:
            raise TeacherError("no")
        if call == 4:
            time.sleep(0.05)  # on its way when the other fails

    box, kept = Box(before, concurrency=2, batch_size=2), MemoryLedger()
    with pytest.raises(TeacherError, match="no"):
        ask(box, [image(value) for value in range(40)], kept)
    assert len(box.calls) == 4
    assert kept.spent == 8
    assert len(kept.answers) == 6
    again = Box()
    ask(again, [image(value) for value in range(40)], kept)
    assert sorted([*again.seen, *box.calls[0], *box.calls[1], *box.calls[3]]) == list(range(40))


@pytest.mark.parametrize(("counted", "spent"), [(True, 6), (False, 2)])
def test_a_question_that_may_have_been_answered_stays_counted(counted: bool, spent: int) -> None:
    def before(call: int) -> None:
        if call < 3:
            raise TryAgain("later", counted=counted)

    kept = MemoryLedger()
    assert len(ask(Box(before), [image(1), image(2)], kept)) == 2
    assert kept.spent == spent


def test_tries_again_stop_at_the_budget_too() -> None:
    def before(call: int) -> None:
        raise TryAgain("a timeout")

    kept = MemoryLedger(budget=5)
    with pytest.raises(BudgetSpent):
        ask(Box(before, retries=20), [image(1), image(2)], kept)
    assert kept.spent == 4


def test_a_question_turned_away_is_given_back() -> None:
    def before(call: int) -> None:
        raise QuestionRefused("401")

    box, kept = Box(before), MemoryLedger(budget=10)
    with pytest.raises(QuestionRefused, match="401"):
        ask(box, [image(1), image(2)], kept)
    assert len(box.calls) == 1
    assert kept.spent == 0


@pytest.mark.parametrize(("retries", "told"), [(0, "busy; tried once"), (3, "busy; tried 4 times")])
def test_a_teacher_that_is_busy_for_ever_ends_in_an_error_that_can_be_retried(
    retries: int, told: str
) -> None:
    def before(call: int) -> None:
        raise TryAgain("busy", "Ask slower.", after=0.001, counted=False)

    box, kept = Box(before, retries=retries), MemoryLedger(budget=2)
    with pytest.raises(TryAgain, match=f"^{told}$") as error:
        ask(box, [image(1), image(2)], kept)
    assert error.value.retryable
    assert error.value.hint == "Ask slower."
    assert len(box.calls) == retries + 1
    assert kept.spent == 0


def test_the_pause_a_teacher_asks_for_is_kept() -> None:
    times: list[float] = []

    def before(call: int) -> None:
        times.append(time.monotonic())
        if call == 1:
            raise TryAgain("busy", after=0.3, counted=False)

    ask(Box(before), [image(1)], MemoryLedger())
    assert 0.3 <= times[1] - times[0] < 1.0


def test_a_teacher_that_asks_for_a_very_long_pause_ends_the_job_at_once() -> None:
    def before(call: int) -> None:
        raise TryAgain("busy", after=ledger.MOST_PATIENCE_S + 1, counted=False)

    box = Box(before, retries=20)
    with pytest.raises(TryAgain, match="busy; it asks to wait for 301 s") as error:
        ask(box, [image(1)], MemoryLedger())
    assert len(box.calls) == 1
    assert error.value.after == ledger.MOST_PATIENCE_S + 1


def test_pauses_grow_without_a_word_of_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_FIRST_PAUSE_S", 0.04)
    times: list[float] = []

    def before(call: int) -> None:
        times.append(time.monotonic())
        if call < 4:
            raise TryAgain("busy")

    ask(Box(before, retries=3), [image(1)], MemoryLedger())
    pauses = np.diff(times)
    for pause, longest in zip(pauses, (0.04, 0.08, 0.16), strict=True):
        assert longest / 2 <= pause < longest + 0.2


def test_progress_never_falls_and_ends_at_the_number_of_images() -> None:
    kept, seen = MemoryLedger(), list[int]()
    ask(Box(), [image(value) for value in range(10)], kept)
    ask(Box(), [image(value % 30) for value in range(45)], kept, seen.append)
    assert seen[0] == 25  # 10 images are known, 15 come twice
    assert seen == sorted(seen)
    assert seen[-1] == 45


def test_a_long_silence_of_the_teacher_does_not_look_like_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_SIGN_OF_LIFE_S", 0.05)
    seen: list[int] = []
    ask(Box(before=lambda call: time.sleep(0.3)), [image(1)], MemoryLedger(), seen.append)
    assert seen.count(0) >= 4
    assert seen[-1] == 1


def test_rows_that_do_not_fit_the_classes_are_an_error() -> None:
    box = Box(classes=("a", "b", "c"))
    with pytest.raises(TeacherError, match=r"shape \[2, 2\] to 2 images of 3 classes"):
        ask(box, [image(1), image(2)], MemoryLedger())


def test_what_top_k_leaves_is_shared_by_the_classes_not_named() -> None:
    rows = np.array([[0.5, np.nan, 0.3, np.nan], [1.0, np.nan, np.nan, np.nan]], np.float32)
    expected = [[0.5, 0.1, 0.3, 0.1], [1, 0, 0, 0]]
    assert smoothed(rows, AnswerKind.TOP_K, 0.0) == pytest.approx(np.array(expected), abs=1e-6)


def test_a_label_becomes_smoothed_probabilities() -> None:
    rows = np.array([[0, 1, 0], [1, 0, 0]], np.float32)
    expected = [[0.05, 0.9, 0.05], [0.9, 0.05, 0.05]]
    assert smoothed(rows, AnswerKind.LABEL, 0.1) == pytest.approx(np.array(expected), abs=1e-6)
