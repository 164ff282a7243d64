"""A claim is kept alive while it can be, progress is not lost, and the end is known when it has come."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Timer

import pytest
import sqlalchemy as sa

from app import ids
from app.jobs import claims, lifecycle
from app.jobs.claims import LeaseLost
from app.jobs.tables import JobMetric, Shard
from app.settings import Settings
from app.wiring import Wiring
from tests.conftest import Postgres
from tests.unit.workers.jobs import change_shards, claim_of, shard_of, status_of, submit_to
from workers.lease import Lease


@pytest.fixture
def quick(wiring: Wiring) -> Wiring:
    """A heartbeat at every call."""
    return replace(wiring, settings=wiring.settings.model_copy(update={"heartbeat_s": 1e-6}))


def points(wiring: Wiring) -> list[tuple[int, str, float]]:
    with wiring.database.reading() as session:
        order = (JobMetric.step, JobMetric.name)
        rows = session.execute(sa.select(JobMetric.step, JobMetric.name, JobMetric.value).order_by(*order))
        return [(step, name, value) for step, name, value in rows]


def test_it_is_renewed_when_that_is_due_and_not_before(wiring: Wiring) -> None:
    settings = wiring.settings.model_copy(update={"heartbeat_s": 1.5})
    job_id = submit_to(wiring)
    lease = Lease(replace(wiring, settings=settings), claim_of(wiring, job_id))
    until = time.time() + 5
    change_shards(wiring, lease_until=until)
    assert lease.keep() == "go on"
    assert shard_of(wiring, job_id).lease_until == until
    time.sleep(1.55)
    assert lease.keep() == "go on"
    assert shard_of(wiring, job_id).lease_until == pytest.approx(time.time() + settings.lease_ttl_s, abs=2)


def test_progress_and_points_are_written_with_the_next_renewal_once(quick: Wiring) -> None:
    job_id = submit_to(quick)
    lease = Lease(quick, claim_of(quick, job_id))
    lease.progress(10, 100, {"loss": 2.0})
    lease.progress(20, 100, {"loss": 1.0, "lr": 0.1})
    lease.keep()
    shard = shard_of(quick, job_id)
    assert (shard.step, shard.total) == (20, 100)
    written = [(10, "loss", 2.0), (20, "loss", 1.0), (20, "lr", 0.1)]
    assert points(quick) == written
    lease.progress(30, 100, {"loss": 0.5})
    lease.keep()
    assert points(quick) == [*written, (30, "loss", 0.5)]


def test_a_claim_that_has_not_spoken_yet_leaves_the_progress_of_the_one_before(quick: Wiring) -> None:
    job_id = submit_to(quick)
    first = claim_of(quick, job_id)
    lease = Lease(quick, first)
    lease.progress(60, 100, {})
    lease.keep()
    change_shards(quick, lease_until=1.0)
    with quick.database.writing() as session:
        claims.reap(session, first.shard_id, quick.settings)
    lease = Lease(quick, claim_of(quick, job_id, "another"))
    for report, step in ((None, 60), (50, 50)):
        if report is not None:
            lease.progress(report, 100, {})
        assert lease.keep() == "go on"
        assert shard_of(quick, job_id).step == step


def test_a_point_that_is_told_twice_or_is_no_number_does_not_cost_the_lease(quick: Wiring) -> None:
    lease = Lease(quick, claim_of(quick, submit_to(quick)))
    lease.progress(10, 100, {"loss": 2.0})
    lease.progress(10, 100, {"loss": 3.0, "diverged": math.nan, "scale": math.inf})
    assert lease.keep() == "go on"
    assert points(quick) == [(10, "loss", 3.0)]


def test_more_points_than_one_statement_takes_are_all_written(quick: Wiring) -> None:
    lease = Lease(quick, claim_of(quick, submit_to(quick)))
    for step in range(12_000):
        lease.progress(step, 12_000, {"loss": 1.0})
    assert lease.keep() == "go on"
    assert len(points(quick)) == 12_000


def test_it_says_when_the_job_is_being_cancelled(quick: Wiring) -> None:
    job_id = submit_to(quick)
    lease = Lease(quick, claim_of(quick, job_id))
    assert lease.keep() == "go on"
    with quick.database.writing() as session:
        lifecycle.request_cancel(session, lifecycle.lock(session, job_id))
    assert lease.keep() == "cancel"


def test_it_says_when_there_is_no_progress_for_too_long(quick: Wiring) -> None:
    settings = quick.settings.model_copy(update={"stall_s": 0.2})
    lease = Lease(replace(quick, settings=settings), claim_of(quick, submit_to(quick)))
    lease.progress(5, 10, {})
    assert lease.keep() == "go on"
    time.sleep(0.25)
    assert lease.keep() == "stalled"
    lease.progress(6, 10, {})
    assert lease.keep() == "go on"
    time.sleep(0.25)
    lease.progress(6, 10, {})  # it says that it waits: for a teacher, say
    assert lease.keep() == "go on"
    time.sleep(0.25)
    assert lease.keep() == "stalled"


def test_it_is_lost_when_another_worker_has_claimed_the_shard(quick: Wiring) -> None:
    job_id = submit_to(quick)
    claim = claim_of(quick, job_id)
    change_shards(quick, lease_until=1.0)
    with quick.database.writing() as session:
        claims.reap(session, claim.shard_id, quick.settings)
    claim_of(quick, job_id, "another")
    lease = Lease(quick, claim)
    assert lease.keep() == "lost"
    with pytest.raises(LeaseLost):
        lease.finish(partial(claims.complete, held=claim, files={}, size=0))


class Away:
    """A database on PostgreSQL that a test sends away and brings back."""

    def __init__(self, postgres: Postgres, home: Path) -> None:
        self._postgres, self._name = postgres, ids.new("test")
        url = postgres.create(self._name, "migrated")
        self.wiring = Wiring.build(
            Settings(
                home=home, database_url=url, redis_url="redis://unused", heartbeat_s=1e-6, lease_ttl_s=1.5
            )
        )

    def leave(self) -> None:
        self._postgres.rename(self._name, self._name + "_away")

    def come_back(self) -> None:
        self._postgres.rename(self._name + "_away", self._name)

    def close(self) -> None:
        self.wiring.close()
        self._postgres.drop(self._name)


@pytest.fixture
def away(postgres: Postgres, tmp_path: Path) -> Iterator[Away]:
    made = Away(postgres, tmp_path)
    yield made
    made.close()


def test_points_outlast_an_outage_of_the_database(away: Away) -> None:
    lease = Lease(away.wiring, claim_of(away.wiring, submit_to(away.wiring)))
    lease.progress(10, 100, {"loss": 2.0})
    away.leave()
    assert lease.keep() == "go on"
    lease.progress(20, 100, {"loss": 1.0})
    assert lease.keep() == "go on"
    away.come_back()
    assert lease.keep() == "go on"
    assert points(away.wiring) == [(10, "loss", 2.0), (20, "loss", 1.0)]


def test_a_database_that_is_away_means_lost_only_when_the_lease_would_have_ended(away: Away) -> None:
    lease = Lease(away.wiring, claim_of(away.wiring, submit_to(away.wiring)))
    assert lease.keep() == "go on"
    away.leave()
    since = time.monotonic()
    while (verdict := lease.keep()) == "go on":
        time.sleep(0.02)
    assert verdict == "lost"
    assert 1.4 < time.monotonic() - since < 3
    away.come_back()


def test_a_renewal_after_the_outage_starts_the_time_anew(away: Away) -> None:
    lease = Lease(away.wiring, claim_of(away.wiring, submit_to(away.wiring)))
    for _ in range(2):
        away.leave()
        time.sleep(0.9)
        assert lease.keep() == "go on"
        away.come_back()
        assert lease.keep() == "go on"


def test_the_ending_is_written_when_the_database_is_back(away: Away) -> None:
    job_id = submit_to(away.wiring, shards=2)
    claim = claim_of(away.wiring, job_id)
    lease = Lease(away.wiring, claim)
    away.leave()
    back = Timer(0.3, away.come_back)
    back.start()
    lease.finish(partial(claims.complete, held=claim, files={"f": "b"}, size=1))
    back.join()
    with away.wiring.database.reading() as session:
        assert session.get_one(Shard, claim.shard_id).status == "succeeded"
    assert status_of(away.wiring, job_id) == "running"


def test_an_ending_that_cannot_be_written_within_the_lease_is_lost(away: Away) -> None:
    claim = claim_of(away.wiring, submit_to(away.wiring))
    lease = Lease(away.wiring, claim)
    away.leave()
    since = time.monotonic()
    with pytest.raises(LeaseLost):
        lease.finish(partial(claims.complete, held=claim, files={}, size=0))
    assert 1.4 < time.monotonic() - since < 4
    away.come_back()
