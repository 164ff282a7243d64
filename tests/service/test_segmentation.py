"""The method wecolora_segmentation through a whole service: from rendered masks to a bundle that makes class maps."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from app.client import Dram
from models.students import SHORTENED_VIT
from tests import rendered_masks, tiny_vit
from tests.service.stack import Stack

ORDER: dict[str, Any] = {
    "method": "wecolora_segmentation",
    "teacher_id": "tiny_vit",
    "student": SHORTENED_VIT,
    "params": {
        "distillation": {"steps": 30, "batch_size": 8, "views": 3, "lr": 3e-3, "input_size": 64},
        "evaluation": {"latency_runs": 5},
    },
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("segmentation")
    spec = tiny_vit.write(root / "vit")
    fields = spec.model_dump(mode="json", exclude={"revision", "offers", "resident_mib"})
    lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    (root / "teachers.toml").write_text("\n".join(["[[teacher]]", *lines]))
    made = Stack(root / "home", DRAM_TEACHERS_FILE=str(root / "teachers.toml"))
    try:
        made.start_all()
        yield made
    finally:
        made.stop()


def upload(stack: Stack, members: dict[str, bytes]) -> str:
    files = {"archive": ("set.zip", rendered_masks.zipped(members), "application/zip")}
    answer = stack.http.post("/v1/datasets", files=files)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.fixture(scope="module")
def scenes() -> dict[str, bytes]:
    return dict(rendered_masks.files())


@pytest.fixture(scope="module")
def dataset(stack: Stack, scenes: dict[str, bytes]) -> str:
    return upload(stack, scenes)


@pytest.fixture(scope="module")
def job(stack: Stack, dataset: str) -> dict[str, Any]:
    finished = stack.finished(stack.submit(dataset, **ORDER)["id"], seconds=300)
    assert finished["status"] == "succeeded", finished["error"]
    return finished


@pytest.fixture(scope="module")
def bundle(stack: Stack, job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = stack.http.get(f"/v1/students/{job['student_id']}/bundle.zip").content
    folder = tmp_path_factory.mktemp("bundle")
    zipfile.ZipFile(io.BytesIO(content)).extractall(folder)
    return folder


def values_of(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)))


def mean_iou(session: onnxruntime.InferenceSession, scenes: dict[str, bytes]) -> float:
    """Over the test images, with pixels of each class as sets."""
    sets: dict[int, list[int]] = {label: [0, 0] for label in range(len(rendered_masks.CLASSES))}
    for name, content in scenes.items():
        if name.startswith("test/images/"):
            truth = values_of(scenes[name.replace("images", "masks")])
            answer = session.run(["classes"], {"image": values_of(content)[None]})[0][0]
            known = truth != rendered_masks.IGNORED
            for label, counts in sets.items():
                counts[0] += int((known & (truth == label) & (answer == label)).sum())
                counts[1] += int((known & ((truth == label) | (answer == label))).sum())
    return float(np.mean([both / either for both, either in sets.values()]))


def test_masks_become_a_student_that_maps_classes_as_well_as_its_report_says(
    stack: Stack, job: dict[str, Any], bundle: Path, scenes: dict[str, bytes]
) -> None:
    stack.check_history(job["id"])
    found = mean_iou(onnxruntime.InferenceSession(bundle / "model.onnx"), scenes)
    report = stack.http.get(f"/v1/students/{job['student_id']}/report").json()
    assert report == json.loads((bundle / "report.json").read_text())
    assert report["student"]["miou"]["value"] == pytest.approx(found)
    assert found > 0.6  # the most frequent class everywhere: 0.3
    student = stack.http.get(f"/v1/students/{job['student_id']}").json()
    assert student["summary"]["miou"] == report["student"]["miou"]["value"]
    assert student["classes"] == list(rendered_masks.CLASSES)


def test_the_bundle_makes_the_same_class_maps_elsewhere(
    bundle: Path, scenes: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "scene.png").write_bytes(scenes["test/images/0.png"])
    command = [sys.executable, "-P", str(bundle / "predict.py"), "--check", str(tmp_path / "scene.png")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "6 of 6 golden images as expected" in ran.stdout
    made = Image.open(tmp_path / "scene.png.classes.png")
    (expected,) = onnxruntime.InferenceSession(bundle / "model.onnx").run(
        ["classes"], {"image": values_of(scenes["test/images/0.png"])[None]}
    )
    assert made.mode == "P"
    np.testing.assert_array_equal(np.array(made), expected[0])


def test_the_service_makes_class_maps_too(
    stack: Stack, job: dict[str, Any], bundle: Path, scenes: dict[str, bytes]
) -> None:
    content = scenes["test/images/0.png"]
    made = stack.http.post(f"/v1/students/{job['student_id']}/class-map", content=content)
    assert (made.status_code, made.headers["content-type"]) == (200, "image/png")
    session = onnxruntime.InferenceSession(bundle / "model.onnx")
    (expected,) = session.run(["classes"], {"image": values_of(content)[None]})
    np.testing.assert_array_equal(values_of(made.content), expected[0])
    with Dram(str(stack.http.base_url), stack.http.headers["authorization"].removeprefix("Bearer ")) as dram:
        assert dram.students.class_map(job["student_id"], content) == made.content
    empty = stack.http.post(f"/v1/students/{job['student_id']}/class-map", content=b"")
    assert empty.status_code == 422


def test_a_student_of_class_maps_gives_no_scores(
    stack: Stack, job: dict[str, Any], scenes: dict[str, bytes]
) -> None:
    answer = stack.http.post(
        f"/v1/students/{job['student_id']}/predict", content=scenes["test/images/0.png"],
        headers={"Content-Type": "image/png"},
    )  # fmt: skip
    assert (answer.status_code, answer.json()["code"]) == (409, "student_answers_otherwise")


def test_without_test_masks_it_is_cross_validated(stack: Stack, scenes: dict[str, bytes]) -> None:
    few = {name: content for name, content in scenes.items() if not name.startswith(("test/", "unlabelled/"))}
    order = {
        **ORDER,
        "params": {**ORDER["params"], "distillation": {"steps": 3, "batch_size": 4, "input_size": 64}},
    }
    ended = stack.finished(stack.submit(upload(stack, few), **order)["id"], seconds=300)
    assert ended["status"] == "succeeded", ended["error"]
    report = stack.http.get(f"/v1/students/{ended['student_id']}/report").json()
    assert (report["evaluation"]["kind"], report["evaluation"]["folds"], report["evaluation"]["images"]) == (
        "cross_validation", 5, 6,
    )  # fmt: skip
    assert report["student"]["miou"]["value"] > 0.5
    assert "stretched" in report["student"]["miou"]["interval"]


@pytest.mark.parametrize(
    ("masked", "changes", "code", "words"),
    [
        (
            True,
            {"method": "kd", "student": "conv4", "params": {}},
            "method_for_another_task",
            "wecolora_segmentation",
        ),
        (True, {"method": "wecolora", "params": {}}, "method_for_another_task", "makes no use of masks"),
        (False, {}, "method_for_another_task", "Upload images/ with masks/, or choose another method: 'kd'"),
        (True, {"precision": "int8"}, "method_lacks_precision", "makes no int8 file"),
        (True, {"teacher_id": "efficientnet_lite0"}, "teacher_offers_too_little", "tokens"),
    ],
    ids=["kd for masks", "wecolora for masks", "masks missing", "int8", "no vision transformer"],
)
def test_what_does_not_go_together_is_refused_when_ordered(
    stack: Stack, dataset: str, masked: bool, changes: dict[str, Any], code: str, words: str
) -> None:
    images = dataset if masked else stack.upload()
    order = {"teacher_id": "tiny_vit", "preset": "draft", **ORDER, **changes, "dataset_id": images}
    answer = stack.http.post("/v1/jobs", json=order)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert words in answer.json()["detail"]
