"""The wecolora_features method, from images without labels to an ONNX file that gives features."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from models import local, teachers
from models.data import fewshot
from models.methods import METHODS
from models.students import SHORTENED_VIT, shortened_vit
from models.teachers import TeacherSpec
from tests import tiny_vit

METHOD = METHODS["wecolora_features"]
CLASSES = ("blue", "green", "red")
QUICK = {
    "distillation": {"steps": 30, "batch_size": 8, "views": 3, "lr": 3e-3},
    "evaluation": {"latency_runs": 5, "images": 14},
}


def draw(folder: Path, names: tuple[str, ...], each: int, seed: int) -> None:
    """Noisy colour fields; a class folder each, or all in one where there is one name."""
    random = np.random.default_rng(seed)
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            colour = label if len(names) > 1 else index % 3
            pixels = random.integers(0, 90, (40, 36, 3)) + np.eye(3, dtype=int)[2 - colour] * 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return tiny_vit.write(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def unlabelled_only(spec: TeacherSpec, tmp_path_factory: pytest.TempPathFactory) -> local.LocalRun:
    root = tmp_path_factory.mktemp("images")
    draw(root, ("unlabelled",), 20, seed=0)
    return run(root, spec, tmp_path_factory.mktemp("out"))


def run(images: Path, spec: TeacherSpec, out: Path) -> local.LocalRun:
    params = METHOD.resolve("balanced", QUICK)
    return local.run(METHOD, images, spec, SHORTENED_VIT, out, params=params, device="cpu")


def test_images_without_labels_are_enough(unlabelled_only: local.LocalRun) -> None:
    report = json.loads((unlabelled_only.folder("report") / "report.json").read_text())
    assert (report["task"], report["classes"]) == ("features", [])
    assert (report["evaluation"]["kind"], report["evaluation"]["images"]) == ("learned_from", 14)
    assert report["student"]["accuracy"] is None
    assert report["student"]["width"] == tiny_vit.WIDTH
    assert 0 < report["cosine"]["low"] <= report["cosine"]["value"] < 1
    assert 1.5 < report["compression"]["parameters"] < 2
    assert report["summary"]["cka"] == report["cka"]["value"]


def test_the_onnx_file_gives_the_networks_features(unlabelled_only: local.LocalRun) -> None:
    backbone = shortened_vit.load_backbone(unlabelled_only.folder("backbone"))
    session = onnxruntime.InferenceSession(unlabelled_only.folder("student_onnx") / "model.onnx")
    pixels = fewshot.load(unlabelled_only.folder("unlabelled"), tiny_vit.SIDE).pixels
    (found,) = session.run(None, {"image": pixels.permute(0, 2, 3, 1).numpy()})
    expected = backbone.as_teacher(torch.device("cpu")).embed(pixels.float() / 255)
    assert [output.name for output in session.get_outputs()] == ["features"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_the_reports_cosine_is_that_of_the_two_networks(
    unlabelled_only: local.LocalRun, spec: TeacherSpec
) -> None:
    backbone = shortened_vit.load_backbone(unlabelled_only.folder("backbone"))
    compared = np.linspace(0, 19, 14).round()
    split = fewshot.load(unlabelled_only.folder("unlabelled"), tiny_vit.SIDE)
    pixels = split.pixels[torch.from_numpy(compared).long()].float() / 255
    ours = backbone.as_teacher(torch.device("cpu")).embed(pixels)
    theirs = teachers.load(spec).embed(pixels)
    expected = torch.nn.functional.cosine_similarity(ours, theirs).mean()
    report = json.loads((unlabelled_only.folder("report") / "report.json").read_text())
    assert report["cosine"]["value"] == pytest.approx(float(expected), abs=0.005)


def test_the_bundle_runs_elsewhere(unlabelled_only: local.LocalRun, tmp_path: Path) -> None:
    bundle = unlabelled_only.folder("bundle")
    check = subprocess.run(
        [sys.executable, bundle / "predict.py", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr
    assert "8 of 8 golden images as expected" in check.stdout
    golden = sorted((bundle / "golden").iterdir())
    target = tmp_path / "features.npy"
    command = [sys.executable, bundle / "predict.py", "--out", target, *golden]
    subprocess.run(command, capture_output=True, check=True)
    expected = [row["features"] for row in json.loads((bundle / "golden.json").read_text())["images"]]
    np.testing.assert_allclose(np.load(target), expected, rtol=1e-4, atol=1e-4)
    card = (bundle / "MODEL_CARD.md").read_text()
    assert f"# shortened_vit: {tiny_vit.WIDTH} features" in card
    assert "20 images without labels" in card
    assert json.loads((bundle / "preprocess.json").read_text())["output"]["shape"] == [
        "batch",
        tiny_vit.WIDTH,
    ]


def test_labels_tell_how_often_the_nearest_image_is_of_the_same_class(
    spec: TeacherSpec, tmp_path: Path
) -> None:
    draw(tmp_path / "images", CLASSES, 4, seed=1)
    draw(tmp_path / "images" / "test", CLASSES, 3, seed=2)
    found = run(tmp_path / "images", spec, tmp_path / "out")
    report = json.loads((found.folder("report") / "report.json").read_text())
    assert (report["evaluation"]["kind"], report["evaluation"]["images"]) == ("test", 9)
    accuracy = report["student"]["accuracy"]
    assert accuracy["total"] == 9
    assert accuracy["value"] > 0.6  # colours are told apart by random features, too
    assert "nearest image is of the same class" in (found.folder("bundle") / "MODEL_CARD.md").read_text()
