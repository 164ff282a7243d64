"""Computations are stopped, killed or put to sleep in the middle of a job: nothing is lost, or done twice."""

from __future__ import annotations

import os
import signal

import pytest
import sqlalchemy as sa

from app.jobs.tables import Shard, StageOutput
from tests.service.stack import Stack, until

#: A job that would go on for many minutes.
LONG = {"teacher": {"input_size": 64, "views": 1}, "distillation": {"steps": 100_000, "input_size": 32}}

pytestmark = pytest.mark.fault


def test_kill_of_the_compute_process_alone_is_one_more_attempt(stack: Stack) -> None:
    job_id = stack.submit(stack.upload(), seed=1)["id"]
    stack.wait_for_step(job_id, 100)
    (compute,) = stack.compute_processes()
    compute.kill()
    job = stack.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    stack.check_history(job_id)


@pytest.mark.slow
def test_a_worker_that_slept_through_its_lease_changes_nothing_when_it_wakes(stack: Stack) -> None:
    job_id = stack.submit(stack.upload(), seed=2)["id"]
    stack.wait_for_step(job_id, 100)
    group = os.getpgid(stack.processes["worker"].pid)
    sleeping = [group, *(os.getpgid(process.pid) for process in stack.compute_processes())]
    for pid in sleeping:
        os.killpg(pid, signal.SIGSTOP)
    stack.start("worker-2")
    job = stack.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    with stack.database.reading() as session:
        before = session.execute(sa.select(StageOutput.key, StageOutput.files)).all()
    for pid in sleeping:
        os.killpg(pid, signal.SIGCONT)
    until(lambda: len(stack.compute_processes()) == 1, 10, "it")  # the woken worker found its lease lost
    with stack.database.reading() as session:
        assert session.execute(sa.select(StageOutput.key, StageOutput.files)).all() == before
    stack.check_history(job_id)


def test_a_worker_asked_to_stop_gives_its_shard_back_unharmed(stack: Stack) -> None:
    job_id = stack.submit(stack.upload(), params=LONG)["id"]
    stack.wait_for_step(job_id, 100)
    worker = stack.processes.pop("worker")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=10) == 0
    assert not stack.compute_processes()
    with stack.database.reading() as session:
        given_back = session.scalars(sa.select(Shard).where(Shard.job_id == job_id, Shard.step > 0)).all()[-1]
    assert (given_back.status, given_back.attempt) == ("ready", 0)
    assert given_back.checkpoint is not None
    stack.start("worker")
    until(lambda: stack.step_of(job_id, "distill") > given_back.step, 90, "it")
    assert stack.job(job_id)["attempt"] == 1
    stack.http.post(f"/v1/jobs/{job_id}/cancel")
    assert stack.finished(job_id)["status"] == "cancelled"
    stack.check_history(job_id)


def test_cancel_in_the_middle_of_distillation_ends_the_computation(stack: Stack) -> None:
    job_id = stack.submit(stack.upload(), seed=3)["id"]
    stack.wait_for_step(job_id, 100)
    assert stack.http.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelling"
    job = stack.finished(job_id, seconds=10)
    assert job["status"] == "cancelled"
    assert not stack.compute_processes()
    stack.check_history(job_id)
    assert stack.http.post(f"/v1/jobs/{job_id}/cancel").status_code == 409
    assert stack.http.post(f"/v1/jobs/{job_id}/retry").status_code == 202
    assert stack.finished(job_id)["status"] == "succeeded"
