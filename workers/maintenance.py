"""The maintenance loop: takes back dead leases, rings again, ends overdue jobs, forgets what is old. Beside it, in
threads of its own, what webhooks are to be told is sent.

    python -m workers.maintenance

Every round is made of compare-and-sets, so any number of these may run at once.
"""

from __future__ import annotations

import signal
import threading
import time

import sqlalchemy as sa
import structlog

from app import observability, retention
from app.db import now
from app.jobs import claims, lifecycle, service
from app.jobs.lifecycle import Ready
from app.jobs.tables import Job, Shard
from app.settings import Settings
from app.webhooks.delivery import Courier
from app.wiring import Wiring

log = structlog.get_logger()

_RETENTION_PAUSE_S = 3600.0
_MOST_RINGS = 500  # a round; the rest is rung in the next


def main() -> None:
    settings = Settings()
    observability.configure(settings.log_level, settings.log_json)
    wiring = Wiring.build(settings)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    swept = time.monotonic()
    with Courier(wiring):
        while not stop.is_set():
            try:
                run_round(wiring)
                if time.monotonic() - swept > _RETENTION_PAUSE_S:
                    swept = time.monotonic()
                    retention.sweep(wiring)
            except (sa.exc.DBAPIError, OSError) as error:
                log.warning("maintenance_round_failed", error=str(error))
            stop.wait(settings.reap_s)
    wiring.close()


def run_round(wiring: Wiring) -> None:
    """One round: reap, end overdue jobs, ring again."""
    for shard_id in _expired(wiring):
        with wiring.database.writing() as session:
            ready = claims.reap(session, shard_id, wiring.settings)
        log.info("lease_ended", shard=shard_id, again=bool(ready))
        service.announce(wiring, ready)
    for job_id in _overdue(wiring):
        with wiring.database.writing() as session:
            job = lifecycle.lock(session, job_id)
            if job.status in ("queued", "running"):
                lifecycle.request_cancel(session, job, reason="deadline_exceeded")
    service.announce(wiring, _unheard(wiring))


def _expired(wiring: Wiring) -> list[str]:
    with wiring.database.reading() as session:
        dead = sa.and_(Shard.status == "running", Shard.lease_until < now())
        return list(session.scalars(sa.select(Shard.id).where(dead)))


def _overdue(wiring: Wiring) -> list[str]:
    with wiring.database.reading() as session:
        late = sa.and_(Job.status.in_(("queued", "running")), Job.deadline_at < now())
        return list(session.scalars(sa.select(Job.id).where(late)))


def _unheard(wiring: Wiring) -> list[Ready]:
    """Ready shards that nobody took since the last ring; the pause doubles with each ring, up to 32 times."""
    pause = wiring.settings.ring_again_s
    with wiring.database.writing() as session:
        patience = pause * sa.func.pow(2, sa.case((Shard.rings > 5, 5), else_=Shard.rings))
        silent = Shard.rung_at.is_(None) | (Shard.rung_at + patience < now())
        unheard = sa.and_(Shard.status == "ready", Shard.ready_at <= now(), silent)
        select = sa.select(Shard).where(unheard).order_by(Shard.ready_at).limit(_MOST_RINGS)
        # What somebody is changing just now is not waited for: neither they nor this loop can end in a deadlock.
        shards = list(session.scalars(select.with_for_update(skip_locked=True)))
        for shard in shards:
            shard.rings += 1
            shard.rung_at = now()
        return [Ready(shard.id, shard.queue) for shard in shards]


if __name__ == "__main__":
    main()
