"""A job followed in the terminal until it has ended, and why nothing happens where nothing does."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import typer

from app import console
from app.client import ClientError, Dram, DramApiError, Job, JobEvent

#: After this, who watches a job that no worker has taken is told why.
PATIENCE_S = 10.0


def until_success(dram: Dram, job_id: str, *, lasting: bool = True) -> Job:
    """The succeeded job. Ends the command with 1 where it failed or was cancelled, 130 on Ctrl-C.

    `lasting`: the service goes on when the command has ended, and so does the job on Ctrl-C.
    """
    try:
        console.follow(_or_why_not(dram, dram.jobs.events(job_id)))
        job = dram.jobs.wait(job_id)
    except KeyboardInterrupt:
        if lasting:
            console.note(
                f"\nThe job goes on. See it again: dram watch {job_id}; stop it: dram cancel {job_id}"
            )
        else:
            _cancel(dram, job_id)
        raise typer.Exit(130) from None
    if job.status != "succeeded":
        console.job_failure(job)
        raise typer.Exit(1)
    console.note(f"{job.id} succeeded: {job.student_id}")
    if job.queries.planned is not None:
        console.note(
            f"Questions to the teacher: {job.queries.spent:,}; answered before: {job.queries.cached:,}."
        )
    return job


def _or_why_not(dram: Dram, events: Iterator[JobEvent]) -> Iterator[JobEvent]:
    """The events; where no worker takes the job for a while, new or retried, what is missing is said."""
    patience = [_patience(dram)]
    try:
        for event in events:
            if event.type in {"job.started", "job.retried"}:
                patience[-1].cancel()
            if event.type == "job.retried":
                patience.append(_patience(dram))
            yield event
    finally:
        patience[-1].cancel()
        for each in patience:
            each.join()  # where one speaks already, the client stays open so long


def _patience(dram: Dram) -> threading.Timer:
    patience = threading.Timer(PATIENCE_S, _say_what_is_missing, [dram])
    patience.daemon = True
    patience.start()
    return patience


def _say_what_is_missing(dram: Dram) -> None:
    console.note("No worker has taken the job yet.")
    try:
        dram.ready()
    except ClientError as failure:
        missing = failure.errors if isinstance(failure, DramApiError) else []
        for part in missing:
            console.note(f"  {part['detail']}")
        if not missing:
            console.error(failure)
    else:
        console.note("  The service is ready: its workers may be busy with other jobs.")


def _cancel(dram: Dram, job_id: str) -> None:
    """For a service that ends with the command: or its next start would first go on with a job nobody waits for."""
    try:
        dram.jobs.cancel(job_id)
    except ClientError as failure:
        console.error(failure)
        return
    console.note(
        f"\n{job_id} is cancelled: the service that was started for it stops. The same command finds again what its "
        f"stages had finished; to go on where it stopped: dram up, and dram retry {job_id}"
    )
