"""Says that this worker lives, and restarts it when it no longer takes work.

A worker whose Redis consumer has died still answers a ping, so the watchdog looks at progress: work that waits,
rung for again and again, while this worker holds none. It then ends the process; the supervisor starts a new one.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any

import sqlalchemy as sa
import structlog
from billiard import active_children
from celery.signals import worker_ready, worker_shutdown, worker_shutting_down

from app.catalogue import generators
from app.db import Database, now, upsert
from app.errors import DramError
from app.jobs.tables import Shard, Worker
from app.settings import Settings
from app.teachers import service as teachers

log = structlog.get_logger()

_PAUSE_S = 5.0
_TEACHERS_PAUSE_S = 60.0
_MERCY_S = 20.0  # between asking the process to end and ending it


class Watchdog(threading.Thread):
    def __init__(self, settings: Settings, queues: list[str]) -> None:
        super().__init__(daemon=True, name="watchdog")
        self._settings, self._queues = settings, queues
        self._host = socket.gethostname()
        self.worker_id = f"{self._host}:{os.getpid()}"
        self._stopped = threading.Event()
        self._idle_since = time.monotonic()
        self._tell_at = 0.0

    def run(self) -> None:
        database = Database(self._settings.database)
        while not self._stopped.is_set():
            try:
                self.look(database)
                self.tell_teachers(database)
            except sa.exc.DBAPIError as error:
                log.warning("watchdog_failed", error=str(error.orig))
                self._idle_since = time.monotonic()
            self._stopped.wait(_PAUSE_S)
        try:
            with database.writing() as session:
                session.execute(sa.delete(Worker).where(Worker.id == self.worker_id))
        except sa.exc.DBAPIError as error:  # the row grows old by itself
            log.warning("watchdog_failed", error=str(error.orig))
        database.close()

    def stop(self) -> None:
        self._stopped.set()
        self.join(timeout=_PAUSE_S)

    def look(self, database: Database) -> None:
        """Write that this worker lives; end it when work has waited too long while it was idle."""
        with database.writing() as session:
            row = {"id": self.worker_id, "queues": self._queues, "device": self._settings.device,
                   "started_at": now(), "seen_at": now()}  # fmt: skip
            upsert(session, Worker, [row], update=("queues", "device", "seen_at"))
            busy = session.scalar(self._held_here())
            waiting = session.scalar(self._waiting())
        if busy or not waiting:
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > self._settings.idle_restart_s:
            log.error("worker_takes_no_work", waiting=waiting, idle_s=time.monotonic() - self._idle_since)
            end = threading.Timer(_MERCY_S, os._exit, (70,))
            end.daemon = True  # a process that ends by itself need not wait for it
            end.start()
            os.kill(os.getpid(), signal.SIGTERM)
            self._stopped.set()

    def tell_teachers(self, database: Database) -> None:
        """Write which teachers and generators can be had here, now and then: the gateway may run where none lies."""
        if time.monotonic() < self._tell_at:
            return
        self._tell_at = time.monotonic() + _TEACHERS_PAUSE_S
        try:
            found = teachers.here(list(teachers.catalogue(self._settings).values()))
            makers = generators.here(list(generators.catalogue(self._settings).values()))
        except DramError as error:
            log.error("teachers_unknown", detail=error.detail)
            return
        told = {
            kind: {name: [state.available, state.reason] for name, state in states.items()}
            for kind, states in (("teachers", found), ("generators", makers))
        }
        with database.writing() as session:
            session.execute(sa.update(Worker).where(Worker.id == self.worker_id).values(**told))

    def _held_here(self) -> sa.Select[int]:
        mine = sa.and_(
            Shard.status == "running", Shard.worker.startswith(self.worker_id + "/", autoescape=True)
        )
        return sa.select(sa.func.count()).where(mine)

    def _waiting(self) -> sa.Select[int]:
        ready = sa.and_(Shard.status == "ready", Shard.queue.in_(self._queues), Shard.ready_at <= now())
        return sa.select(sa.func.count()).where(ready)


_watchdog: Watchdog | None = None


@worker_ready.connect  # type: ignore[untyped-decorator]
def _on_ready(sender: Any, **_: Any) -> None:
    global _watchdog
    queues = [queue.name for queue in sender.task_consumer.queues]
    _watchdog = Watchdog(Settings(), queues)
    _watchdog.start()


@worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _on_shutting_down(**_: Any) -> None:
    """Pass the wish to stop on to the pool: a shard may take hours, and is given back instead (tasks.py)."""
    for child in active_children():
        os.kill(child.pid, signal.SIGTERM)


@worker_shutdown.connect  # type: ignore[untyped-decorator]
def _on_shutdown(**_: Any) -> None:
    if _watchdog is not None:
        _watchdog.stop()
