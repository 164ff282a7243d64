"""One round of the maintenance loop after another, with a doorbell that notes what it rings; and the loop itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from app import ids
from app.jobs import claims
from app.jobs.tables import Job, Shard
from app.settings import Settings
from app.wiring import Wiring
from tests.conftest import Postgres, eventually
from tests.unit.workers.jobs import change_shards, claim_of, shard_of, status_of, submit_to
from workers import maintenance

LONG_AGO = 1.0


@dataclass
class Bell:
    """A doorbell that notes what it rings. `works`: whether Redis takes it."""

    rung: list[tuple[str, str]] = field(default_factory=list)
    works: bool = True

    def ring(self, shard_id: str, queue: str) -> bool:
        self.rung.append((shard_id, queue))
        return self.works

    def close(self) -> None: ...


@pytest.fixture
def bell() -> Bell:
    return Bell()


@pytest.fixture
def listening(wiring: Wiring, bell: Bell) -> Wiring:
    """The wiring, with the bell for a doorbell."""
    return replace(wiring, doorbell=bell)  # type: ignore[arg-type]


def test_an_expired_lease_is_taken_back_and_rung_for_once(listening: Wiring, bell: Bell) -> None:
    job_id = submit_to(listening)
    claim = claim_of(listening, job_id)
    maintenance.run_round(listening)
    assert bell.rung == []
    change_shards(listening, lease_until=LONG_AGO)
    maintenance.run_round(listening)
    maintenance.run_round(listening)
    assert bell.rung == [(claim.shard_id, "cpu")]
    shard = shard_of(listening, job_id)
    assert (shard.status, shard.worker) == ("ready", None)


def test_work_that_nobody_takes_is_rung_for_again_with_growing_pauses(listening: Wiring, bell: Bell) -> None:
    job_id = submit_to(listening)
    pause = listening.settings.ring_again_s
    maintenance.run_round(listening)
    assert bell.rung == []  # rung for when it became ready
    for ring, factor in enumerate((1, 2, 4, 8, 16, 32, 32, 32)):
        for silent, rung in ((0.9 * factor * pause, ring), (1.1 * factor * pause, ring + 1)):
            change_shards(listening, rung_at=time.time() - silent)
            maintenance.run_round(listening)
            assert len(bell.rung) == rung, f"after {silent:g} s of silence and {ring} rings"
        assert shard_of(listening, job_id).rings == ring + 1
    assert shard_of(listening, job_id).rung_at == pytest.approx(time.time(), abs=10)


def test_a_shard_that_a_stopping_worker_gave_back_is_rung_for_in_the_next_round(
    listening: Wiring, bell: Bell
) -> None:
    claim = claim_of(listening, submit_to(listening))
    with listening.database.writing() as session:
        claims.release(session, claim)
    maintenance.run_round(listening)
    maintenance.run_round(listening)
    assert bell.rung == [(claim.shard_id, "cpu")]


def test_a_shard_whose_pause_after_a_failure_is_not_over_is_not_rung_for(
    listening: Wiring, bell: Bell
) -> None:
    submit_to(listening)
    change_shards(listening, ready_at=time.time() + 60, rung_at=None)
    maintenance.run_round(listening)
    assert bell.rung == []
    change_shards(listening, ready_at=time.time() - 1)
    maintenance.run_round(listening)
    assert len(bell.rung) == 1


def test_a_ring_that_failed_is_made_up_for(listening: Wiring, bell: Bell) -> None:
    bell.works = False
    claim = claim_of(listening, submit_to(listening))
    change_shards(listening, lease_until=LONG_AGO)
    maintenance.run_round(listening)
    bell.works = True
    change_shards(listening, rung_at=time.time() - 1.1 * listening.settings.ring_again_s)
    maintenance.run_round(listening)
    assert bell.rung == [(claim.shard_id, "cpu")] * 2


@pytest.mark.parametrize(("claimed", "status"), [(False, "cancelled"), (True, "cancelling")])
def test_a_job_past_its_deadline_is_cancelled(
    claimed: bool, status: str, listening: Wiring, bell: Bell
) -> None:
    job_id = submit_to(listening, deadline_at=time.time() - 1)
    if claimed:
        claim_of(listening, job_id)
    in_time = submit_to(listening, deadline_at=time.time() + 60)
    maintenance.run_round(listening)
    assert (status_of(listening, job_id), status_of(listening, in_time)) == (status, "queued")
    with listening.database.reading() as session:
        job = session.get_one(Job, job_id)
    assert job.error is not None
    assert job.error["code"] == "deadline_exceeded"


def test_a_cancelling_job_whose_worker_is_gone_is_cancelled(listening: Wiring, bell: Bell) -> None:
    job_id = submit_to(listening, deadline_at=time.time() - 1)
    claim_of(listening, job_id)
    maintenance.run_round(listening)
    change_shards(listening, lease_until=LONG_AGO)
    maintenance.run_round(listening)
    assert (status_of(listening, job_id), bell.rung) == ("cancelled", [])


@pytest.fixture
def on_postgres(postgres: Postgres, tmp_path: Path, redis_url: str) -> Iterator[tuple[Wiring, str]]:
    name = ids.new("test")
    settings = Settings(
        home=tmp_path, database_url=postgres.create(name, "migrated"), redis_url=redis_url, reap_s=0.1
    )
    wiring = Wiring.build(settings)
    yield wiring, name
    wiring.close()
    postgres.drop(name)


def test_a_round_does_not_wait_for_shards_that_somebody_is_changing(on_postgres: tuple[Wiring, str]) -> None:
    bell = Bell()
    wiring = replace(on_postgres[0], doorbell=bell)  # type: ignore[arg-type]
    submit_to(wiring, shards=2)
    change_shards(wiring, rung_at=None)
    with wiring.database.writing() as session:
        locked = session.scalars(sa.select(Shard.id).limit(1).with_for_update()).one()
        maintenance.run_round(wiring)
    assert len(bell.rung) == 1
    assert locked not in [shard_id for shard_id, _ in bell.rung]


def test_the_loop_outlives_a_database_that_is_away_and_ends_when_it_is_asked_to(
    on_postgres: tuple[Wiring, str], postgres: Postgres, tmp_path: Path
) -> None:
    wiring, name = on_postgres
    log = tmp_path / "maintenance.log"
    environment: dict[str, Any] = {
        "DRAM_HOME": str(tmp_path), "DRAM_DATABASE_URL": wiring.settings.database_url,
        "DRAM_REDIS_URL": wiring.settings.redis_url, "DRAM_REAP_S": "0.1",
    }  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.maintenance"],
            cwd=Path(__file__).parents[3],
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
        )
    try:
        first = submit_to(wiring, deadline_at=time.time() - 1)
        eventually(lambda: status_of(wiring, first) == "cancelled", "the first round")
        postgres.rename(name, name + "_away")
        eventually(lambda: "maintenance_round_failed" in log.read_text(), "a failed round")
        postgres.rename(name + "_away", name)
        second = submit_to(wiring, deadline_at=time.time() - 1)
        eventually(lambda: status_of(wiring, second) == "cancelled", "a round after the outage")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
