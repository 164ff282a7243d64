"""What a ring does: claim the shard, have it computed, record the result, ring for what became ready. No torch."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import structlog
from celery.signals import worker_process_shutdown
from sqlalchemy.orm import Session
from structlog.contextvars import bound_contextvars

from app.errors import DramError
from app.jobs import claims, queries, service
from app.jobs.claims import Claim, LeaseLost
from app.jobs.lifecycle import JobError, Ready
from app.settings import Settings
from app.storage import BlobStore
from app.wiring import Wiring
from models.methods import METHODS
from workers.answering import Answering
from workers.celery_app import app
from workers.lease import Lease
from workers.runner import Asked, ComputeProcess, Died, Done, Failed, Kept, Moved

log = structlog.get_logger()

_POLL_S = 0.1


class Stopping(BaseException):
    """This worker was told to stop; not an Exception, so that no handler on the way swallows it."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Inside, SIGTERM raises Stopping, once. Set for each shard, because the pool resets signals after a fork."""

    def stop(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopping

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Bench:
    """What one pool process works with: its wiring and its warm compute process. Made after the fork."""

    def __init__(self, settings: Settings) -> None:
        self.wiring = Wiring.build(settings)
        self.compute = ComputeProcess(settings)
        self.worker = (
            f"{socket.gethostname()}:{os.getppid()}/{os.getpid()}"  # the parent's id is the watchdog's
        )


_bench: Bench | None = None


def bench() -> Bench:
    global _bench
    if _bench is None:
        _bench = Bench(Settings())
    return _bench


@app.task(name="workers.tasks.run_shard")  # type: ignore[untyped-decorator]
def run_shard(shard_id: str) -> None:
    here = bench()
    with here.wiring.database.writing() as session:
        claim, ready = claims.claim(session, shard_id, here.worker, here.wiring.settings)
    if claim is not None:
        with bound_contextvars(job=claim.job_id, stage=claim.stage, shard=claim.shard, attempt=claim.attempt):
            log.info("claimed")
            ready = work(here.wiring, here.compute, claim)
    service.announce(here.wiring, ready)


def work(wiring: Wiring, compute: ComputeProcess, claim: Claim) -> list[Ready]:
    """Have the claim computed and record how it ended. Returns the shards that became ready."""
    lease = Lease(wiring, claim)
    try:
        with _stoppable():
            ending = _computed(wiring, lease, compute, claim)
        return lease.finish(ending)
    except LeaseLost:
        compute.kill()
        log.warning("lease_lost")
    except Stopping:
        compute.kill()
        lease.finish(partial(claims.release, held=claim))
        log.info("released")
    except BaseException:
        compute.kill()  # what it still says must not be taken for an answer to the next claim
        raise
    return []


def _computed(
    wiring: Wiring, lease: Lease, compute: ComputeProcess, claim: Claim
) -> Callable[[Session], list[Ready]]:
    """Watch the compute process until it ends. Returns the write unit that records the ending."""
    settings = wiring.settings
    answering = Answering(lease)
    try:
        headers = _headers(wiring, claim)
    except DramError as reason:
        broken = JobError(reason.code, reason.detail, retryable=True)
        return partial(claims.fail, held=claim, error=broken, settings=settings)
    compute.start(claim, headers)
    while True:
        message = compute.message(timeout=_POLL_S)
        match message:
            case Moved():
                lease.progress(message.step, message.total, message.metrics)
            case Kept():
                forgotten = lease.finish(
                    partial(claims.keep_checkpoint, held=claim, step=message.step, files=message.files)
                )
                _delete(wiring.blobs, forgotten)
            case Asked():
                compute.reply(answering.reply(message.call, message.arguments))
            case Done():
                if lease.renew() == "lost":
                    raise LeaseLost(claim.shard_id)
                log.info("computed", bytes=message.bytes)
                return partial(_complete, held=claim, made=message, cached=answering.earlier)
            case Failed():
                log.warning("failed", code=message.code, detail=message.detail)
                error = JobError(
                    message.code, message.detail, message.hint, message.retryable, message.after_s
                )
                return partial(claims.fail, held=claim, error=error, settings=settings)
            case Died():
                log.warning("compute_died", status=message.status)
                return partial(claims.fail, held=claim, error=_death(message.status), settings=settings)
        match lease.keep():
            case "cancel":
                compute.kill()
                log.info("cancelled")
                return partial(claims.stopped, held=claim)
            case "stalled":
                compute.kill()
                detail = f"No progress for {settings.stall_s:.0f} s; the compute process was stopped."
                error = JobError("stage_stalled", detail, retryable=True)
                return partial(claims.fail, held=claim, error=error, settings=settings)
            case "lost":
                raise LeaseLost(claim.shard_id)


def _delete(blobs: BlobStore, checkpoints: Iterable[str]) -> None:
    """Delete blobs of old checkpoints, which nobody else names. What fails now is left to retention."""
    for digest in checkpoints:
        try:
            blobs.delete(digest)
        except Exception as error:  # each kind of store has its own; no job fails for want of cleaning
            log.warning("checkpoint_left", blob=digest, error=str(error))


def _headers(wiring: Wiring, claim: Claim) -> dict[str, str]:
    """The secret headers of the teacher, for a stage that asks it. Raises Unavailable."""
    method = METHODS.get(claim.method)  # one that this worker does not have fails in the compute process
    if method is None or not method.stage(claim.stage).asks:
        return {}
    with wiring.database.reading() as session:
        return queries.secret_headers(session, wiring.settings, claim)


def _complete(session: Session, held: Claim, made: Done, cached: int) -> list[Ready]:
    queries.count_cached(session, held, cached)
    return claims.complete(session, held, made.files, made.bytes, made.facts)


def _death(status: int) -> JobError:
    if status == -signal.SIGKILL:
        detail = "The compute process was killed, most likely because the machine ran out of memory."
        return JobError(
            "out_of_memory", detail, "Try a smaller batch_size, student or teacher.", retryable=True
        )
    return JobError("compute_crashed", f"The compute process ended with status {status}.", retryable=True)


@worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def _on_stop(**_: Any) -> None:
    if _bench is not None:
        _bench.compute.kill()
        _bench.wiring.close()
