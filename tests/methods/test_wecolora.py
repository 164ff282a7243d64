"""The wecolora method, from a tiny random vision transformer and images to an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from models import local, students, teachers
from models.data import fewshot, images
from models.errors import TeacherError, TrainingError
from models.generators import GeneratorSpec
from models.methods import METHODS
from models.pipeline import JobShape, StageContext
from models.students import SHORTENED_VIT, block_selection, shortened_vit
from models.students.shortened_vit import Shortening
from models.teachers import TeacherSpec
from models.training import distillation, token_distillation
from models.training.loop import NoCheckpoints
from tests import tiny_diffusion, tiny_vit

WECOLORA = METHODS["wecolora"]
CLASSES = ("blue", "green", "red")
SHOTS = 4
QUICK: dict[str, dict[str, Any]] = {
    "blocks": {"rule": "last_of_group"},
    "teacher": {"views": 2},
    "distillation": {"steps": 30, "batch_size": 8, "views": 3, "lr": 3e-3},
    "student_head": {"views": 2},
    "evaluation": {"latency_runs": 5},
}


def picture(random: np.random.Generator, label: int, side: int) -> Image.Image:
    """A noisy colour field."""
    pixels = random.integers(0, 90, (side, side, 3)) + np.eye(3, dtype=int)[2 - label] * 150
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 labelled and 4 test images of each of 3 classes, and 6 unlabelled ones."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        for index in range(2 * SHOTS):
            place = root / name if index < SHOTS else root / "test" / name
            place.mkdir(parents=True, exist_ok=True)
            picture(random, label, 32 + 8 * (index % 3)).save(place / f"{index}.png")
    (root / "unlabelled").mkdir()
    for index in range(6):
        picture(random, index % 3, 40).save(root / "unlabelled" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TeacherSpec:
    return tiny_vit.write(tmp_path_factory.mktemp("teacher"))


def distil(
    splits: Path | dict[str, Path], spec: TeacherSpec, out: Path, *wanted: str, **changes: dict[str, Any]
) -> local.LocalRun:
    merged = {name: {**QUICK.get(name, {}), **changes.get(name, {})} for name in {*QUICK, *changes}}
    params = WECOLORA.resolve("balanced", merged)
    return local.run(
        WECOLORA, splits, spec, SHORTENED_VIT, out, params=params, device="cpu", wanted=wanted or None
    )


@pytest.fixture(scope="module")
def finished(
    folder: Path, spec: TeacherSpec, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, local.LocalRun]:
    out = tmp_path_factory.mktemp("out")
    return out, distil(folder, spec, out)


def context_of(run: local.LocalRun, counts: dict[str, int]) -> StageContext:
    """As DISTILL_TOKENS is given it."""
    names = [name for name in ("support", "unlabelled", "synthetic") if name in run.folders]
    return StageContext(
        inputs={name: run.folders[name] for name in names},
        output=Path(),
        shape=JobShape(classes=3, smallest_class=4, **{"support": 0, **counts}),
        seed=0,
        device="cpu",
        report=lambda *_, **__: None,
        checkpoints=NoCheckpoints(),
    )


def splits_of(run: local.LocalRun, *names: str) -> dict[str, Path]:
    return {name: run.folder(name) for name in names}


def test_a_job_runs_from_images_to_a_bundle(finished: tuple[Path, local.LocalRun]) -> None:
    run = finished[1]
    assert (run.folder("bundle") / "bundle.zip").is_file()
    report = json.loads((run.folder("report") / "report.json").read_text())
    assert report["student"]["name"] == SHORTENED_VIT
    assert report["evaluation"]["kind"] == "test"
    assert 1.5 < report["compression"]["parameters"] < 2  # half of the blocks, all of the stem
    assert report["student"]["shortened"] == {
        "kept": [1, 3, 5],
        "depth": 6,
        "rule": "last_of_group",
        "start": "copied",
        "adaptation": "enhanced_lora",
        "rank": 8,
        "interpolated_from": None,
    }
    card = (run.folder("bundle") / "MODEL_CARD.md").read_text()
    assert "of its 6 blocks it has 3 (2, 4, 6); it learned to give the tokens" in card
    assert "made of these weights, changed: their licence holds for it" in card
    assert report["student"]["accuracy"]["value"] > 0.6  # colours are told apart by random features, too


def check_that_the_onnx_file_answers_as_the_network(run: local.LocalRun) -> None:
    student = students.load(run.folder("trained_student"))
    session = onnxruntime.InferenceSession(run.folder("student_onnx") / "model.onnx")
    pixels = fewshot.load(run.folder("test"), student.input_size).pixels
    (scores,) = session.run(None, {"image": pixels.permute(0, 2, 3, 1).numpy()})
    with torch.no_grad():
        ready = images.normalise(pixels.float() / 255, student.mean, student.std)
        expected = student.network(ready).softmax(1)
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)


def test_the_onnx_file_answers_as_the_network_does(finished: tuple[Path, local.LocalRun]) -> None:
    run = finished[1]
    student = students.load(run.folder("trained_student"))
    assert (student.input_size, student.mean, student.std) == (tiny_vit.SIDE, tiny_vit.MEAN, tiny_vit.STD)
    check_that_the_onnx_file_answers_as_the_network(run)


def test_training_brings_the_tokens_nearer_to_the_teachers(finished: tuple[Path, local.LocalRun]) -> None:
    history = json.loads((finished[1].folder("backbone") / "history.json").read_text())
    assert history[-1]["loss"] < 0.95 * history[0]["loss"]


def test_all_but_the_adapted_weights_are_the_teachers(
    finished: tuple[Path, local.LocalRun], spec: TeacherSpec
) -> None:
    run = finished[1]
    assert Shortening.load(run.folder("shortened")).kept == (1, 3, 5)
    whole = load_file(Path(spec.source) / "model.safetensors")
    short = load_file(run.folder("backbone") / "weights.safetensors")
    assert {name.split(".")[1] for name in short if name.startswith("blocks.")} == {"0", "1", "2"}
    for name, value in short.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str(2 * int(parts[1]) + 1)
        learnt = parts[0] == "blocks" and value.dim() == 2
        assert torch.equal(value, whole[".".join(parts)]) != learnt, name


def test_another_r_or_head_does_not_ask_the_teacher_again(
    finished: tuple[Path, local.LocalRun], spec: TeacherSpec
) -> None:
    out, run = finished
    splits = splits_of(run, "support", "unlabelled", "test")
    fewer = distil(splits, spec, out, "trained_student", blocks={"r": 3, "rule": "first_of_group"})
    assert (fewer.seconds["ask"], fewer.seconds["label"]) == (0.0, 0.0)
    assert Shortening.load(fewer.folder("shortened")).kept == (0, 3)
    probed = distil(splits, spec, out, "trained_student", student_head={"kind": "linear_probe"})
    assert probed.seconds["distill_tokens"] == 0.0
    networks = [students.load(each.folder("trained_student")).network for each in (run, probed)]
    pixels = fewshot.load(run.folder("support"), tiny_vit.SIDE)
    ready = images.normalise(pixels.pixels.float() / 255, tiny_vit.MEAN, tiny_vit.STD)
    for network in networks:
        assert (network(ready).argmax(1) == pixels.labels).float().mean() > 0.8


@pytest.mark.parametrize(
    ("adaptation", "match", "rule", "start"),
    [
        ("full", "all", "influence", "copied"),
        ("dora", "last", "last_of_group", "copied"),
        ("none", "last", "first_of_group", "refitted"),
    ],
)
def test_every_adaptation_gives_a_plain_network(
    finished: tuple[Path, local.LocalRun],
    spec: TeacherSpec,
    adaptation: str,
    match: str,
    rule: str,
    start: str,
) -> None:
    out, run = finished
    made = distil(
        splits_of(run, "support", "unlabelled", "test"),
        spec,
        out,
        "trained_student",
        blocks={"rule": rule, "images": 5},
        distillation={"adaptation": adaptation, "match": match, "start": start, "steps": 3},
    )
    usual = load_file(run.folder("trained_student") / "weights.safetensors")
    found = load_file(made.folder("trained_student") / "weights.safetensors")
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in usual.items()
    }
    shortening = Shortening.load(made.folder("shortened"))
    assert len(shortening.kept) == 3
    assert len(shortening.changes) == (3 if rule == "influence" else 0)


def test_without_a_test_split_it_is_cross_validated(
    finished: tuple[Path, local.LocalRun], spec: TeacherSpec, tmp_path: Path
) -> None:
    few = {"steps": 2, "batch_size": 4, "views": 1}
    run = distil(splits_of(finished[1], "support"), spec, tmp_path, "report", distillation=few)
    report = json.loads((run.folder("report") / "report.json").read_text())
    assert report["evaluation"]["kind"] == "cross_validation"
    assert (report["evaluation"]["images"], report["evaluation"]["folds"]) == (12, SHOTS)


@pytest.mark.parametrize("name", ["wecolora", "wecolora_features"])
def test_it_learns_from_images_that_a_generator_makes_of_the_classes_names(
    finished: tuple[Path, local.LocalRun], spec: TeacherSpec, tmp_path: Path, name: str
) -> None:
    """They are as large as the generator's, and squeezed to the size of the student's; its features need no names."""
    method = METHODS[name]
    generator = GeneratorSpec(
        name="tiny", title="Random weights", kind="local", source=str(tiny_diffusion.write(tmp_path / "tiny")),
        resolution=tiny_diffusion.SIDE, licence="Apache-2.0", licence_url="https://example.org/licence",
    )  # fmt: skip
    changes: dict[str, dict[str, Any]] = {
        "generation": {"images": 7, "steps": 2},
        "distillation": {**QUICK["distillation"], "steps": 3},
        "evaluation": QUICK["evaluation"],
    }
    splits = splits_of(finished[1], "unlabelled", *(["support", "test"] if name == "wecolora" else []))
    run = local.run(
        method, splits, spec, SHORTENED_VIT, tmp_path / "out", params=method.resolve("draft", changes),
        device="cpu", generator=generator,
    )  # fmt: skip
    made = load_file(run.folder("synthetic") / "images.safetensors")
    assert made["pixels"].shape == (7, 3, tiny_diffusion.SIDE, tiny_diffusion.SIDE)
    assert made["label"].tolist() == ([0, 1, 2] * 2 + [0] if name == "wecolora" else [-1] * 7)
    context = context_of(run, {"unlabelled": 6, "support": 12 if name == "wecolora" else 0})
    pixels = token_distillation.read_pixels(context, tiny_vit.SIDE)
    assert len(pixels) == 7 + 6 + (12 if name == "wecolora" else 0)
    resized = images.resize(made["pixels"].float() / 255, tiny_vit.SIDE)
    assert torch.equal(pixels[-7:], images.to_pixels(resized))
    report = json.loads((run.folder("report") / "report.json").read_text())
    assert (report["generator"]["images"], report["generator"]["kept"]) == (7, 7)
    card = (run.folder("bundle") / "MODEL_CARD.md").read_text()
    origin = "the names of the classes" if name == "wecolora" else "a neutral word"
    assert f"7 images that Random weights, a generator, made of {origin}" in card


def test_images_are_made_as_large_as_the_student_s_are_unless_said_otherwise() -> None:
    for name in ("wecolora", "wecolora_features", "wecolora_segmentation"):
        for given, size in (
            ({}, None),
            ({"distillation": {"input_size": 40}}, 40),
            ({"distillation": {"input_size": 40}, "generation": {"size": 56}}, 56),
        ):
            params: Any = METHODS[name].resolve("draft", given)
            assert params.generation.size == size


def test_without_generated_images_a_job_reads_no_generator() -> None:
    for name in ("wecolora", "wecolora_features", "wecolora_segmentation"):
        assert not METHODS[name].draws(METHODS[name].resolve("best", {}))


def test_a_smaller_student_than_its_teacher_sees_smaller_images(
    finished: tuple[Path, local.LocalRun], spec: TeacherSpec, tmp_path: Path
) -> None:
    run = distil(
        splits_of(finished[1], "support", "test"),
        spec,
        tmp_path,
        "trained_student",
        teacher={"input_size": 48},
        distillation={"input_size": 40, "steps": 2},
    )
    assert students.load(run.folder("trained_student")).input_size == 40
    assert shortened_vit.load_backbone(run.folder("backbone")).interpolated_from == tiny_vit.SIDE


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"blocks": {"r": 7}}, TrainingError, "the teacher has 6 blocks: one of every 7 cannot be kept"),
        ({"blocks": {"most_parameters": 10}}, TrainingError, "at most 10 parameters: with one block it has"),
        (
            {"blocks": {"most_latency": 1e-3}},
            TrainingError,
            "at most 0% of its time: with one block it takes",
        ),
        (
            {"distillation": {"rank": 49}},
            TrainingError,
            "rank 49 is more than the width of teacher 'tiny_vit'",
        ),
        (
            {"distillation": {"input_size": 36}},
            TeacherError,
            "36 pixels do not divide into the teacher's patches",
        ),
    ],
)
def test_what_cannot_be_done_is_said_clearly(
    finished: tuple[Path, local.LocalRun],
    spec: TeacherSpec,
    changes: dict[str, dict[str, Any]],
    error: type[Exception],
    words: str,
) -> None:
    out, run = finished
    with pytest.raises(error, match=words):
        distil(splits_of(run, "support"), spec, out, "backbone", **changes)


def test_of_a_teacher_of_one_block_nothing_can_be_left_out(
    finished: tuple[Path, local.LocalRun], tmp_path: Path
) -> None:
    spec = tiny_vit.write(tmp_path / "teacher", depth=1)
    splits = splits_of(finished[1], "support")
    with pytest.raises(TrainingError, match="the teacher has 1 block: none can be left out"):
        distil(splits, spec, tmp_path, "shortened", blocks={"most_latency": 0.5})


def test_influence_is_measured_on_images_from_all_over_the_job(
    finished: tuple[Path, local.LocalRun],
) -> None:
    context = context_of(finished[1], {"support": 12, "unlabelled": 6})
    whole, _ = distillation.read_images(context, tiny_vit.SIDE)
    some = token_distillation._some_images(context, tiny_vit.SIDE, 5)
    assert torch.equal(some, whole[[0, 4, 8, 12, 17]])
    assert torch.equal(token_distillation._some_images(context, tiny_vit.SIDE, 99), whole)


def test_r_follows_from_a_number_of_parameters(
    finished: tuple[Path, local.LocalRun], spec: TeacherSpec, tmp_path: Path
) -> None:
    splits = splits_of(finished[1], "support")
    teacher = teachers.load(spec)
    depth = tiny_vit.DEPTH
    sizes = {
        r: sum(
            value.numel()
            for value in shortened_vit.shorten(
                teacher.network, block_selection.last_of_group(depth, r)
            ).parameters()
        )
        for r in (2, 3)
    }
    for most, r in ((sizes[2], 2), (sizes[2] - 1, 3)):
        run = distil(splits, spec, tmp_path, "shortened", blocks={"most_parameters": most})
        assert Shortening.load(run.folder("shortened")).kept == block_selection.last_of_group(depth, r)


@pytest.mark.parametrize("most", [0.95, 0.5])
def test_r_follows_from_a_latency_budget(
    finished: tuple[Path, local.LocalRun], spec: TeacherSpec, tmp_path: Path, most: float
) -> None:
    splits = splits_of(finished[1], "support")
    run = distil(splits, spec, tmp_path, "shortened", blocks={"r": 4, "most_latency": most})
    shortening = Shortening.load(run.folder("shortened"))
    *slower, chosen = shortening.timed
    assert [timed["blocks"] for timed in shortening.timed] == [3, 2, 1][: len(shortening.timed)]
    assert len(shortening.kept) == chosen["blocks"]
    assert chosen["share"] <= most
    assert all(timed["share"] > most for timed in slower)
    for timed in shortening.timed:
        assert timed["share"] == pytest.approx(timed["student_ms"] / timed["teacher_ms"])


def test_a_teacher_that_is_no_vision_transformer_is_refused(
    finished: tuple[Path, local.LocalRun], tmp_path: Path
) -> None:
    splits = splits_of(finished[1], "support")
    teacher = teachers.TEACHERS["efficientnet_lite0"]
    assert not WECOLORA.needs <= teacher.offers
    with pytest.raises(TeacherError, match="only a vision transformer can be shortened") as caught:
        distil(splits, teacher, tmp_path, "shortened")
    assert "timm's VisionTransformer" in caught.value.hint


def test_the_image_half_of_a_transformers_clip_is_a_teacher(
    finished: tuple[Path, local.LocalRun], tmp_path: Path
) -> None:
    spec = clip_checkpoint(tmp_path / "clip")
    run = distil(splits_of(finished[1], "support", "test"), spec, tmp_path, distillation={"steps": 3})
    assert Shortening.load(run.folder("shortened")).kept == (1, 3)
    check_that_the_onnx_file_answers_as_the_network(run)
    assert (run.folder("bundle") / "bundle.zip").is_file()


def clip_checkpoint(folder: Path) -> TeacherSpec:
    """A CLIP of both halves with few random weights, as transformers writes it."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "intermediate_size": 48}
    vision = {"hidden_size": 24, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8, **sizes}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 50, **sizes}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    network = transformers.CLIPModel(config)
    network.save_pretrained(folder)
    return TeacherSpec(
        name="tiny_clip", title="Tiny CLIP, random weights", kind="transformers", source=str(folder),
        input_size=32, parameters=sum(value.numel() for value in network.vision_model.parameters()),
        embedding_dim=24, licence="Apache-2.0", licence_url="https://example.org/licence",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["wecolora", "wecolora_features", "wecolora_segmentation"])
def test_a_rank_above_the_teachers_width_is_known_before_the_work(spec: TeacherSpec, name: str) -> None:
    method = METHODS[name]
    for rank, adaptation, fits in (
        (tiny_vit.WIDTH, "enhanced_lora", True),
        (tiny_vit.WIDTH + 1, "enhanced_lora", False),
        (tiny_vit.WIDTH + 1, "full", True),
        (None, "dora", True),
    ):
        params = method.resolve("draft", {"distillation": {"rank": rank, "adaptation": adaptation}})
        assert (method.misfit(params, spec) is None) == fits


def test_the_student_belongs_to_this_method_alone(folder: Path, spec: TeacherSpec, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="this method has no student 'conv4'"):
        local.run(WECOLORA, folder, spec, "conv4", tmp_path)
    with pytest.raises(TrainingError, match=f"there is no student '{SHORTENED_VIT}'"):
        local.run("kd", folder, spec, SHORTENED_VIT, tmp_path)
