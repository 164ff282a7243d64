"""The method wecolora_segmentation, from a tiny random vision transformer, images and masks to a class map."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models import local
from models.data import class_names, fewshot
from models.errors import DataError
from models.generators import GeneratorSpec
from models.methods import METHODS
from models.students import SHORTENED_VIT
from models.teachers import TeacherSpec
from models.training import token_distillation
from tests import rendered_masks, tiny_diffusion, tiny_vit

METHOD = METHODS["wecolora_segmentation"]
QUICK: dict[str, dict[str, Any]] = {
    "blocks": {"rule": "last_of_group"},
    "distillation": {"steps": 30, "batch_size": 8, "views": 3, "lr": 3e-3, "input_size": 64},
    "evaluation": {"latency_runs": 5},
}
GENERATION = {"images": 5, "steps": 2}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return tiny_vit.write(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> GeneratorSpec:
    source = tiny_diffusion.write(tmp_path_factory.mktemp("generator"))
    return GeneratorSpec(
        name="tiny", title="Random weights", kind="local", source=str(source),
        resolution=tiny_diffusion.SIDE, licence="Apache-2.0", licence_url="https://example.org/licence",
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rendered_masks.write(tmp_path_factory.mktemp("images"))


def made(
    source: Path | dict[str, Path],
    spec: TeacherSpec,
    out: Path,
    *wanted: str,
    generator: GeneratorSpec | str = "",
    **more: Any,
) -> local.LocalRun:
    params = METHOD.resolve("balanced", {**QUICK, **more})
    return local.run(
        METHOD, source, spec, SHORTENED_VIT, out, params=params, device="cpu", wanted=wanted or None,
        generator=generator,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(
    folder: Path, spec: TeacherSpec, generator: GeneratorSpec, tmp_path_factory: pytest.TempPathFactory
) -> local.LocalRun:
    return made(folder, spec, tmp_path_factory.mktemp("out"), generator=generator, generation=GENERATION)


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


def test_the_bundle_has_what_a_classifier_s_has(finished: local.LocalRun) -> None:
    with zipfile.ZipFile(finished.folder("bundle") / "bundle.zip") as packed:
        names = set(packed.namelist())
        card = packed.read("MODEL_CARD.md").decode()
        golden = json.loads(packed.read("golden.json"))
        outputs = json.loads(packed.read("preprocess.json"))["outputs"]
    assert names >= {
        "MODEL_CARD.md", "SHA256SUMS", "golden.json", "golden/00.png", "golden/00.classes.png", "labels.json",
        "manifest.json", "model.onnx", "predict.py", "preprocess.json", "report.json",
    }  # fmt: skip
    assert len(golden["images"]) == 6
    assert [output["name"] for output in outputs] == ["logits", "classes"]
    for words in (
        "mean intersection over union",
        "| disc | 5 |",
        "made of these weights, changed",
        "2, 4, 6",
    ):
        assert words in card


def test_blocks_and_tokens_are_those_of_wecolora(
    finished: local.LocalRun, spec: TeacherSpec, generator: GeneratorSpec
) -> None:
    """So that both methods share what they have in common."""
    keys = {step.stage.name: step.key for step in finished.planned}
    method = METHODS["wecolora"]
    params = method.resolve(
        "balanced", {**{name: QUICK[name] for name in ("blocks", "distillation")}, "generation": GENERATION}
    )
    documents = {
        name: each.model_dump(mode="json") for name, each in (("teacher", spec), ("generator", generator))
    }
    sources = local.source_digests(
        {name: finished.folder(name) for name in ("support", "unlabelled", "test")},
        {**documents, "student": {"name": SHORTENED_VIT}},
    )
    other = method.plan(fewshot.shape_of(finished.folder("support")), sources, params, seed=0)
    shared = {step.stage.name for step in other if keys.get(step.stage.name) == step.key}
    assert shared == {"shorten", "draw", "distill_tokens"}


def test_without_test_masks_it_is_cross_validated(
    finished: local.LocalRun, spec: TeacherSpec, tmp_path: Path
) -> None:
    few = {"distillation": {"steps": 2, "batch_size": 4, "views": 1, "input_size": 64}}
    run = made({"support": finished.folder("support")}, spec, tmp_path, "report", **few)
    report = json.loads((run.folder("report") / "report.json").read_text())
    assert (report["evaluation"]["kind"], report["evaluation"]["folds"]) == ("cross_validation", 5)
    assert (report["student"]["miou"]["images"], len(report["worst_images"])) == (6, 6)
    assert report["student"]["miou"]["value"] > 0.5
    assert [image["miou"] for image in report["worst_images"]] == sorted(
        image["miou"] for image in report["worst_images"]
    )


def test_tokens_are_learnt_of_images_that_a_generator_makes_of_the_masks_classes_too(
    spec: TeacherSpec, generator: GeneratorSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the students of a cross-validation. A name that the generator's tokenizer does not know is no label."""
    root = rendered_masks.write(tmp_path / "images", support=4, test=0, unlabelled=2)
    (root / class_names.FILE_NAME).write_text("ground\nred\nblue\n")
    learnt_from: list[int] = []
    train = token_distillation.train

    def counting(teacher: Any, shortening: Any, pixels: torch.Tensor, *rest: Any) -> Any:
        learnt_from.append(len(pixels))
        return train(teacher, shortening, pixels, *rest)

    monkeypatch.setattr(token_distillation, "train", counting)
    few = {"steps": 2, "batch_size": 4, "views": 1}
    run = made(
        root, spec, tmp_path / "out", "cross_validation", generator=generator, generation=GENERATION,
        distillation=few,
    )  # fmt: skip
    assert load_file(run.folder("synthetic") / "images.safetensors")["label"].tolist() == [-1, 1, 2, -1, 1]
    assert learnt_from == [4 + 2 + 5, *[3 + 2 + 5] * 4]


