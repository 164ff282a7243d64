"""The method wecolora_segmentation, from a tiny random vision transformer, images and masks to a class map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from models import local
from models.methods import METHODS
from models.students import SHORTENED_VIT
from models.teachers import TeacherSpec
from tests import rendered_masks, tiny_vit

METHOD = METHODS["wecolora_segmentation"]
QUICK: dict[str, dict[str, Any]] = {
    "distillation": {"steps": 30, "batch_size": 8, "views": 3, "lr": 3e-3, "input_size": 64},
    "evaluation": {"latency_runs": 5},
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return tiny_vit.write(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rendered_masks.write(tmp_path_factory.mktemp("images"))


def made(
    source: Path | dict[str, Path], spec: TeacherSpec, out: Path, *wanted: str, **more: Any
) -> local.LocalRun:
    params = METHOD.resolve("balanced", {**QUICK, **more})
    return local.run(
        METHOD, source, spec, SHORTENED_VIT, out, params=params, device="cpu", wanted=wanted or None
    )


@pytest.fixture(scope="module")
def finished(folder: Path, spec: TeacherSpec, tmp_path_factory: pytest.TempPathFactory) -> local.LocalRun:
    return made(folder, spec, tmp_path_factory.mktemp("out"))


def intersection_over_union(truths: list[np.ndarray], answers: list[np.ndarray]) -> list[float]:
    """Of each class, pixel by pixel, as sets."""
    truth = np.concatenate([each.ravel() for each in truths])
    answer = np.concatenate([each.ravel() for each in answers])[truth != rendered_masks.IGNORED]
    truth = truth[truth != rendered_masks.IGNORED]
    return [
        float(((truth == label) & (answer == label)).sum() / ((truth == label) | (answer == label)).sum())
        for label in range(len(rendered_masks.CLASSES))
    ]


def test_a_job_runs_from_masks_to_a_student_that_knows_the_shapes(
    finished: local.LocalRun, folder: Path
) -> None:
    report = json.loads((finished.folder("report") / "report.json").read_text())
    session = onnxruntime.InferenceSession(finished.folder("student_onnx") / "model.onnx")
    truths, answers = [], []
    for path in sorted((folder / "test" / "images").iterdir()):
        pixels = np.array(Image.open(path))
        logits, classes = session.run(None, {"image": pixels[None]})
        assert logits.shape == (1, 3, *pixels.shape[:2])
        assert (classes.dtype, classes.shape) == (np.uint8, (1, *pixels.shape[:2]))
        np.testing.assert_array_equal(classes, logits.argmax(1))
        truths.append(np.array(Image.open(folder / "test" / "masks" / path.name)))
        answers.append(classes[0])
    expected = intersection_over_union(truths, answers)
    assert [row["iou"] for row in report["per_class"]] == pytest.approx(expected)
    miou = report["student"]["miou"]
    assert miou["value"] == pytest.approx(np.mean(expected))
    assert miou["value"] > 0.6  # all ground: 0.3
    assert miou["low"] < miou["value"] < miou["high"]
    assert report["teacher"]["miou"]["value"] > 0.6
    assert report["evaluation"]["kind"] == "test"
    assert report["data"] == {
        "support": 6, "test": 5, "unlabelled": 4, "shots": {"ground": 6, "disc": 6, "square": 6},
    }  # fmt: skip
