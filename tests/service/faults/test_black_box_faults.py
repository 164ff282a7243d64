"""Faults between a job and its black box: no question is sent that is not counted, none above the budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.service.black_boxes import ORDER, REAL, SYNTHETIC, PlainServer, add_teacher, plain_server
from tests.service.stack import Stack, until

pytestmark = pytest.mark.fault

BATCH = 32


@pytest.fixture
def server() -> Iterator[PlainServer]:
    with plain_server() as started:
        yield started


def submit(stack: Stack, server: PlainServer, budget: int, **more: Any) -> str:
    teacher = add_teacher(stack, f"{server.url}/dram", batch_size=BATCH, **more)
    order = {**ORDER, "teacher_id": teacher, "student": "conv4", "query_budget": budget}
    return str(stack.submit(stack.upload(), **order)["id"])


def test_kill_of_the_worker_while_the_endpoint_works_on_its_questions(
    stack: Stack, server: PlainServer
) -> None:
    budget = REAL + SYNTHETIC + 2 * BATCH
    server.control(hold_after=REAL // 2 + 2 * BATCH)  # in the middle of the synthetic images
    job_id = submit(stack, server, budget, concurrency=2)
    until(lambda: server.state()["waiting"] == 2, 90, "two questions under way")
    held = server.counted
    stack.kill("worker")
    until(lambda: not stack.compute_processes(), 5, "the end of what it computed")
    server.control(hold_after=None)
    stack.start("worker")
    job = stack.finished(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2), job["error"]
    assert server.counted == job["queries"]["spent"] <= budget
    assert server.counted > held  # it asked again what it had not heard
    stack.check_history(job_id)


def test_the_budget_is_not_passed_when_questions_must_be_repeated(stack: Stack, server: PlainServer) -> None:
    budget = REAL + SYNTHETIC  # all that it needs, but for the repeated ones
    server.control(fail=2)
    job_id = submit(stack, server, budget)
    job = stack.finished(job_id)
    assert job["status"] == "failed"
    assert (job["error"]["code"], job["error"]["retryable"]) == ("query_budget_spent", False)
    assert "query_budget" in job["error"]["hint"]
    assert job["error"]["stage"] in ("ask_synthetic", "examine")
    assert server.counted == job["queries"]["spent"] <= budget
    before = server.counted

    # The same order with more budget asks only what was never answered.
    again = {**ORDER, "teacher_id": job["teacher_id"], "student": "conv4", "query_budget": 2 * budget}
    second = stack.finished(stack.submit(job["dataset_id"], **again)["id"])
    assert second["status"] == "succeeded", second["error"]
    assert server.counted - before == second["queries"]["spent"] < budget // 2
    assert second["queries"]["cached"] > 0


def test_cancel_while_the_endpoint_lets_wait(stack: Stack, server: PlainServer) -> None:
    server.control(hold_after=0)
    job_id = submit(stack, server, REAL + SYNTHETIC)
    until(lambda: server.state()["waiting"] > 0, 90, "a question under way")
    stack.http.post(f"/v1/jobs/{job_id}/cancel")
    job = stack.finished(job_id, seconds=10)
    assert job["status"] == "cancelled"
    assert job["queries"]["spent"] == server.counted
    assert not stack.compute_processes()
    stack.check_history(job_id)
