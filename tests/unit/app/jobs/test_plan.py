"""The keys that the service plans with are those of a run without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from app.jobs import plan
from app.storage import digest_of
from models import local
from models.data import archive, fewshot
from models.methods import METHODS
from models.pipeline import digest
from models.teachers import TEACHERS, AnyTeacher
from models.teachers.black_box import HttpTeacher, InputFormat, OnnxTeacher

BLACK_BOX = {"name": "tch_1", "title": "Mine", "classes": ("a", "b"), "input": InputFormat(height=8, width=8)}
SPECS: list[AnyTeacher] = [
    TEACHERS["efficientnet_lite0"],
    HttpTeacher(source="https://example.org/", **BLACK_BOX),  # type: ignore[arg-type]
    OnnxTeacher(source="f" * 64, bytes=1, parameters=1, input_name="x", output_name="y", **BLACK_BOX),  # type: ignore[arg-type]
]


@pytest.fixture
def splits(tmp_path: Path) -> dict[str, Path]:
    for name in ("a", "b", "unlabelled"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            colour = (number * 90, len(name) * 20, 7)
            Image.new("RGB", (8, 8), colour).save(tmp_path / "images" / name / f"{number}.png")
    return fewshot.pack_folder(tmp_path / "images", tmp_path / "splits")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_the_service_and_a_local_run_plan_the_same_keys(spec: AnyTeacher, splits: dict[str, Path]) -> None:
    """Also for a teacher with a model beside it: its document names the model."""
    method = METHODS["fsbbt"]
    params = method.resolve("draft", {})
    shape = fewshot.shape_of(splits["support"], splits["unlabelled"])
    sources = {
        name: {"files": {archive.FILE_NAME: digest_of(path / archive.FILE_NAME)}}
        for name, path in splits.items()
    }
    beside = {"model.onnx": spec.source} if spec.kind == "onnx" else {}
    teacher = {plan.TEACHER_FILE: digest(spec.model_dump(mode="json"))}
    sources |= {
        "teacher": {"files": {**beside, **teacher}},
        "student": {"files": {"student.json": digest({"name": "conv4"})}},
    }
    planned = plan.stages(method, shape, sources, params, 3)
    documents = {"teacher": spec.model_dump(mode="json"), "student": {"name": "conv4"}}
    alone = method.plan(shape, local.source_digests(splits, documents), params, 3)
    assert [entry.shard_keys for entry in planned] == [entry.shard_keys for entry in alone]


def test_the_shape_of_a_data_set_without_labels_is_that_of_its_images(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    folder = fewshot.pack(tmp_path / "unlabelled", [], [tmp_path / "0.png"], [None])
    assert plan.shape_of(0, 0, {"unlabelled": {"images": 1}}) == fewshot.shape_of(None, folder)
