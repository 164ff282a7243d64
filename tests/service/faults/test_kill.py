"""Processes are killed in the middle of a job: it succeeds all the same, once."""

from __future__ import annotations

import time

import pytest
import sqlalchemy as sa

from app.jobs.tables import Shard
from tests.service.stack import Stack, until

pytestmark = pytest.mark.fault


def test_kill_of_the_worker_in_the_middle_of_distillation_resumes_from_the_checkpoint(stack: Stack) -> None:
    job_id = stack.submit(stack.upload(), seed=1)["id"]
    stack.wait_for_step(job_id, 150)
    stack.kill("worker")
    until(lambda: not stack.compute_processes(), 5, "it")  # nothing computes on without its worker
    stack.start("worker")
    job = stack.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    events = stack.check_history(job_id)
    (retried,) = [event.data for event in events if event.type == "stage.retried"]
    assert retried["stage"] == "distill"
    assert retried["from_step"] >= 50
    after = [e.data["step"] for e in events if e.type == "stage.progress" and e.data["stage"] == "distill"]
    resumed = after[
        next(i for i in range(1, len(after)) if after[i] <= after[i - 1]) if sorted(after) != after else -1
    ]
    assert resumed >= retried["from_step"]


def test_kill_of_redis_and_of_the_gateway_in_the_middle_of_a_job(stack: Stack) -> None:
    dataset = stack.upload(seed=2)  # nothing of it was computed before
    job_id = stack.submit(dataset)["id"]
    stack.wait_for_step(job_id, 100)
    stack.kill("redis")
    stack.kill("gateway")
    time.sleep(2)
    stack.start("redis", "gateway")
    job = stack.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    stack.check_history(job_id)
    second = stack.finished(stack.submit(dataset, student="test_convnext")["id"])  # the worker listens again
    assert second["status"] == "succeeded"
    reused = [stage["name"] for stage in second["stages"] if stage["status"] == "reused"]
    assert {"ask", "label", "examine"} <= set(reused)


@pytest.mark.slow
def test_a_redis_that_forgot_everything_costs_nothing(stack: Stack) -> None:
    dataset = stack.upload()
    jobs = [stack.submit(dataset, seed=seed)["id"] for seed in (3, 4)]
    stack.wait_for_step(jobs[0], 50)
    stack.kill("redis")
    for path in (stack.home / "redis").rglob("*"):
        if path.is_file():
            path.unlink()
    stack.start("redis")
    for job_id in jobs:
        assert stack.finished(job_id)["status"] == "succeeded"
        stack.check_history(job_id)


def test_jobs_are_accepted_while_redis_is_down_and_run_when_it_is_back(stack: Stack) -> None:
    dataset = stack.upload()
    stack.kill("redis")
    seconds = []
    jobs = []
    for seed in range(3):
        start = time.monotonic()
        jobs.append(stack.submit(dataset, seed=seed, params={"distillation": {"steps": 5}})["id"])
        seconds.append(time.monotonic() - start)
    assert max(seconds) < 2.0, seconds
    stack.start("redis")
    for job_id in jobs:
        assert stack.finished(job_id)["status"] == "succeeded"
        stack.check_history(job_id)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(stack: Stack) -> None:
    job_id = stack.submit(stack.upload(), seed=5)["id"]
    stack.wait_for_step(job_id, 200)
    stack.kill("worker")
    with stack.database.reading() as session:
        running = sa.and_(Shard.job_id == job_id, Shard.status == "running")
        shard = session.scalars(sa.select(Shard).where(running)).one()
    assert shard.checkpoint is not None
    assert shard.checkpoint["previous"] is not None
    spoiled = set(shard.checkpoint["files"].values()) - set(shard.checkpoint["previous"]["files"].values())
    for digest in spoiled:
        path = stack.home / "blobs" / digest[:2] / digest
        path.chmod(0o644)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    stack.start("worker")
    assert stack.finished(job_id)["status"] == "succeeded"
    log = (stack.home / "worker.log").read_text()
    assert f"checkpoint at step {shard.checkpoint['step']} is unusable" in log
