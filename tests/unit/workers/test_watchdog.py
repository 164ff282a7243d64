"""The worker's row tells that it lives; a worker that takes nothing while work waits is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.jobs.tables import Worker
from app.wiring import Wiring
from tests.conftest import eventually
from tests.unit.workers.jobs import change_shards, claim_of, submit_to
from workers import watchdog
from workers.watchdog import Watchdog

IDLE_S = 0.2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_PAUSE_S", 0.05)


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The signals that the watchdog sends, which do not arrive."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(watchdog.os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(watchdog, "_MERCY_S", 3600.0)
    return sent


@pytest.fixture
def dog(wiring: Wiring, signals: list[tuple[int, int]]) -> Iterator[Watchdog]:
    dog = Watchdog(wiring.settings.model_copy(update={"idle_restart_s": IDLE_S}), ["cpu"])
    yield dog
    if dog.is_alive():
        dog.stop()


def rows(wiring: Wiring) -> list[Worker]:
    with wiring.database.reading() as session:
        return list(session.scalars(sa.select(Worker)))


def look_idle(dog: Watchdog, wiring: Wiring) -> None:
    """Look now, and again when it has been idle for too long."""
    dog.look(wiring.database)
    time.sleep(1.5 * IDLE_S)
    dog.look(wiring.database)


def test_the_row_is_there_while_the_worker_runs_and_is_refreshed(wiring: Wiring, dog: Watchdog) -> None:
    dog.start()
    eventually(lambda: bool(rows(wiring)), "the row")
    (first,) = rows(wiring)
    assert (first.id, first.queues, first.device) == (dog.worker_id, ["cpu"], wiring.settings.device)
    assert first.seen_at == pytest.approx(time.time(), abs=10)
    eventually(lambda: rows(wiring)[0].seen_at > first.seen_at, "a later look")
    assert rows(wiring)[0].started_at == first.started_at
    dog.stop()
    assert rows(wiring) == []


def test_the_row_of_a_predecessor_with_the_same_name_is_taken_over(wiring: Wiring, dog: Watchdog) -> None:
    """In a container every worker has the same process id."""
    with wiring.database.writing() as session:
        session.add(Worker(id=dog.worker_id, queues=["gpu"], device="cuda:7", seen_at=1.0))
    dog.look(wiring.database)
    (row,) = rows(wiring)
    assert (row.queues, row.device) == (["cpu"], wiring.settings.device)


def test_a_worker_that_takes_nothing_although_work_waits_is_asked_to_end(
    wiring: Wiring, dog: Watchdog, signals: list[tuple[int, int]]
) -> None:
    submit_to(wiring)
    dog.look(wiring.database)
    assert signals == []
    look_idle(dog, wiring)
    assert signals == [(os.getpid(), signal.SIGTERM)]


def test_a_worker_that_is_busy_is_left_alone(
    wiring: Wiring, dog: Watchdog, signals: list[tuple[int, int]]
) -> None:
    job_id = submit_to(wiring, shards=2)
    claim_of(wiring, job_id, f"{dog.worker_id}/77")
    look_idle(dog, wiring)
    assert signals == []


def test_what_another_worker_holds_does_not_make_this_one_busy(
    wiring: Wiring, dog: Watchdog, signals: list[tuple[int, int]]
) -> None:
    job_id = submit_to(wiring, shards=2)
    claim_of(wiring, job_id, f"{dog.worker_id}1/77")
    look_idle(dog, wiring)
    assert signals == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize(
    "changed", [{"queue": "gpu"}, {"ready_at": time.time() + 3600}, {"status": "waiting"}]
)
def test_a_worker_for_which_nothing_waits_is_left_alone(
    changed: dict[str, str | float], wiring: Wiring, dog: Watchdog, signals: list[tuple[int, int]]
) -> None:
    """Work for others, work that pauses after a failure, and work that waits for other work."""
    submit_to(wiring)
    change_shards(wiring, **changed)
    look_idle(dog, wiring)
    assert signals == []


def test_time_in_which_nothing_waited_does_not_count(
    wiring: Wiring, dog: Watchdog, signals: list[tuple[int, int]]
) -> None:
    look_idle(dog, wiring)
    submit_to(wiring)
    dog.look(wiring.database)
    assert signals == []


def test_a_database_that_is_away_ends_neither_the_watch_nor_the_worker(
    wiring: Wiring, dog: Watchdog, signals: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[float] = []
    look = dog.look

    def away(database: object) -> None:
        looked.append(time.monotonic())
        if len(looked) < 4:
            raise sa.exc.OperationalError("SELECT 1", {}, Exception("the server is away"))
        look(wiring.database)

    monkeypatch.setattr(dog, "look", away)
    dog.start()
    eventually(lambda: bool(rows(wiring)), "the row")
    assert (dog.is_alive(), signals) == (True, [])


STUCK = """
import signal, sys, time
from app.settings import Settings
from workers import watchdog
watchdog._PAUSE_S = 0.05
watchdog._MERCY_S = float(sys.argv[1])
signal.signal(signal.SIGTERM, (lambda *_: sys.exit(0)) if sys.argv[2] == "ends" else signal.SIG_IGN)
dog = watchdog.Watchdog(Settings(idle_restart_s=0.2), ["cpu"])
dog.start()
try:
    while True:  # signal.pause() would sleep on where the signal came just before it
        time.sleep(0.05)
finally:
    dog.stop()
"""


@pytest.mark.parametrize(("mercy", "how", "status"), [("60", "ends", 0), ("0.5", "ignores it", 70)])
def test_the_process_ends_by_itself_at_once_or_is_ended_after_a_while(
    mercy: str, how: str, status: int, wiring: Wiring
) -> None:
    submit_to(wiring)
    settings = wiring.settings
    environment = {"DRAM_HOME": str(settings.home), "DRAM_DATABASE_URL": settings.database,
                   "DRAM_REDIS_URL": settings.redis}  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", STUCK, mercy, how],
        cwd=Path(__file__).parents[3],
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )
    assert ended.returncode == status
