"""The kd method, stage by stage, on small real trainings: coloured shapes that a student can learn."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models import local, students
from models.methods import METHODS
from models.pipeline import Stage, StageContext
from models.stages import DISTILL
from models.teachers import few_shot_head, labelling

KD = METHODS["kd"]
QUICK = {
    "teacher": {"input_size": 64, "views": 3},
    "distillation": {"steps": 50, "batch_size": 16, "flip": True, "mixup": 0.2},
}
CLASSES = ("blue", "green", "red")


def draw(folder: Path, colour: int, count: int, random: np.random.Generator) -> None:
    """Images of one colour on a noisy ground, in different shapes of frame."""
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = random.integers(0, 110, (40 + index % 3, 48, 3))
        pixels[8:30, 10:36, 2 - colour] += 140
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for colour, name in enumerate(CLASSES):
        draw(root / name, colour, 4, random)
        draw(root / "test" / name, colour, 5, random)
        draw(root / "unlabelled" / name, colour, 6, random)
    return root


def distil(root: Path, out: Path, *wanted: str, **options: object) -> local.LocalRun:
    return local.run(
        "kd",
        root,
        "efficientnet_lite0",
        "conv4",
        out,
        params=KD.resolve("draft", QUICK),
        device="cpu",
        wanted=wanted,
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, local.LocalRun]:
    out = tmp_path_factory.mktemp("out")
    return out, distil(images, out, "trained_student", "teacher_on_test")


def test_one_image_of_each_class_is_enough_where_others_test(images: Path, tmp_path: Path) -> None:
    for split in (tmp_path / "one", tmp_path / "one" / "test"):
        for name in CLASSES:
            (split / name).mkdir(parents=True)
            source = images / name if split.name == "one" else images / "test" / name
            shutil.copy(source / "0.png", split / name)
    run = distil(tmp_path / "one", tmp_path / "out", "report")
    report = json.loads((run.folder("report") / "report.json").read_text())
    assert (report["evaluation"]["kind"], report["evaluation"]["images"]) == ("test", 3)


def accuracy_of(student: students.TrainedStudent, images: Path) -> float:
    """Decoded, squeezed and normalised here by hand, with Pillow."""
    hits = []
    for label, name in enumerate(student.classes):
        for path in sorted((images / "test" / name).iterdir()):
            with Image.open(path) as image:
                small = image.resize((student.input_size,) * 2, Image.Resampling.BILINEAR)
            pixels = (np.asarray(small, np.float32) / 255 - student.mean) / student.std
            with torch.no_grad():
                logits = student.network(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
            hits.append(int(logits.argmax()) == label)
    return float(np.mean(hits))


def test_the_student_learns_the_classes(finished: tuple[Path, local.LocalRun], images: Path) -> None:
    student = students.load(finished[1].folder("trained_student"))
    assert student.classes == CLASSES
    assert accuracy_of(student, images) >= 0.9


def test_the_teacher_is_examined_on_the_test_images(finished: tuple[Path, local.LocalRun]) -> None:
    answers = load_file(finished[1].folder("teacher_on_test") / "probabilities.safetensors")
    assert answers["labels"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert torch.allclose(answers["probabilities"].sum(1), torch.ones(15), atol=1e-5)
    assert float((answers["probabilities"].argmax(1) == answers["labels"]).float().mean()) >= 0.8


def test_every_view_of_every_image_gets_a_soft_label(finished: tuple[Path, local.LocalRun]) -> None:
    folder = finished[1].folder("soft_labels")
    soft = labelling.load(folder)
    assert torch.bincount(soft.image).tolist() == [3] * 12 + [1] * 18
    head = few_shot_head.load(folder)
    answers = load_file(finished[1].folder("teacher_answers") / "answers.safetensors")
    unlabelled = answers["features"][answers["image"] >= 12]
    assert torch.allclose(head.centre, unlabelled.mean(0), atol=1e-5)
    assert torch.allclose(soft.logits, head.logits(answers["features"]))
    assert head.input_size == 64


def test_a_second_student_reuses_the_teacher_s_work(
    finished: tuple[Path, local.LocalRun], images: Path
) -> None:
    out, first = finished
    again = distil(images, out, "trained_student")
    assert set(again.seconds.values()) == {0.0}
    second = local.run(
        "kd",
        images,
        "efficientnet_lite0",
        "test_convnext",
        out,
        params=KD.resolve("draft", QUICK),
        device="cpu",
        wanted=["trained_student"],
    )
    assert {name for name, seconds in second.seconds.items() if seconds == 0} == {"ask", "label"}
    assert second.folder("soft_labels") == first.folder("soft_labels")


def test_a_stage_killed_at_its_checkpoint_goes_on_to_the_same_weights(
    finished: tuple[Path, local.LocalRun], tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    class DiesAfterSaving(local.FolderCheckpoints):
        def due(self) -> bool:
            return True

        def save(self, step: int, write) -> None:  # type: ignore[no-untyped-def]
            super().save(step, write)
            if step == 23:
                raise Killed

    _, done = finished
    stage: Stage = DISTILL
    params = KD.resolve("draft", QUICK).distillation  # type: ignore[attr-defined]
    context = StageContext(
        inputs=done.folders,
        output=tmp_path / "out",
        shape=local.fewshot.shape_of(done.folder("support"), done.folder("unlabelled")),
        seed=0,
        device="cpu",
        report=lambda step, total, **metrics: None,
        checkpoints=DiesAfterSaving(tmp_path / "checkpoints"),
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(Killed):
        stage.run(context, params)
    stage.run(
        dataclasses.replace(context, checkpoints=local.FolderCheckpoints(tmp_path / "checkpoints")), params
    )
    expected = load_file(done.folder("trained_student") / "weights.safetensors")
    resumed = load_file(tmp_path / "out" / "weights.safetensors")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_without_a_test_split_every_labelled_image_is_predicted_once_by_folds(
    images: Path, tmp_path: Path
) -> None:
    splits = local.fewshot.pack_folder(images, tmp_path / "splits")
    support = {"support": splits["support"]}
    run = local.run(
        "kd",
        support,
        "efficientnet_lite0",
        "conv4",
        tmp_path / "out",
        params=KD.resolve("draft", QUICK),
        device="cpu",
        wanted=["cross_validation"],
    )
    folds = [load_file(folder / "predictions.safetensors") for folder in run.folders["cross_validation"]]
    assert len(folds) == 4  # the smallest class has 4 images
    assert sorted(torch.cat([fold["index"] for fold in folds]).tolist()) == list(range(12))
    truth = local.fewshot.read_labels(splits["support"])
    hits = {"student": 0, "teacher": 0}
    for fold in folds:
        assert torch.equal(fold["labels"], truth[fold["index"]])
        for who in hits:
            assert torch.allclose(fold[who].sum(1), torch.ones(len(fold["index"])), atol=1e-5)
            hits[who] += int((fold[who].argmax(1) == fold["labels"]).sum())
    assert hits["student"] >= 9
    assert hits["teacher"] >= 9


def test_a_fold_is_not_told_the_labels_of_the_images_it_holds_back(images: Path, tmp_path: Path) -> None:
    """With labels shuffled at random, an honest cross-validation does no better than chance."""
    splits = local.fewshot.pack_folder(images, tmp_path / "splits")
    index = local.archive.read_index(splits["support"] / "images.zip")
    contents = [content for _, content in local.archive.contents(splits["support"] / "images.zip")]
    turned = [
        dataclasses.replace(image, label=(position + position // 4) % 3)
        for position, image in enumerate(index.images)
    ]
    (tmp_path / "shuffled").mkdir()
    local.archive.write(
        tmp_path / "shuffled" / "images.zip", dataclasses.replace(index, images=tuple(turned)), contents
    )
    run = local.run(
        "kd",
        {"support": tmp_path / "shuffled"},
        "efficientnet_lite0",
        "conv4",
        tmp_path / "out",
        params=KD.resolve("draft", {**QUICK, "distillation": {"steps": 1}}),
        device="cpu",
        wanted=["cross_validation"],
    )
    folds = [load_file(folder / "predictions.safetensors") for folder in run.folders["cross_validation"]]
    hits = sum(int((fold["teacher"].argmax(1) == fold["labels"]).sum()) for fold in folds)
    assert hits <= 7  # of 12; told the labels, the head gets them all
