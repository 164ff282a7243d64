"""The embedded generator's script, end to end on two classes of coloured squares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from models import generators, runtime
from models.generators import GeneratorSpec, diffusion
from models.zoo import release, train_generator
from models.zoo.architecture import Budget
from models.zoo.command import PausedError
from models.zoo.train_generator import BUDGETS

CLASSES = ("fire_truck", "frog")
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module", autouse=True)
def number_format() -> Iterator[None]:
    """The command turns bfloat16 on for its process, which here is that of other tests, too."""
    yield
    runtime.use_bfloat16_on_cpu(False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for colour, name in enumerate(CLASSES):
        (root / name).mkdir()
        for index in range(24):
            pixels = random.integers(0, 60, (32, 32, 3))
            left, top = random.integers(2, 12, 2)
            pixels[top : top + 18, left : left + 18, colour] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the command, long enough to tell the two classes apart."""
    out = tmp_path_factory.mktemp("trained") / "generator"
    lengths = ["--vae-steps", "150", "--sharp-steps", "100", "--steps", "250"]
    assert train_generator.main(["--data", str(data), "--out", str(out), "--budget", "toy", *lengths]) == 0
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by part and name."""
    return {
        f"{part}.{name}": value
        for part in PARTS
        for file in (folder / part).glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def test_the_command_writes_a_checkpoint_in_float16_with_samples_and_a_card(trained: Path) -> None:
    tensors = weights(trained)
    assert {name.split(".")[0] for name in tensors} == set(PARTS)
    assert {value.dtype for name, value in tensors.items() if "position_ids" not in name} == {torch.float16}
    assert sum(path.stat().st_size for path in trained.rglob("*") if path.is_file()) < 3e6
    with Image.open(trained / "samples.png") as page:
        assert page.height == (len(CLASSES) + 1) * (2 * 32 + 2)
    card = (trained / "README.md").read_text()
    assert "| fire_truck | 24 |" in card
    assert "48 images in 2 classes" in card


def test_diffusers_own_pipeline_runs_the_checkpoint(trained: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(trained, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(["a photo of a frog"], num_inference_steps=4, guidance_scale=3.0, output_type="np")
    assert result.images.shape == (1, 32, 32, 3)
    assert result.images.std() > 0.01


def test_samples_have_the_colour_of_the_class_that_the_prompt_names(trained: Path) -> None:
    loaded = diffusion.load(trained, "cpu")
    red = release.sample(loaded, "a photo of a fire truck", 16, seed=1).float().mean((0, 2, 3))
    green = release.sample(loaded, "a photo of a frog", 16, seed=1).float().mean((0, 2, 3))
    assert red[0] - red[1] > green[0] - green[1] + 20


def test_a_neutral_word_and_the_classes_are_words_that_textual_inversion_can_start_from(
    trained: Path,
) -> None:
    loaded = diffusion.load(trained, "cpu")
    assert loaded.resolution == 32
    assert all(loaded.knows(word) for word in ("object", "photo", "frog", "fire truck"))
    assert not loaded.knows("zebra")


def test_the_folder_serves_as_a_generator(trained: Path) -> None:
    spec = GeneratorSpec(
        name="squares",
        title="Squares",
        kind="local",
        source=str(trained),
        resolution=32,
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    )
    assert generators.availability(spec).available
    assert generators.load(spec).latent_shape == (6, 8, 8)


def test_a_run_that_was_stopped_again_and_again_gives_the_weights_of_one_that_was_not(
    data: Path, tmp_path: Path
) -> None:
    budget = replace(BUDGETS["toy"], vae_steps=3, sharp_steps=2, steps=4)
    train_generator.train([data], tmp_path / "whole", tmp_path / "whole.work", budget, device="cpu")
    pauses = 0
    while not (tmp_path / "parts" / "model_index.json").exists():
        try:
            train_generator.train(
                [data], tmp_path / "parts", tmp_path / "parts.work", budget, device="cpu", deadline=0.0
            )
        except PausedError:
            pauses += 1
    assert pauses == (3 - 1) + (2 - 1) + (4 - 1)  # after every step that is not a part's last
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_the_command_says_that_it_stopped_by_its_exit_status(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), "--budget", "toy", "--minutes", "0"]
    assert train_generator.main(arguments) == 75
    assert "give the same command again" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_length_takes_the_vae_that_is_ready(data: Path, tmp_path: Path) -> None:
    budget = replace(BUDGETS["toy"], vae_steps=2, sharp_steps=1, steps=2)

    def vaes_after(wanted: Budget, seed: int) -> int:
        train_generator.train([data], tmp_path / "out", tmp_path / "work", wanted, seed=seed, device="cpu")
        return len(list((tmp_path / "work").glob("vae-*")))

    assert vaes_after(budget, seed=0) == 1
    assert vaes_after(replace(budget, steps=3, sharp_steps=2), seed=0) == 1
    assert vaes_after(budget, seed=1) == 2
