"""FS-BBT on small real runs: the teacher is an ONNX file that tells colours apart, built here."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import load_file

from models import local, students
from models.data import fewshot
from models.errors import BudgetSpent, TeacherError
from models.generators import DEFAULT, GeneratorSpec, choice
from models.methods import METHODS
from models.pipeline import JobShape, StageContext, TeacherAccess
from models.teachers import black_box_questions, labelling
from models.teachers.black_box import InputFormat, OnnxTeacher
from models.teachers.ledger import MemoryLedger
from tests import tiny_diffusion

FSBBT = METHODS["fsbbt"]
CLASSES = ("blue", "green", "red")
TEACHERS_ORDER = ("red", "green", "blue", "yellow")  # its outputs; no image is of the last
QUICK: dict[str, Any] = {
    "black_box": {"size": 32},
    "synthesis": {"images": 96},
    "cvae": {"epochs": 2, "batch_size": 16},
    "distillation": {"steps": 60, "batch_size": 32},
}


def draw(folder: Path, colour: int, count: int, random: np.random.Generator) -> None:
    """Images [40, 48] of one colour (0: blue, 1: green, 2: red) on a noisy ground."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = random.integers(0, 110, (40, 48, 3))
        pixels[8:30, 10:36, 2 - colour] += 140
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{colour}-{index}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for colour, name in enumerate(CLASSES):
        draw(root / name, colour, 4, random)
        draw(root / "test" / name, colour, 5, random)
        draw(root / "unlabelled", colour, 12, random)
    return root


@pytest.fixture(scope="module")
def unlabelled(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files = sorted((images / "unlabelled").iterdir())
    folder = tmp_path_factory.mktemp("splits") / "unlabelled"
    return {"unlabelled": fewshot.pack(folder, (), files, [None] * len(files))}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxTeacher, Path]:
    """softmax(20 * mean colour): it knows red, green, blue and, from red and green together, yellow."""
    weight = 20 * np.array([[1, 0, 0, 0.4], [0, 1, 0, 0.4], [0, 0, 1, 0]], np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["mean"]),
            helper.make_node("MatMul", ["mean", "weight"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(weight, "weight")],
    )
    path = tmp_path_factory.mktemp("teacher") / "colours.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    content = path.read_bytes()
    spec = OnnxTeacher(
        name="colours",
        title="Colours",
        classes=TEACHERS_ORDER,
        input=InputFormat(height=32, width=32),
        source=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        parameters=12,
        input_name="image",
        output_name="probabilities",
    )
    return spec, path


def distil(
    images: Path | dict[str, Path],
    teacher: tuple[OnnxTeacher, Path],
    out: Path,
    *wanted: str,
    ledger: MemoryLedger | None = None,
    generator: GeneratorSpec | str = DEFAULT,
    **params: dict[str, Any],
) -> local.LocalRun:
    merged = {name: {**QUICK.get(name, {}), **params.get(name, {})} for name in {*QUICK, *params}}
    return local.run(
        "fsbbt",
        images,
        teacher[0],
        "conv4",
        out,
        params=FSBBT.resolve("draft", merged),
        device="cpu",
        wanted=wanted,
        model=teacher[1],
        access=TeacherAccess(ledger or MemoryLedger()),
        generator=generator,
    )


