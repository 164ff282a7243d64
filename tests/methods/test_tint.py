"""The tint method, stage by stage, with a tiny random generator: its images are noise, its books are kept well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models import generators, local, students
from models.data import fewshot
from models.generators import GeneratorSpec, Kind, generation, shards, textual_inversion
from models.methods import METHODS
from models.methods.tint import CHUNK, SelectionParams, Verdict
from models.teachers import few_shot_head, labelling, questions
from models.training import selection
from tests import tiny_diffusion

TINT = METHODS["tint"]
CLASSES = ("blue", "green", "red")
SHOTS, MADE = 4, 6
#: The sampler that undoes an inversion.
EXACT: dict[str, Any] = {"sampler": "ddim", "steps": None}
QUICK: dict[str, dict[str, Any]] = {
    "textual_inversion": {"steps": 3, "batch_size": 2},
    "null_text_inversion": {"mode": "null_text", "steps": 3, "inner_steps": 2},
    "generation": {"images_per_class": MADE, "batch_size": 4, "size": 32},
    "teacher": {"input_size": 64, "views": 2},
    "selection": {"least_probability": 0.0},
    "distillation": {"steps": 20, "batch_size": 8, "input_size": 32},
    "evaluation": {"latency_runs": 5},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy colour fields of several sizes: 4 labelled and 2 test images of each of 3 classes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        for index in range(SHOTS + 2):
            side = 40 + 8 * index
            pixels = random.integers(0, 90, (side, side, 3)) + np.eye(3, dtype=int)[2 - label] * 150
            folder = root / name if index < SHOTS else root / "test" / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> GeneratorSpec:
    folder = tiny_diffusion.write(tmp_path_factory.mktemp("generator") / "tiny")
    return GeneratorSpec(
        name="tiny",
        title="Random weights",
        kind="local",
        source=str(folder),
        resolution=tiny_diffusion.SIDE,
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    )


def distil(
    images: Path | dict[str, Path],
    spec: GeneratorSpec,
    out: Path,
    *wanted: str,
    student: str = "conv4",
    **changes: dict[str, Any],
) -> local.LocalRun:
    merged = {name: {**QUICK.get(name, {}), **changes.get(name, {})} for name in {*QUICK, *changes}}
    return local.run(
        "tint",
        images,
        "efficientnet_lite0",
        student,
        out,
        params=TINT.resolve("draft", merged),
        device="cpu",
        wanted=wanted,
        generator=spec,
    )


@pytest.fixture(scope="module")
def finished(
    images: Path, spec: GeneratorSpec, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, local.LocalRun]:
    out = tmp_path_factory.mktemp("out")
    return out, distil(images, spec, out, "bundle")


def test_a_job_runs_from_images_to_a_bundle(finished: tuple[Path, local.LocalRun]) -> None:
    run = finished[1]
    assert (run.folder("bundle") / "bundle.zip").is_file()
    assert students.load(run.folder("trained_student")).classes == CLASSES
    assert len(run.folders["class_tokens"]) == len(run.folders["inversions"]) == 3
    report = json.loads((run.folder("report") / "report.json").read_text())
    assert (report["generator"]["images"], report["generator"]["kept"]) == (3 * MADE, 3 * MADE)
    assert report["generator"]["source"] == "local"
    card = (run.folder("bundle") / "MODEL_CARD.md").read_text()
    assert f"{3 * MADE} images that Random weights, a generator, made" in card
    assert "generator's weights (local): Apache-2.0" in card


def test_each_class_is_inverted_from_its_own_images(finished: tuple[Path, local.LocalRun]) -> None:
    run = finished[1]
    labels = fewshot.read_labels(run.folder("support"))
    for label in range(3):
        inverted = load_file(run.folders["inversions"][label] / "inversions.safetensors")
        assert inverted["index"].tolist() == (labels == label).nonzero()[:, 0].tolist()
        assert inverted["noise"].shape == (SHOTS, 4, 8, 8)
        assert len(inverted["unconditional"]) == SHOTS
        assert (inverted["psnr"] <= inverted["vae_psnr"] + 1).all()


def test_every_image_says_where_it_comes_from(finished: tuple[Path, local.LocalRun]) -> None:
    run = finished[1]
    folders = run.folders["synthetic"]
    labels = fewshot.read_labels(run.folder("support"))
    made = {
        name: shards.column(folders, name) for name in ("kind", "first", "second", "share", "label", "seed")
    }
    assert made["label"].tolist() == [0] * MADE + [1] * MADE + [2] * MADE
    assert torch.equal(labels[made["first"]], made["label"])
    assert set(made["kind"].tolist()) == {Kind.DIFFUSION}
    assert set(made["second"].tolist()) == {-1}
    assert len(set(made["seed"].tolist())) == 3 * MADE
    assert 0 < float(made["share"].min()) < float(made["share"].max()) < 1
    assert shards.pixels_at(folders, torch.arange(3 * MADE)).shape == (3 * MADE, 3, 32, 32)


def test_an_image_can_be_made_again_from_its_seed(
    finished: tuple[Path, local.LocalRun], spec: GeneratorSpec
) -> None:
    run = finished[1]
    shard = shards.load(run.folders["synthetic"][1])
    params = TINT.resolve("draft", QUICK).generation  # type: ignore[attr-defined]
    learnt = generation.read_tokens(run.folders["class_tokens"][1])
    inversions = generation.read_inversions(run.folders["inversions"][1])
    again = generation.make(generators.load(spec), learnt, inversions, 1, [int(shard.seed[4])], params)
    assert int(again.first[0]) == int(shard.first[4])
    assert float(again.share[0]) == pytest.approx(float(shard.share[4]))
    assert (again.pixels[0].int() - shard.pixels[4].int()).abs().max() <= 1


def test_a_token_starts_from_the_class_s_own_name_where_that_is_asked_for(
    images: Path, spec: GeneratorSpec, tmp_path: Path
) -> None:
    run = distil(images, spec, tmp_path, "class_tokens", textual_inversion={"steps": 0, "initial_word": None})
    diffusion = generators.load(spec)
    for name, folder in zip(CLASSES, run.folders["class_tokens"], strict=True):
        assert torch.equal(generation.read_tokens(folder).tokens, diffusion.rows_of(name))


def test_without_new_noise_an_image_is_the_reconstruction_of_its_origin(
    images: Path, spec: GeneratorSpec, finished: tuple[Path, local.LocalRun]
) -> None:
    """Its PSNR is the one that the inversion has found."""
    out, _ = finished
    errors = {}
    for alpha in (0.0, 1.0):
        run = distil(images, spec, out, "synthetic", generation={"alpha": alpha, "size": None, **EXACT})
        made = run.folders["synthetic"]
        first = shards.column(made, "first")
        real = fewshot.load(run.folder("support"), tiny_diffusion.SIDE).pixels[first].float() / 255
        pixels = shards.pixels_at(made, torch.arange(len(first))).float() / 255
        errors[alpha] = -10 * (pixels - real).square().mean((1, 2, 3)).log10()
    found = [load_file(folder / "inversions.safetensors") for folder in run.folders["inversions"]]
    index, psnr = (torch.cat([each[name] for each in found]) for name in ("index", "psnr"))
    wanted = psnr[index.argsort()][first]
    assert torch.allclose(errors[0.0], wanted, atol=0.1)
    assert (errors[1.0] - wanted).abs().max() > 0.2


def test_a_second_student_and_more_images_redo_no_inversion(
    finished: tuple[Path, local.LocalRun], images: Path, spec: GeneratorSpec
) -> None:
    out, _ = finished
    other = distil(images, spec, out, "trained_student", student="lenet5", distillation={"input_size": 28})
    assert {name for name, seconds in other.seconds.items() if seconds > 0} == {"distill"}
    more = distil(images, spec, out, "synthetic", generation={"images_per_class": MADE + 1})
    assert {name for name, seconds in more.seconds.items() if seconds > 0} == {"generate"}
    first, second = (shards.load(run.folders["synthetic"][2]) for run in (finished[1], more))
    assert torch.equal(first.seed, second.seed[:MADE])


def test_many_images_of_a_class_are_spread_over_shards() -> None:
    places = [shards.place_in_class(shard, 2, CHUNK + 3) for shard in range(4)]
    assert places == [
        (0, range(CHUNK)),
        (0, range(CHUNK, CHUNK + 3)),
        (1, range(CHUNK)),
        (1, range(CHUNK, CHUNK + 3)),
    ]


def test_the_teacher_labels_real_images_as_they_are_and_synthetic_ones_by_what_they_were_made_for_too(
    finished: tuple[Path, local.LocalRun],
) -> None:
    run = finished[1]
    features, image, _, _ = questions.read_answers(run.folders["teacher_answers"], 12 + 3 * MADE)
    assert torch.bincount(image).tolist() == [2] * 12 + [1] * 3 * MADE
    head = few_shot_head.load(run.folder("soft_labels"))
    assert torch.allclose(head.centre, features[image < 12].mean(0), atol=1e-5)
    logits = labelling.load(run.folder("soft_labels")).logits
    assert torch.allclose(logits[image < 12], head.logits(features[image < 12]))
    asked_for = shards.column(run.folders["synthetic"], "label")[image[image >= 12] - 12]
    made = labelling.made_for(head, features[image >= 12], asked_for)
    assert torch.allclose(logits[image >= 12], made)


def test_images_that_the_teacher_does_not_take_for_their_class_are_rejected() -> None:
    intended = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    probability = torch.tensor([0.9, 0.19, 0.1, 0.2, 0.3, 0.4, 0.5])
    params = SelectionParams(least_probability=0.2, most_to_least=3)
    kept, unsure, surplus = Verdict.KEPT, Verdict.UNSURE, Verdict.SURPLUS
    verdict = selection.judge(probability, intended, params)
    assert verdict.tolist() == [kept, unsure, unsure, surplus, kept, kept, kept]
    nothing = selection.judge(probability, intended, SelectionParams(least_probability=0.95))
    assert nothing.tolist() == [unsure] * 7


def test_the_student_learns_from_the_images_that_are_kept_only(
    finished: tuple[Path, local.LocalRun], images: Path, spec: GeneratorSpec
) -> None:
    out, first = finished
    assert load_file(first.folder("selection") / "selection.safetensors")["verdict"].tolist() == [0] * 18
    strict = distil(images, spec, out, "trained_student", selection={"least_probability": 0.99})
    verdict = load_file(strict.folder("selection") / "selection.safetensors")["verdict"]
    soft = labelling.load(strict.folder("soft_labels"))
    own = (
        soft.logits[-18:]
        .softmax(1)
        .gather(1, shards.column(strict.folders["synthetic"], "label")[:, None])[:, 0]
    )
    assert torch.equal(verdict == Verdict.UNSURE, own < 0.99)
    assert int((verdict == Verdict.KEPT).sum()) < 18
    assert students.load(strict.folder("trained_student")).classes == CLASSES


def test_without_inversions_images_come_from_noise_and_the_token_alone(
    images: Path, spec: GeneratorSpec, tmp_path: Path
) -> None:
    run = distil(images, spec, tmp_path, "synthetic", null_text_inversion={"mode": "none"})
    assert "inversions" not in run.folders
    folders = run.folders["synthetic"]
    assert set(shards.column(folders, "first").tolist()) == {-1}
    assert set(shards.column(folders, "share").tolist()) == {0.0}


def test_a_low_rank_change_is_kept_with_the_token_and_changes_the_images(
    images: Path, spec: GeneratorSpec, finished: tuple[Path, local.LocalRun]
) -> None:
    out, first = finished
    run = distil(images, spec, out, "synthetic", textual_inversion={"lora_rank": 2, "lr": 0.1})
    assert generation.read_tokens(run.folders["class_tokens"][0]).lora
    plain, changed = (shards.load(each.folders["synthetic"][0]) for each in (first, run))
    assert not torch.equal(plain.pixels, changed.pixels)


def test_shards_find_the_generator_loaded_and_as_it_was(
    images: Path, spec: GeneratorSpec, finished: tuple[Path, local.LocalRun], tmp_path: Path
) -> None:
    """The shards of this run follow those of classes whose LoRA changed the same generator."""
    out, _ = finished
    kept = generators.kept(spec)
    strong = distil(images, spec, out, "synthetic", textual_inversion={"lora_rank": 2, "lr": 0.1})
    assert generators.kept(spec) is kept
    params = TINT.resolve("draft", QUICK).generation  # type: ignore[attr-defined]
    for label, folder in enumerate(strong.folders["class_tokens"]):
        learnt = generation.read_tokens(folder)
        inversions = generation.read_inversions(strong.folders["inversions"][label])
        made = shards.load(strong.folders["synthetic"][label])
        seeds = made.seed[: params.batch_size].tolist()
        with textual_inversion.adapted(generators.load(spec), learnt.lora) as fresh:
            again = generation.make(fresh, learnt, inversions, label, seeds, params)
        assert (again.pixels.int() - made.pixels[: len(seeds)].int()).abs().max() <= 1
    state, wanted = kept.unet.state_dict(), generators.load(spec).unet.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in state.items())


def test_a_generator_is_kept_until_another_is_asked_for(spec: GeneratorSpec) -> None:
    kept = generators.kept(spec)
    assert generators.kept(spec.model_copy()) is kept
    other = spec.model_copy(update={"revision": "2"})  # other weights, by their owner's word
    assert generators.kept(other) is not kept
    again = generators.kept(spec)
    assert again is not kept
    generators.release()
    assert generators.kept(spec) is not again


def test_one_image_of_a_class_is_enough_whatever_its_size_and_mode(
    images: Path, spec: GeneratorSpec, tmp_path: Path
) -> None:
    """Grey, with a palette, half transparent; one is far smaller than the generator's images."""
    odd = {"blue": ("L", (9, 60)), "green": ("P", (3, 5)), "red": ("RGBA", (120, 31))}
    root = tmp_path / "images"
    shutil.copytree(images / "test", root / "test")
    for name, (mode, size) in odd.items():
        (root / name).mkdir()
        Image.new(mode, size, (200, 30, 40, 128) if mode == "RGBA" else 90).save(root / name / "only.png")
    run = distil(root, spec, tmp_path / "out", "bundle")
    assert set(shards.column(run.folders["synthetic"], "first").tolist()) == {0, 1, 2}
    report = json.loads((run.folder("report") / "report.json").read_text())
    assert (report["classes"], report["generator"]["images"]) == (list(CLASSES), 3 * MADE)
    assert (run.folder("bundle") / "bundle.zip").is_file()


