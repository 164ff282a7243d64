"""What a pool process does with a claim when something unforeseen happens to it."""

from __future__ import annotations

import pytest

from app.wiring import Wiring
from tests.unit.workers.jobs import claim_of, submit_to
from workers import tasks
from workers.runner import ComputeProcess


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
