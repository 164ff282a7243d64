"""What a pool process does with a claim: watch the computation, record what it says, clean up after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from app.jobs.claims import Claim
from app.wiring import Wiring
from tests.unit.workers.jobs import claim_of, shard_of, submit_to
from workers import tasks
from workers.runner import ComputeProcess, Failed, Kept, Message


def test_a_computation_that_nobody_watches_any_more_is_killed(
    wiring: Wiring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what it says would be taken for an answer to the next claim."""

    def breaks(*_: object) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr(tasks, "_computed", breaks)
    compute = ComputeProcess(wiring.settings)
    claim = claim_of(wiring, submit_to(wiring))
    compute.start(claim)
    assert compute._process is not None
    child = compute._process
    with pytest.raises(KeyError):
        tasks.work(wiring, compute, claim)
    assert child.returncode is not None


class Saying(ComputeProcess):
    """A compute process that says what it is told to."""

    def __init__(self, wiring: Wiring, messages: Iterator[Message]) -> None:
        super().__init__(wiring.settings)
        self._messages = messages

    def start(self, claim: Claim, headers: Mapping[str, str] | None = None) -> None:
        pass

    def message(self, timeout: float) -> Message | None:
        return next(self._messages)


def test_a_long_stage_leaves_two_checkpoints_in_the_store_however_many_it_saves(wiring: Wiring) -> None:
    def saved() -> Iterator[Message]:
        for step in range(10):
            path = wiring.settings.home / "state"
            path.write_text(f"at {step}")
            yield Kept(step, {"state": wiring.blobs.put(path)})
        yield Failed("training_failed", "No more.", "", retryable=False)

    job_id = submit_to(wiring)
    tasks.work(wiring, Saying(wiring, saved()), claim_of(wiring, job_id))
    newest = shard_of(wiring, job_id).checkpoint
    assert newest is not None
    kept = {digest for files in (newest["files"], newest["previous"]["files"]) for digest in files.values()}
    assert newest["step"] == 9
    assert set(wiring.blobs.older_than(-1)) == kept