def test_a_fold_labels_synthetic_images_as_the_job_does_and_leaves_out_those_made_of_what_it_holds_back(
    images: Path, spec: GeneratorSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models.training import distillation

    splits = fewshot.pack_folder(images, tmp_path / "splits")
    shown: list[torch.Tensor] = []
    read = distillation.read_synthetic

    def watched(context: Any, index: torch.Tensor, size: int) -> torch.Tensor:
        shown.append(index)
        return read(context, index, size)

    answers: list[torch.Tensor] = []
    trained = distillation.training_set

    def taught(pixels: torch.Tensor, labels: torch.Tensor, soft: Any, device: torch.device) -> Any:
        made = soft.image >= int((labels >= 0).sum())
        if bool(made.any()):
            answers.append(soft.logits[made].argmax(1)[soft.image[made].argsort(stable=True)])
        return trained(pixels, labels, soft, device)

    monkeypatch.setattr(distillation, "read_synthetic", watched)
    monkeypatch.setattr(distillation, "training_set", taught)
    support = {"support": splits["support"]}
    run = distil(support, spec, tmp_path / "out", "cross_validation", head={"intended": 50.0})
    first, label = (shards.column(run.folders["synthetic"], name) for name in ("first", "label"))
    for index, answer in zip(shown, answers, strict=True):
        assert torch.equal(answer, label[index])  # so much evidence outweighs what the teacher sees
    held = [
        load_file(folder / "predictions.safetensors")["index"] for folder in run.folders["cross_validation"]
    ]
    assert sorted(torch.cat(held).tolist()) == list(range(12))
    shown = [index for index in shown if len(index) < len(first)]
    folds = [index for index in held if bool(torch.isin(first, index).any())]
    assert len(shown) == len(folds) > 0
    for index, out_of_sight in zip(shown, folds, strict=True):
        assert torch.equal(index, (~torch.isin(first, out_of_sight)).nonzero()[:, 0])
