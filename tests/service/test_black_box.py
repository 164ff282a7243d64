"""Black boxes that really answer, through the whole service: jobs are done, and every question is counted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from tests.service.black_boxes import (
    CHANNELS,
    FORMAT,
    MLSERVER,
    ORDER,
    REAL,
    SYNTHETIC,
    PlainServer,
    add_teacher,
    kserve_server,
    plain_server,
    unlabelled_zip,
)
from tests.service.stack import Stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("black_box"))
    try:
        made.start_all()
        yield made
    finally:
        made.stop()


@pytest.fixture
def server() -> Iterator[PlainServer]:
    with plain_server() as started:
        yield started


@pytest.fixture(scope="module")
def dataset(stack: Stack) -> str:
    return stack.upload()


def fewer(images: int) -> dict[str, Any]:
    """An order with so many synthetic images."""
    return {**ORDER, "params": {**ORDER["params"], "synthesis": {"images": images}}}


def test_every_question_to_an_endpoint_is_counted_once_and_a_second_job_asks_none(
    stack: Stack, server: PlainServer, dataset: str
) -> None:
    teacher = add_teacher(stack, f"{server.url}/dram", headers={"Authorization": "Bearer hush-hush"})
    planned = REAL + SYNTHETIC
    order = {**ORDER, "teacher_id": teacher, "student": "conv4", "query_budget": planned}
    job = stack.finished(stack.submit(dataset, **order)["id"])
    assert job["status"] == "succeeded", job["error"]
    assert job["queries"]["planned"] == job["queries"]["budget"] == planned
    assert server.counted == job["queries"]["spent"] <= planned
    assert server.counted > SYNTHETIC  # hardly an image is like another
    assert server.state()["authorization"] == "Bearer hush-hush"
    events = stack.check_history(job["id"])
    figures = [event.data["queries_spent"] for event in events if event.type == "stage.progress"]
    assert figures == sorted(figures)

    before = server.counted
    order["student"] = "test_convnext"
    second = stack.finished(stack.submit(dataset, **order)["id"])
    assert second["status"] == "succeeded", second["error"]
    assert (server.counted, second["queries"]["spent"]) == (before, 0)
    reused = {stage["name"] for stage in second["stages"] if stage["status"] == "reused"}
    assert {"ask_real", "ask_synthetic", "examine"} <= reused

    # Other synthetic images: the stage runs again, the real images are not asked again.
    more = stack.submit(dataset, **order, seed=5)
    third = stack.finished(more["id"])
    assert third["status"] == "succeeded", third["error"]
    assert server.counted - before == third["queries"]["spent"] <= SYNTHETIC
    written = [path for path in stack.home.rglob("*") if path.is_file()]  # database, blobs and logs
    assert any(path.suffix == ".log" for path in written)
    assert [path for path in written if b"hush-hush" in path.read_bytes()] == []
    assert "hush-hush" not in json.dumps([job, second, third])


@pytest.mark.parametrize(
    ("protocol", "path", "format"),
    [
        ("torchserve", "/predictions/colours", FORMAT),
        ("tensorflow_serving", "/v1/models/colours:predict", {**FORMAT, "layout": "NHWC"}),
    ],
)
def test_other_protocols_carry_a_whole_job_and_questions_turned_away_cost_nothing(
    stack: Stack, server: PlainServer, dataset: str, protocol: str, path: str, format: dict[str, Any]
) -> None:
    server.control(busy=3)
    teacher = add_teacher(stack, server.url + path, protocol, input=format)
    submitted = stack.submit(
        dataset, **fewer(20), teacher_id=teacher, student="conv4", query_budget=REAL + 20
    )
    job = stack.finished(submitted["id"])
    assert job["status"] == "succeeded", job["error"]
    assert server.counted == job["queries"]["spent"] <= REAL + 20


def test_a_kserve_server_carries_a_whole_job(stack: Stack, dataset: str, tmp_path: Path) -> None:
    if not (MLSERVER / "bin" / "mlserver").exists() and not os.environ.get("CI"):
        pytest.skip(f"there is no MLServer in {MLSERVER}: `make install` makes it")
    with kserve_server(tmp_path) as url:
        teacher = add_teacher(stack, f"{url}/v2/models/colours/infer", "kserve_v2", input_name="pixels")
        report = stack.http.post(f"/v1/teachers/{teacher}/probe").json()
        assert report["ok"], report["problems"]
        (tmp_path / "counted").unlink()  # the probe's
        order = {**fewer(50), "teacher_id": teacher, "student": "conv4", "query_budget": REAL + 50}
        job = stack.finished(stack.submit(dataset, **order)["id"])
        assert job["status"] == "succeeded", job["error"]
        counted = sum(int(line) for line in (tmp_path / "counted").read_text().split())
    assert counted == job["queries"]["spent"] <= REAL + 50


def test_an_uploaded_file_teaches_from_images_without_labels(stack: Stack) -> None:
    spec = {"kind": "onnx", "title": "Colours", "classes": list(CHANNELS), "input": {"range": "0..1"}}
    answer = stack.http.post(
        "/v1/teachers",
        files={"model": ("colours.onnx", colours(), "application/octet-stream")},
        data={"spec": json.dumps(spec)},
    )
    assert answer.status_code == 201, answer.text
    uploaded = stack.http.post(
        "/v1/datasets", files={"archive": ("set.zip", unlabelled_zip(16), "application/zip")}
    )
    assert uploaded.status_code == 201, uploaded.text
    dataset, teacher = uploaded.json()["id"], answer.json()["id"]

    kd = stack.http.post(
        "/v1/jobs",
        json={"dataset_id": dataset, "teacher_id": "efficientnet_lite0", "student": "conv4", "method": "kd"},
    )
    assert (kd.status_code, kd.json()["code"]) == (422, "dataset_lacks_images")
    job = stack.finished(stack.submit(dataset, **fewer(50), teacher_id=teacher, student="conv4")["id"])
    assert job["status"] == "succeeded", job["error"]
    assert job["queries"]["planned"] == 16 + 50
    assert 50 < job["queries"]["spent"] <= 66
    labels = stack.http.get(f"/v1/students/{job['student_id']}").json()["classes"]
    assert labels == list(CHANNELS)  # the teacher's own


def test_a_teacher_of_the_catalogue_is_a_black_box_too(stack: Stack, dataset: str) -> None:
    order = {**fewer(50), "teacher_id": "efficientnet_lite0", "student": "conv4", "query_budget": REAL + 50}
    job = stack.finished(stack.submit(dataset, **order)["id"], seconds=240)
    assert job["status"] == "succeeded", job["error"]
    assert 50 < job["queries"]["spent"] <= REAL + 50


def colours() -> bytes:
    """float32 [N, 3, 32, 32], 0..1 -> probabilities [N, 3] of the classes of `CHANNELS`."""
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
        helper.make_node("Gather", ["mean", "order"], ["ordered"], axis=1),
        helper.make_node("Mul", ["ordered", "scale"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    channels = list(CHANNELS.values())
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
            helper.make_tensor("order", TensorProto.INT64, [3], channels),
            helper.make_tensor("scale", TensorProto.FLOAT, [], [5.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content