def test_the_report_and_the_card_name_the_generator(finished: local.LocalRun) -> None:
    report = json.loads((finished.folder("report") / "report.json").read_text())
    assert (report["generator"]["images"], report["generator"]["kept"]) == (5, 5)
    card = (finished.folder("bundle") / "MODEL_CARD.md").read_text()
    assert "5 images that Random weights, a generator, made of the names of the classes" in card


def test_masks_and_methods_that_do_not_go_together_are_refused(
    finished: local.LocalRun, spec: TeacherSpec, tmp_path: Path
) -> None:
    splits = {"support": finished.folder("support")}
    with pytest.raises(
        DataError, match="'wecolora' is for classification, and these images have masks"
    ) as caught:
        local.run("wecolora", splits, spec, SHORTENED_VIT, tmp_path)
    assert "wecolora_segmentation" in caught.value.hint
    unlabelled = {"support": finished.folder("unlabelled")}
    with pytest.raises(DataError, match="these images have no masks"):
        local.run(METHOD, unlabelled, spec, SHORTENED_VIT, tmp_path)


def test_one_image_with_a_mask_is_enough_where_others_test(spec: TeacherSpec, tmp_path: Path) -> None:
    root = rendered_masks.write(tmp_path / "one", support=1, test=2, unlabelled=0)
    few = {"distillation": {"steps": 2, "batch_size": 4, "views": 1}}
    run = made(root, spec, tmp_path / "out", "report", **few)
    report = json.loads((run.folder("report") / "report.json").read_text())
    assert (report["evaluation"]["kind"], report["evaluation"]["images"]) == ("test", 2)


def test_one_image_cannot_be_cross_validated(spec: TeacherSpec, tmp_path: Path) -> None:
    root = rendered_masks.write(tmp_path / "one", support=1, test=0, unlabelled=2)
    few = {"distillation": {"steps": 2, "batch_size": 4, "views": 1}}
    with pytest.raises(DataError, match="cross-validation needs 2 images with masks") as caught:
        made(root, spec, tmp_path / "out", "cross_validation", **few)
    assert "test split" in caught.value.hint
