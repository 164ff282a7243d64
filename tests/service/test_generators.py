"""Generators of images: which there are, whether they can be had, and orders that read one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from app.db import now
from app.jobs import plan
from app.jobs.tables import Job, JobStage, Worker
from app.settings import Settings
from app.wiring import Wiring
from models.generators import GENERATORS
from models.methods import METHODS
from models.pipeline import JobShape, digest
from tests import tiny_diffusion
from tests.service.stack import few_shot_zip

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

ORDER = {"method": "tint", "teacher_id": "efficientnet_lite0", "student": "conv4", "preset": "draft"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.write(tmp_path_factory.mktemp("generator") / "tiny")


@pytest.fixture
def settings(settings: Settings, checkpoint: Path, tmp_path: Path) -> Settings:
    """The operator has one generator that is there, and one that is not."""
    path = tmp_path / "teachers.toml"
    path.write_text(
        "".join(
            f"""[[generator]]
name = "{name}"
title = "Bolts"
kind = "local"
source = "{folder}"
resolution = 16
licence = "proprietary"
licence_url = "https://example.org/licence"
"""
            for name, folder in (("bolts", checkpoint), ("nuts", tmp_path / "nothing"))
        )
    )
    return settings.model_copy(update={"teachers_file": path})


@pytest.fixture
def dataset(client: httpx.Client) -> Iterator[str]:
    answer = client.post("/v1/datasets", files={"archive": ("set.zip", few_shot_zip(), "application/zip")})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def refused(client: httpx.Client, **order: Any) -> dict[str, Any]:
    answer = client.post("/v1/jobs", json={**ORDER, **order})
    assert answer.status_code == 422, answer.text
    problem: dict[str, Any] = answer.json()
    assert [finding["pointer"] for finding in problem["errors"]] == ["/generator_id"]
    return problem


def test_generators_come_with_licence_and_whether_they_can_be_had(client: httpx.Client) -> None:
    listed = client.get("/v1/generators").json()["data"]
    assert {item["id"] for item in listed} == {*GENERATORS, "bolts", "nuts"}
    by_name = {item["id"]: item for item in listed}
    assert by_name["bolts"]["available"] is True
    assert by_name["nuts"]["available"] is False
    assert "model_index.json" in by_name["nuts"]["reason"]
    assert {item["source"] for item in listed if item["kind"] == "local"} == {"local"}
    assert by_name["stable_diffusion_15"]["licence"] == "CreativeML Open RAIL-M"
    assert client.get("/v1/generators/bolts").json() == by_name["bolts"]
    missing = client.get("/v1/generators/screws")
    assert (missing.status_code, missing.json()["code"]) == (404, "unknown_generator")
    assert "bolts" in missing.json()["detail"]


def test_the_workers_say_which_generators_can_be_had(client: httpx.Client, wiring: Wiring) -> None:
    with wiring.database.writing() as session:
        told = {"bolts": [False, "Not on this disk."], "nuts": [True, "In a local folder."]}
        session.add(Worker(id="one", queues=["gpu"], device="cpu", generators=told, seen_at=now()))
    states = {item["id"]: item for item in client.get("/v1/generators").json()["data"]}
    assert (states["bolts"]["available"], states["bolts"]["reason"]) == (False, "Not on this disk.")
    assert states["nuts"]["available"] is True
    assert "DRAM_TEACHERS_FILE" in states["embedded"]["reason"]


def test_an_order_names_its_generator_and_plans_with_it(
    client: httpx.Client, dataset: str, wiring: Wiring, settings: Settings
) -> None:
    from app.catalogue import generators as service

    job = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset, "generator_id": "bolts"}).json()
    assert job["generator_id"] == "bolts"
    shards = {stage["name"]: stage["shards"] for stage in job["stages"]}
    assert shards["textual_inversion"] == shards["null_text_inversion"] == shards["generate"] == 3
    spec = service.catalogue(settings)["bolts"]
    with wiring.database.reading() as session:
        row = session.get_one(Job, job["id"])
    document = digest(spec.model_dump(mode="json"))
    assert row.sources["generator"] == {"files": {"generator.json": document}}
    assert wiring.blobs.exists(document)
    method = METHODS["tint"]
    planned = plan.stages(method, JobShape(**row.shape), row.sources, method.resolve("draft", {}), 0)
    other = plan.stages(
        method,
        JobShape(**row.shape),
        {**row.sources, "generator": {"files": {"generator.json": "another"}}},
        method.resolve("draft", {}),
        0,
    )
    assert planned[0].key != other[0].key


def test_the_generator_that_comes_with_dram_is_taken_unless_another_is_named(
    client: httpx.Client, dataset: str
) -> None:
    job = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset}).json()
    assert job["generator_id"] == "embedded"


def test_orders_are_refused_whose_generator_is_unknown_absent_or_not_read(
    client: httpx.Client, dataset: str
) -> None:
    unknown = refused(client, dataset_id=dataset, generator_id="screws")
    assert unknown["code"] == "unknown_generator"
    assert "bolts" in unknown["detail"]
    assert refused(client, dataset_id=dataset, generator_id="nuts")["code"] == "generator_unavailable"
    unread = refused(client, dataset_id=dataset, generator_id="bolts", method="kd")
    assert unread["code"] == "method_reads_no_generator"
    assert "tint" in unread["detail"]


def test_whether_fsbbt_reads_a_generator_depends_on_what_makes_its_images(
    client: httpx.Client, dataset: str, wiring: Wiring
) -> None:
    order = {"dataset_id": dataset, "method": "fsbbt"}
    mixes = client.post("/v1/jobs", json={**ORDER, **order}).json()
    assert mixes["generator_id"] is None
    unread = refused(client, **order, generator_id="bolts")
    assert unread["code"] == "method_reads_no_generator"
    assert "'fsbbt' with these parameters reads no generator" in unread["detail"]
    drawn = {"params": {"synthesis": {"maker": "diffusion"}}, "generator_id": "bolts"}
    job = client.post("/v1/jobs", json={**ORDER, **order, **drawn}).json()
    assert job["generator_id"] == "bolts"
    with wiring.database.reading() as session:
        keys = [
            dict(
                session.execute(
                    sa.select(JobStage.name, JobStage.key).where(JobStage.job_id == each["id"])
                ).all()
            )
            for each in (mixes, job)
        ]
    assert keys[0]["ask_real"] == keys[1]["ask_real"]
    assert keys[0]["synthesise"] != keys[1]["synthesise"]


def test_a_job_without_a_generator_says_so(client: httpx.Client, dataset: str) -> None:
    job = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset, "method": "kd"}).json()
    assert job["generator_id"] is None
    assert "generator" not in {stage["name"] for stage in job["stages"]}


def test_a_file_of_generators_that_is_wrong_is_told(settings: Settings, gateway_with: Any) -> None:
    assert settings.teachers_file is not None
    settings.teachers_file.write_text('[[generator]]\nname = "bolts"\nkind = "hub"\nsource = "a/b"\n')
    with gateway_with() as gateway, gateway.client(gateway.key) as client:
        answer = client.get("/v1/generators")
        assert (answer.status_code, answer.json()["code"]) == (503, "teachers_file_wrong")
        settings.teachers_file.write_text(
            '[[generator]]\nname = "bolts"\ntitle = "B"\nkind = "hub"\nsource = "a/b"\nresolution = 64\n'
            'licence = "x"\nlicence_url = "y"\n'
        )
        assert "40 hex digits" in client.get("/v1/generators").json()["detail"]
