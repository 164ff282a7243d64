"""Jobs are deleted when they have ended, and what was deleted long ago is not computed with again."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import httpx
import pytest
import sqlalchemy as sa

from app import retention
from app.client import AsyncDram, Dram, DramApiError
from app.jobs.tables import Job, JobEvent, JobMetric, Shard
from app.students.tables import Student
from app.wiring import Wiring
from tests.service.test_jobs import ORDER, claim, dataset, run, submit

if TYPE_CHECKING:
    from tests.conftest import Gateway

__all__ = ["dataset"]  # the fixture


def cancelled(client: httpx.Client, dataset: str) -> str:
    """A job that was ordered and cancelled; its id."""
    job_id = str(submit(client, dataset)["id"])
    assert client.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    return job_id


def test_a_deleted_job_is_not_found_any_more_and_holds_nothing(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    job_id, other = cancelled(client, dataset), cancelled(client, dataset)
    url = f"/v1/jobs/{job_id}"
    with wiring.database.writing() as session:
        session.add(JobMetric(job_id=job_id, stage="distill", shard=0, name="loss", step=1, value=1.0))
        kept = {"step": 20, "files": {"c": "d"}, "previous": None}
        session.execute(sa.update(Shard).where(Shard.job_id == job_id).values(checkpoint=kept))
    assert [client.delete(url).status_code for _ in range(2)] == [204, 404]
    for path in ("", "/events", "/metrics", "/samples"):
        assert client.get(url + path).json()["code"] == "job_not_found"
    for action in ("cancel", "retry"):
        assert client.post(f"{url}/{action}").json()["code"] == "job_not_found"
    assert [job["id"] for job in client.get("/v1/jobs").json()["data"]] == [other]
    with wiring.database.reading() as session:
        for table in (JobEvent, JobMetric):
            assert session.scalars(sa.select(table).where(table.job_id == job_id)).all() == []
        checkpoints = session.scalars(sa.select(Shard.checkpoint).where(Shard.job_id == job_id))
        assert set(checkpoints) == {None}
        row = session.get_one(Job, job_id)
        assert (row.sources, row.deleted_at) == ({}, pytest.approx(time.time(), abs=60))


def test_a_repeated_order_is_answered_with_its_job_though_that_and_its_data_set_were_deleted(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    order, headers = {**ORDER, "dataset_id": dataset}, {"Idempotency-Key": "once"}
    job_id = client.post("/v1/jobs", json=order, headers=headers).json()["id"]
    ended = client.post(f"/v1/jobs/{job_id}/cancel").json()
    for path in (f"/v1/jobs/{job_id}", f"/v1/datasets/{dataset}"):
        assert client.delete(path).status_code == 204
    again = client.post("/v1/jobs", json=order, headers=headers)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")
    assert again.json() == ended
    assert client.get(f"/v1/jobs/{job_id}").status_code == 404
    other = client.post("/v1/jobs", json={**order, "seed": 5}, headers=headers)
    assert other.json()["code"] == "idempotency_key_reused"
    with wiring.database.reading() as session:
        assert session.scalars(sa.select(Job.id)).all() == [job_id]


def test_a_job_is_deleted_only_when_it_has_ended_by_its_tenant_with_a_key_that_may_write(
    client: httpx.Client, gateway: Gateway, wiring: Wiring, dataset: str
) -> None:
    job_id = submit(client, dataset)["id"]
    url = f"/v1/jobs/{job_id}"
    for _ in ("queued", "running"):
        refused = client.delete(url)
        assert (refused.status_code, refused.json()["code"]) == (409, "job_not_finished")
        if client.get(url).json()["status"] == "queued":
            claim(wiring, job_id)
    with gateway.client(gateway.key_of("other", "jobs:write")) as other:
        assert other.delete(url).status_code == 404
    with gateway.client(gateway.key_of("default", "jobs:read")) as reader:
        assert reader.delete(url).status_code == 403


def test_the_student_of_a_deleted_job_stays(client: httpx.Client, wiring: Wiring, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    run(wiring, job_id)
    student = client.get(f"/v1/jobs/{job_id}").json()["student_id"]
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert client.get(f"/v1/students/{student}").json()["job_id"] == job_id


def test_a_job_whose_images_are_gone_is_not_retried(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    job_id = cancelled(client, dataset)
    assert client.delete(f"/v1/datasets/{dataset}").status_code == 204
    retention.sweep(wiring)
    assert client.post(f"/v1/jobs/{job_id}/retry").status_code == 202  # it ended a moment ago
    client.post(f"/v1/jobs/{job_id}/cancel")
    with wiring.database.writing() as session:
        session.get_one(Job, job_id).finished_at = time.time() - 31 * 86400
    retention.sweep(wiring)
    refused = client.post(f"/v1/jobs/{job_id}/retry")
    assert (refused.status_code, refused.json()["code"]) == (410, "images_gone")
    assert client.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled"


def test_the_client_deletes_jobs_and_students(
    client: httpx.Client, gateway: Gateway, wiring: Wiring, dataset: str
) -> None:
    job_id = submit(client, dataset)["id"]
    run(wiring, job_id)
    with wiring.database.reading() as session:
        student = session.scalars(sa.select(Student.id)).one()
    with Dram(gateway.url, gateway.key) as dram:
        dram.students.delete(student)
        dram.jobs.delete(job_id)
        for lookup in (lambda: dram.students.get(student), lambda: dram.jobs.get(job_id)):
            with pytest.raises(DramApiError) as refused:
                lookup()
            assert refused.value.status == 404


@pytest.mark.anyio
def test_so_does_the_asynchronous_client(
    client: httpx.Client, gateway: Gateway, wiring: Wiring, dataset: str
) -> None:
    job_id = submit(client, dataset)["id"]
    run(wiring, job_id)

    async def delete() -> None:
        async with AsyncDram(gateway.url, gateway.key) as dram:
            (student,) = (await dram.students.list()).data
            await dram.students.delete(student.id)
            await dram.jobs.delete(job_id)
            assert list((await dram.students.list()).data) == []
            assert list((await dram.jobs.list()).data) == []

    asyncio.run(delete())