@pytest.fixture(scope="module")
def finished(
    images: Path, teacher: tuple[OnnxTeacher, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[local.LocalRun, MemoryLedger]:
    ledger = MemoryLedger(budget=12 + 36 + 96 + 15)
    out = tmp_path_factory.mktemp("out")
    return distil(images, teacher, out, "trained_student", "teacher_on_test", ledger=ledger), ledger


def test_the_student_learns_classes_that_the_teacher_has_in_another_order(
    finished: tuple[local.LocalRun, MemoryLedger], images: Path
) -> None:
    student = students.load(finished[0].folder("trained_student"))
    assert student.classes == CLASSES
    hits = []
    for label, name in enumerate(student.classes):
        for path in sorted((images / "test" / name).iterdir()):
            with Image.open(path) as image:
                small = image.resize((32, 32), Image.Resampling.BILINEAR)
            pixels = (np.asarray(small, np.float32) / 255 - student.mean) / student.std
            with torch.no_grad():
                logits = student.network(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
            hits.append(int(logits.argmax()) == label)
    assert np.mean(hits) >= 0.9


def test_the_teacher_is_examined_over_the_student_s_classes(
    finished: tuple[local.LocalRun, MemoryLedger],
) -> None:
    answers = load_file(finished[0].folder("teacher_on_test") / "probabilities.safetensors")
    assert answers["labels"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert answers["probabilities"].shape == (15, 3)
    assert torch.allclose(answers["probabilities"].sum(1), torch.ones(15), atol=1e-5)
    assert (answers["probabilities"].argmax(1) == answers["labels"]).all()


def test_as_many_questions_are_spent_as_the_method_foretells(
    finished: tuple[local.LocalRun, MemoryLedger],
) -> None:
    assert FSBBT.queries is not None
    shape = JobShape(classes=3, support=12, smallest_class=4, unlabelled=36, test=15)
    foretold = FSBBT.queries(shape, FSBBT.resolve("draft", QUICK))
    assert finished[1].spent == foretold == 159


def test_a_second_job_asks_nothing_that_was_answered(
    finished: tuple[local.LocalRun, MemoryLedger],
    images: Path,
    teacher: tuple[OnnxTeacher, Path],
    tmp_path: Path,
) -> None:
    run, ledger = finished
    again = distil(images, teacher, tmp_path, "soft_labels", "teacher_on_test", ledger=ledger)
    assert ledger.spent == 159
    soft, first = (labelling.load(each.folder("soft_labels")) for each in (again, run))
    assert torch.equal(soft.logits, first.logits)


def test_the_soft_labels_are_the_teacher_s_answers_to_the_images_as_they_are(
    finished: tuple[local.LocalRun, MemoryLedger],
) -> None:
    """The teacher's rule, computed here by hand from the synthetic pixels."""
    run = finished[0]
    soft = labelling.load(run.folder("soft_labels"))
    assert soft.image.tolist() == list(range(48 + 96))
    pixels = load_file(run.folder("synthetic") / "images.safetensors")["pixels"]
    mean = pixels.double().mean((2, 3)) / 255
    red, green, blue = mean.unbind(1)
    wanted = (20 * torch.stack([blue, green, red], 1)).softmax(1)
    assert torch.allclose(soft.logits[48:].softmax(1).double(), wanted, atol=1e-4)


def test_a_budget_that_is_too_small_ends_the_job_and_keeps_what_was_answered(
    images: Path, teacher: tuple[OnnxTeacher, Path], tmp_path: Path
) -> None:
    ledger = MemoryLedger(budget=50)
    with pytest.raises(BudgetSpent):
        distil(images, teacher, tmp_path, "soft_labels", ledger=ledger, synthesis={"maker": "mixup"})
    assert ledger.spent == len(ledger.answers) == 48


def test_images_without_any_label_are_enough(
    unlabelled: dict[str, Path], teacher: tuple[OnnxTeacher, Path], tmp_path: Path
) -> None:
    run = distil(
        unlabelled,
        teacher,
        tmp_path,
        "bundle",
        synthesis={"maker": "mixup"},
        distillation={"steps": 5},
    )
    assert (run.folder("bundle") / "model.onnx").is_file()
    assert students.load(run.folder("trained_student")).classes == TEACHERS_ORDER
    held_out = load_file(run.folder("teacher_on_held_out") / "answers.safetensors")
    assert held_out["labels"].tolist() == [-1] * 10
    assert held_out["probabilities"].shape == (10, 4)


def test_without_a_test_split_nothing_learns_from_what_is_held_out_and_every_class_keeps_an_image(
    images: Path, teacher: tuple[OnnxTeacher, Path], tmp_path: Path
) -> None:
    support = fewshot.pack_folder(images, tmp_path / "splits")["support"]
    run = distil(
        {"support": support},
        teacher,
        tmp_path,
        "soft_labels",
        "teacher_on_held_out",
        synthesis={"maker": "mixup"},
    )
    held_out = load_file(run.folder("teacher_on_held_out") / "answers.safetensors")
    labels = fewshot.read_labels(support)
    assert len(held_out["index"]) == 6
    assert torch.equal(held_out["labels"], labels[held_out["index"]])
    assert (held_out["probabilities"].argmax(1) == held_out["labels"]).all()
    learnt = labelling.load(run.folder("soft_labels")).image
    real = learnt[learnt < 12]
    assert sorted([*real.tolist(), *held_out["index"].tolist()]) == list(range(12))
    assert set(labels[real].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("maker", ["mixup", "cutmix", "mixup_cutmix", "cvae", "mixup_cvae"])
def test_every_maker_makes_its_kinds_of_images_and_none_of_held_out_ones(
    maker: str, unlabelled: dict[str, Path], teacher: tuple[OnnxTeacher, Path], tmp_path: Path
) -> None:
    run = distil(
        unlabelled, teacher, tmp_path, "synthetic", black_box={"size": 28}, synthesis={"maker": maker}
    )
    made = load_file(run.folder("synthetic") / "images.safetensors")
    assert made["pixels"].shape == (96, 3, 28, 28)
    assert made["pixels"].dtype == torch.uint8
    kinds = Counter(made["kind"].tolist())
    wanted = {"mixup": {0}, "cutmix": {1}, "mixup_cutmix": {0, 1}, "cvae": {2}, "mixup_cvae": {0, 2}}
    assert set(kinds) == wanted[maker]
    mixes = made["kind"] != 2
    parents = torch.cat([made["first"][mixes], made["second"][mixes]])
    held_out = black_box_questions.read(run.folder("black_box")).held_out
    assert len(held_out) == 10
    assert not set(parents.tolist()) & set(held_out)
    assert (made["first"][mixes] != made["second"][mixes]).all()
    assert ((made["share"][mixes] > 0.05) & (made["share"][mixes] < 0.95)).all()


def test_of_a_larger_pool_only_as_many_are_asked_about_as_may_be(
    images: Path, teacher: tuple[OnnxTeacher, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "STEPS", 20)
    ledger = MemoryLedger()
    run = distil(
        images,
        teacher,
        tmp_path,
        "trained_student",
        ledger=ledger,
        synthesis={"maker": "cutmix", "images": 20, "pool": 2.5},
        distillation={"steps": 2},
    )
    chosen = load_file(run.folder("chosen") / "chosen.safetensors")["index"]
    assert len(chosen) == 20
    assert ledger.spent == 12 + 36 + 20
    soft = labelling.load(run.folder("soft_labels"))
    assert soft.image[48:].tolist() == (48 + chosen).tolist()
    pixels = load_file(run.folder("synthetic") / "images.safetensors")["pixels"]
    assert len(pixels) == 50
    blue_green_red = pixels[chosen].double().mean((2, 3)).flip(1) / 255
    assert torch.allclose(soft.logits[48:].softmax(1).double(), (20 * blue_green_red).softmax(1), atol=1e-4)


@pytest.mark.parametrize("size", [28, 48])
def test_a_cvae_killed_at_its_checkpoint_goes_on_to_the_same_weights(
    size: int, unlabelled: dict[str, Path], teacher: tuple[OnnxTeacher, Path], tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    class DiesAfterSaving(local.FolderCheckpoints):
        def due(self) -> bool:
            return True

        def save(self, step: int, write: Any) -> None:
            super().save(step, write)
            if step == 2:
                raise Killed

    choices = {
        "black_box": {"size": size},
        "synthesis": {"maker": "mixup_cvae"},
        "cvae": {"epochs": 4, "batch_size": 16},
    }
    done = distil(unlabelled, teacher, tmp_path, "cvae", **choices)
    stage = FSBBT.stage("train_cvae")
    params = FSBBT.resolve("draft", choices).cvae  # type: ignore[attr-defined]
    context = StageContext(
        inputs=done.folders,
        output=tmp_path / "again",
        shape=fewshot.shape_of(None, done.folder("unlabelled")),
        seed=0,
        device="cpu",
        report=lambda step, total, **metrics: None,
        checkpoints=DiesAfterSaving(tmp_path / "checkpoints"),
    )
    context.output.mkdir()
    with pytest.raises(Killed):
        stage.run(context, params)
    stage.run(context, params)
    weights, unbroken = (
        load_file(folder / "weights.safetensors") for folder in (context.output, done.folder("cvae"))
    )
    assert all(torch.equal(weights[name], unbroken[name]) for name in unbroken)


def test_a_class_that_the_teacher_does_not_know_is_named(
    images: Path, teacher: tuple[OnnxTeacher, Path], tmp_path: Path
) -> None:
    spec = teacher[0].model_copy(update={"classes": ("red", "green", "sky", "sun")})
    with pytest.raises(TeacherError, match="classes 'blue'; it knows 'red', 'green', 'sky', 'sun'"):
        distil(images, (spec, teacher[1]), tmp_path, "black_box")


def test_a_catalogue_teacher_serves_as_a_black_box(images: Path, tmp_path: Path) -> None:
    ledger = MemoryLedger()
    run = local.run(
        "fsbbt",
        {name: fewshot.pack_folder(images, tmp_path / "splits")[name] for name in ("support", "test")},
        "efficientnet_lite0",
        "conv4",
        tmp_path,
        params=FSBBT.resolve("draft", {**QUICK, "synthesis": {"images": 6, "maker": "mixup"}}),
        device="cpu",
        wanted=["soft_labels", "teacher_on_test"],
        access=TeacherAccess(ledger),
    )
    answers = load_file(run.folder("teacher_on_test") / "probabilities.safetensors")
    assert float((answers["probabilities"].argmax(1) == answers["labels"]).float().mean()) >= 0.8
    assert ledger.spent == 12 + 6 + 15


def test_a_catalogue_teacher_without_labelled_images_is_refused(
    unlabelled: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match="no classes of its own"):
        local.run("fsbbt", unlabelled, "efficientnet_lite0", "conv4", tmp_path, wanted=["black_box"])


def test_a_diffusion_model_draws_the_teacher_s_classes_and_the_card_says_so(
    unlabelled: dict[str, Path], teacher: tuple[OnnxTeacher, Path], tmp_path: Path
) -> None:
    """Its tokenizer knows red, green and blue, and no yellow."""
    generator = GeneratorSpec(
        name="tiny", title="Random weights", kind="local", source=str(tiny_diffusion.write(tmp_path / "tiny")),
        resolution=tiny_diffusion.SIDE, licence="Apache-2.0", licence_url="https://example.org/licence",
    )  # fmt: skip
    synthesis = {"maker": "diffusion", "images": 10, "drawing": {"steps": 2}}
    quick: dict[str, Any] = {"distillation": {"steps": 5}, "evaluation": {"latency_runs": 5}}
    run = distil(
        unlabelled, teacher, tmp_path / "out", "bundle", generator=generator, synthesis=synthesis, **quick
    )
    made = load_file(run.folder("synthetic") / "images.safetensors")
    assert made["label"].tolist() == [0, 1, 2, -1] * 2 + [0, 1]
    assert made["pixels"].shape == (10, 3, 32, 32)
    soft = labelling.load(run.folder("soft_labels"))
    assert torch.bincount(soft.image)[36:].tolist() == [1] * 10
    card = (run.folder("bundle") / "MODEL_CARD.md").read_text()
    assert "10 images that Random weights, a generator, made of the names of the classes" in card
    assert "generator's weights (local): Apache-2.0" in card
