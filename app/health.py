"""Is the process alive, can the service do its work, and its counters. No key is asked for; no tenant is named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from typing import Literal

import redis
import sqlalchemy as sa
import structlog
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from app import migrate
from app.db import now
from app.jobs.tables import WORKER_SILENCE_S, Shard, Worker
from app.wiring import Wiring

log = structlog.get_logger()
router = APIRouter(tags=["health"])

#: A check that takes longer has failed.
CHECK_S = 3.0
#: Anyone may ask, so the checks run at most this often.
MEMORY_S = 2.0


class Alive(BaseModel):
    status: Literal["ok"]


class Check(BaseModel):
    ok: bool
    reason: str = Field(description="What was found, or what is wrong.")


class ReadinessAnswer(BaseModel):
    status: Literal["ready", "not_ready"]
    checks: dict[str, Check]


class NotReady(Exception):
    """A check failed; the message is for everybody, so it names no host and no path."""


class Readiness:
    """The checks, run side by side, each with a deadline."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._lock = threading.Lock()
        self._known: tuple[float, ReadinessAnswer] | None = None
        self._checks: dict[str, Callable[[], str]] = {
            "database": self._database,
            "schema": self._schema,
            "redis": self._redis,
            "storage": self._storage,
            "worker": self._worker,
        }

    def answer(self) -> ReadinessAnswer:
        with self._lock:
            if self._known is None or time.monotonic() - self._known[0] > MEMORY_S:
                self._known = (time.monotonic(), self._run())
            return self._known[1]

    def _run(self) -> ReadinessAnswer:
        threads = ThreadPoolExecutor(max_workers=len(self._checks), thread_name_prefix="readiness")
        until = time.monotonic() + CHECK_S
        running = {name: threads.submit(check) for name, check in self._checks.items()}
        checks = {}
        for name, future in running.items():
            try:
                checks[name] = Check(ok=True, reason=future.result(max(0.0, until - time.monotonic())))
            except Late:
                checks[name] = Check(ok=False, reason=f"No answer within {CHECK_S:.0f} seconds.")
            except NotReady as error:
                checks[name] = Check(ok=False, reason=str(error))
            except Exception as error:  # whatever a driver raises means: not ready
                log.warning("readiness_check_failed", check=name, error=str(error))
                checks[name] = Check(
                    ok=False, reason=f"It does not answer as it should ({type(error).__name__})."
                )
        threads.shutdown(wait=False)
        ready = all(check.ok for check in checks.values())
        return ReadinessAnswer(status="ready" if ready else "not_ready", checks=checks)

    def _database(self) -> str:
        with self._wiring.database.reading() as session:
            session.execute(sa.text("SELECT 1"))
        return "It answers."

    def _schema(self) -> str:
        with self._wiring.database.reading() as session:
            present = migrate.revision(session.connection())
        if present != migrate.head():
            raise NotReady(
                f"It is at revision {present or 'none'}, this version needs {migrate.head()}: "
                "run 'python -m app.migrate'."
            )
        return f"At revision {present}."

    def _redis(self) -> str:
        url = self._wiring.settings.redis.replace("redis+socket://", "unix://", 1).replace(
            "virtual_host=", "db="
        )
        client = redis.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=2)
        try:
            client.ping()
        finally:
            client.close()
        return "It answers."

    def _storage(self) -> str:
        self._wiring.blobs.check()
        return "It can be written."

    def _worker(self) -> str:
        with self._wiring.database.reading() as session:
            alive = _workers_alive(session)
        if not alive:
            raise NotReady(f"No worker was seen in the last {WORKER_SILENCE_S:.0f} seconds: start one.")
        return f"{alive} alive."


@router.get("/healthz")
async def healthz() -> Alive:
    """The process is alive."""
    return Alive(status="ok")


@router.get("/readyz", responses={503: {"model": ReadinessAnswer, "description": "Something is missing"}})
def readyz(request: Request, response: Response) -> ReadinessAnswer:
    """Whether jobs can be taken and done: database, schema, Redis, storage, a live worker."""
    readiness: Readiness = request.app.state.readiness
    answer = readiness.answer()
    if answer.status != "ready":
        response.status_code = 503
    return answer


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request) -> Response:
    """Counters of this process, and the state of the work of all processes, for Prometheus."""
    text = generate_latest(request.app.state.metrics.registry)
    try:
        text += generate_latest(_work(request.app.state.wiring))
    except sa.exc.SQLAlchemyError as error:  # this process's own counters are worth having all the same
        log.warning("metrics_without_database", error=str(error))
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _work(wiring: Wiring) -> CollectorRegistry:
    """What waits and what runs, by queue, and who is there to do it."""
    registry = CollectorRegistry()
    shards = Gauge("dram_shards", "Pieces of work.", ("queue", "status"), registry=registry)
    workers = Gauge("dram_workers", "Workers seen in the last minute.", registry=registry)
    open_shards = (
        sa.select(Shard.queue, Shard.status, sa.func.count())
        .where(Shard.status.in_(("ready", "running")))
        .group_by(Shard.queue, Shard.status)
    )
    with wiring.database.reading() as session:
        for queue, status, count in session.execute(open_shards):
            shards.labels(queue, status).set(count)
        workers.set(_workers_alive(session))
    return registry


def _workers_alive(session: Session) -> int:
    recent = Worker.seen_at > now() - WORKER_SILENCE_S
    return session.scalar(sa.select(sa.func.count()).select_from(Worker).where(recent)) or 0
