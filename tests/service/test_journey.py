"""One whole job on PostgreSQL, from upload to an answer of the student; and the same job without the service."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import sqlalchemy as sa
import torch
from PIL import Image
from safetensors.numpy import load_file

from app.jobs.tables import JobStage, Shard, StageOutput
from models import local
from models.data import archive
from models.methods import METHODS
from tests.conftest import Postgres
from tests.service.stack import ORDER, Stack, few_shot_zip

QUICK = {**ORDER["params"], "distillation": {"steps": 30, "batch_size": 16, "input_size": 32}}  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("journey"), postgres.create("journey"))
    try:
        made.start_all()
        yield made
    finally:
        made.stop()
        postgres.drop("journey")


@pytest.fixture(scope="module")
def job(stack: Stack) -> dict[str, Any]:
    """A finished job that asked for int8."""
    order = stack.submit(stack.upload(), params=QUICK, precision="int8")
    finished = stack.finished(order["id"])
    assert finished["status"] == "succeeded", finished["error"]
    return finished


def test_a_job_ends_with_a_student_that_answers(stack: Stack, job: dict[str, Any]) -> None:
    events = stack.check_history(job["id"])
    assert [event.type for event in events if event.type.startswith("job.")] == [
        "job.created", "job.started", "job.succeeded",
    ]  # fmt: skip
    assert (job["progress"]["percent"], job["attempt"]) == (100.0, 1)
    student = f"/v1/students/{job['student_id']}"
    graph = stack.http.get(f"{student}/model.onnx").content
    with zipfile.ZipFile(io.BytesIO(few_shot_zip())) as images:
        encoded = images.read("test/class1/5.png")
    session = onnxruntime.InferenceSession(graph)
    pixels = np.asarray(Image.open(io.BytesIO(encoded)))[None]
    expected = session.run(["probabilities"], {"image": pixels})[0][0]
    answer = stack.http.post(
        f"{student}/predict", content=encoded, headers={"Content-Type": "image/png"}
    ).json()
    scores = {entry["label"]: entry["score"] for entry in answer["predictions"]}
    labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
    assert [scores[label] for label in labels] == pytest.approx(expected, abs=1e-5)


def test_the_report_is_honest_about_what_was_measured(stack: Stack, job: dict[str, Any]) -> None:
    report = stack.http.get(f"/v1/students/{job['student_id']}/report").json()
    accuracy = report["student"]["accuracy"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert (report["evaluation"]["kind"], report["evaluation"]["images"]) == ("test", 12)
    assert report["int8"]["accuracy_drop"] is not None
    assert isinstance(report["int8"]["accepted"], bool)
    listed = stack.http.get(f"/v1/students/{job['student_id']}").json()
    assert listed["summary"]["accuracy"] == accuracy["value"]


def test_curves_of_the_training_can_be_read(stack: Stack, job: dict[str, Any]) -> None:
    points = stack.http.get(f"/v1/jobs/{job['id']}/metrics").json()["data"]
    loss = [
        (point["step"], point["value"])
        for point in points
        if (point["stage"], point["name"]) == ("distill", "loss")
    ]
    assert [step for step, _ in loss] == [10, 20, 30]
    assert all(np.isfinite(value) for _, value in loss)


def test_the_same_job_without_the_service_has_the_same_keys_and_numbers(
    stack: Stack, job: dict[str, Any], tmp_path: Path
) -> None:
    blobs = stack.wiring.blobs
    with stack.database.reading() as session:
        rows = session.execute(
            sa.select(JobStage.name, Shard.key, StageOutput.files)
            .join(Shard, Shard.stage_id == JobStage.id)
            .join(StageOutput, StageOutput.key == Shard.key)
            .where(JobStage.job_id == job["id"])
        ).all()
        splits = stack.http.get(f"/v1/datasets/{job['dataset_id']}").json()
    assert splits["id"] == job["dataset_id"]
    images = {}
    for split, digest in _split_digests(stack, job["dataset_id"]).items():
        images[split] = tmp_path / split
        images[split].mkdir()
        blobs.fetch(digest, images[split] / archive.FILE_NAME)
    method = METHODS["kd"]
    params = method.params.model_validate(job["params"])
    torch.set_num_threads(1)  # as in the stack: another order of additions would give other last digits
    run = local.run(
        method, images, "efficientnet_lite0", "conv4", tmp_path / "local", params=params, device="cpu",
        wanted=["trained_student", "teacher_on_test"],
    )  # fmt: skip
    assert {key for step in run.planned for key in step.shard_keys} == {key for _, key, _ in rows}
    for name, artefact in (("distill", "trained_student"), ("examine", "teacher_on_test")):
        (files,) = [files for stage, _, files in rows if stage == name]
        (weights,) = [file for file in files if file.endswith(".safetensors")]
        blobs.fetch(files[weights], tmp_path / f"{name}.safetensors")
        service, alone = (
            load_file(tmp_path / f"{name}.safetensors"),
            load_file(run.folder(artefact) / weights),
        )
        assert service.keys() == alone.keys()
        for tensor in service:
            np.testing.assert_allclose(service[tensor], alone[tensor], rtol=1e-5, atol=1e-6, err_msg=tensor)


def _split_digests(stack: Stack, dataset_id: str) -> dict[str, str]:
    from app.datasets.tables import Dataset

    with stack.database.reading() as session:
        return {
            split: about["digest"] for split, about in session.get_one(Dataset, dataset_id).splits.items()
        }


def test_without_a_test_split_the_student_is_cross_validated_and_says_so(stack: Stack) -> None:
    only_support = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(few_shot_zip(seed=1, shots=3))) as full,
        zipfile.ZipFile(only_support, "w") as out,
    ):
        for name in full.namelist():
            if not name.startswith("test/"):
                out.writestr(name, full.read(name))
    upload = {"archive": ("set.zip", only_support.getvalue(), "application/zip")}
    dataset = stack.http.post("/v1/datasets", files=upload).json()["id"]
    job = stack.finished(stack.submit(dataset, params=QUICK)["id"])
    assert job["status"] == "succeeded", job["error"]
    (folds,) = [stage["shards"] for stage in job["stages"] if stage["name"] == "cross_validate"]
    assert folds == 3
    report = stack.http.get(f"/v1/students/{job['student_id']}/report").json()
    assert report["evaluation"]["kind"] == "cross_validation"
    assert "cross" in report["evaluation"]["explanation"].lower()
