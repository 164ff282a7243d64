"""Inverting images so that guided sampling gives them back, on tiny models."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.data import images as image_tensors
from models.errors import DataError, TrainingError
from models.generators import diffusion
from models.generators.diffusion import Diffusion, psnr
from models.generators.null_text_inversion import Inversions, invert, trajectory
from models.local import FolderCheckpoints
from models.methods.tint import NullTextInversionParams
from tests import tiny_diffusion

PROMPT = "a photo of a {}"
SUPPORTS = torch.cat([tiny_diffusion.squares(colour, 2, seed=9) for colour in ("red", "blue")])
WORDS = ("red", "red", "blue", "blue")
NO_MACHINE_HAS = 2**60  # bytes


def silent(step: int, total: int, **metrics: float) -> None:
    assert 0 < step <= total


def conditions(model: Diffusion, *words: str) -> Tensor:
    with torch.no_grad():
        return model.embed_prompts(model.prompt(PROMPT), torch.stack([model.rows_of(word) for word in words]))


def inverted(
    model: Diffusion,
    rows: slice = slice(None),
    batch_size: int = 16,
    checkpoints: FolderCheckpoints | None = None,
    stop_at: int | None = None,
    **params: Any,
) -> Inversions:
    def report(step: int, total: int, **metrics: float) -> None:
        silent(step, total)
        if step == stop_at:
            raise KeyboardInterrupt

    return invert(
        model,
        SUPPORTS[rows],
        conditions(model, *WORDS[rows]),
        NullTextInversionParams(**{"mode": "null_text", "steps": 8, **params}),
        report=report,
        checkpoints=checkpoints,
        batch_size=batch_size,
    )


def sampled(model: Diffusion, found: Inversions, unconditional: Tensor, guidance: float) -> Tensor:
    steps = found.unconditional.shape[1] if found.unconditional.shape[1] > 1 else 8
    prompts = conditions(model, *WORDS)
    return model.sample(found.noise, prompts, unconditional, steps=steps, guidance=guidance)


class Passes:
    """The number of rows of every pass through the UNet."""

    def __init__(self, model: Diffusion) -> None:
        self.rows: list[int] = []
        model.unet.register_forward_pre_hook(lambda module, inputs: self.rows.append(len(inputs[0])))


def refuse_more_than(rows: int) -> Callable[[Any, Any], None]:
    """A hook under which the allocator really refuses, whenever more rows pass a module."""

    def refuse(module: Any, inputs: Any) -> None:
        if len(inputs[0]) > rows:
            torch.empty(NO_MACHINE_HAS, dtype=torch.uint8)

    return refuse


def test_null_text_reconstructs_as_well_as_the_autoencoder_and_plain_guidance_does_not(
    trained_folder: Path,
) -> None:
    model = diffusion.load(trained_folder)
    found = inverted(model, steps=20, guidance=7.5, inner_steps=20)
    assert bool((found.vae_psnr > 18).all())
    assert float((found.psnr - found.vae_psnr).min()) > -0.5
    kept = sampled(model, found, found.unconditional, 7.5)
    assert psnr(model.decode(kept), SUPPORTS).tolist() == pytest.approx(found.psnr.tolist(), abs=0.05)
    plain = sampled(model, found, model.unconditional()[None].expand(4, -1, -1, -1), 7.5)
    assert float((found.psnr - psnr(model.decode(plain), SUPPORTS)).mean()) > 1
    latents = model.encode(SUPPORTS)
    assert float((plain - latents).square().mean()) > 20 * float((kept - latents).square().mean())


def test_every_step_lands_nearer_than_with_the_empty_prompt(either_model: Diffusion) -> None:
    """Whatever the prediction means; the weights are random."""
    found = inverted(either_model, guidance=7.5)
    latents = either_model.encode(SUPPORTS)
    empty = either_model.unconditional()[None].expand(4, -1, -1, -1)
    errors = [
        (sampled(either_model, found, nulls, 7.5) - latents).square().flatten(1).mean(1)
        for nulls in (found.unconditional, empty)
    ]
    assert bool((errors[0] < 0.8 * errors[1]).all())


def test_images_inverted_together_are_as_each_alone(either_model: Diffusion) -> None:
    together = inverted(either_model, steps=5)
    for row in range(4):
        alone = inverted(either_model, slice(row, row + 1), steps=5)
        for name, value in vars(alone).items():
            assert torch.allclose(getattr(together, name)[row], value[0], rtol=1e-3, atol=1e-3), name


def test_batches_of_another_size_change_nothing(model: Diffusion) -> None:
    whole, parts = inverted(model, steps=4), inverted(model, steps=4, batch_size=3)
    for name, value in vars(parts).items():
        assert torch.allclose(getattr(whole, name), value, rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize(
    ("mode", "stop_at", "passes_left"),
    [
        ("null_text", 14, 2 * 4 + 4 + 4 * 4),
        ("null_text", 30, 2 * 4),
        ("negative_prompt", 18, 8),
        ("ddim", 18, 8),
    ],
)
def test_a_killed_run_goes_on_to_the_same_inversions(
    model: Diffusion, tmp_path: Path, mode: str, stop_at: int, passes_left: int
) -> None:
    """Of two batches over 4 timesteps, with 4 passes at each on the way back.

    Killed there, with a checkpoint after timestep 2, in the first batch or in the second; or, where the way back is
    quick, on the way up of the second.
    """
    common: dict[str, Any] = {
        "mode": mode, "steps": 4, "inner_steps": 2, "tolerance": 0, "batch_size": 2
    }  # fmt: skip
    whole = inverted(model, **common)
    kept = FolderCheckpoints(tmp_path, every=0)
    with pytest.raises(KeyboardInterrupt):
        inverted(model, **common, checkpoints=kept, stop_at=stop_at)
    passes = Passes(model)
    resumed = inverted(model, **common, checkpoints=kept)
    assert len(passes.rows) == passes_left
    for name, value in vars(resumed).items():
        assert torch.equal(getattr(whole, name), value), name


def test_a_run_that_goes_on_with_less_memory_gives_the_same(model: Diffusion, tmp_path: Path) -> None:
    whole, kept = inverted(model, steps=3), FolderCheckpoints(tmp_path, every=0)
    with pytest.raises(KeyboardInterrupt):
        inverted(model, steps=3, checkpoints=kept, stop_at=20)
    model.unet.register_forward_pre_hook(refuse_more_than(1))
    resumed = inverted(model, steps=3, checkpoints=kept)
    for name, value in vars(resumed).items():
        assert torch.allclose(getattr(whole, name), value, rtol=1e-3, atol=1e-3), name


def test_the_trajectory_is_ddim_run_backwards(either_model: Diffusion) -> None:
    """Against the equation in float64: predict at t from the latent before, then step up to t."""
    model, steps = either_model, 5
    latents, prompts = model.encode(SUPPORTS), conditions(model, *WORDS)
    path = trajectory(model, latents, prompts, steps)
    assert len(path) == steps + 1
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    current = latents.double()
    for number, time in enumerate([1, 201, 401, 601, 801]):
        here, there = kept[max(time - 200, 0)], kept[time]
        with torch.no_grad():
            output = model.predict(current.float(), time, prompts).double()
        if model.schedule["prediction_type"] == "epsilon":
            image, error = (current - (1 - here) ** 0.5 * output) / here**0.5, output
        else:
            image = here**0.5 * current - (1 - here) ** 0.5 * output
            error = here**0.5 * output + (1 - here) ** 0.5 * current
        current = there**0.5 * image + (1 - there) ** 0.5 * error
        assert torch.allclose(path[number + 1].double(), current, rtol=1e-3, atol=1e-3)


def test_the_prompts_prediction_is_made_once_a_timestep(model: Diffusion) -> None:
    passes = Passes(model)
    inverted(model, steps=4, inner_steps=3, tolerance=0)
    assert len(passes.rows) == 4 + 4 * (1 + 3 + 1)  # up, then: the prompt's, the tries', the last one's
    assert set(passes.rows) == {4}


def test_an_image_that_is_near_enough_costs_no_more_passes(model: Diffusion) -> None:
    passes = Passes(model)
    inverted(model, steps=4, inner_steps=3, tolerance=1, guidance=1.5)
    assert len(passes.rows) == 4 + 4 * 2
    passes.rows.clear()
    both = torch.cat([model.unconditional(), conditions(model, "red")])  # guidance moves the second one only
    params = NullTextInversionParams(mode="null_text", steps=20, inner_steps=3, tolerance=0.02)
    invert(model, SUPPORTS[:2], both, params, report=silent)
    assert set(passes.rows) == {1, 2}


def test_no_try_makes_a_step_worse(model: Diffusion) -> None:
    """At a rate that overshoots every time: a step is never worse than with the embedding that it starts from."""
    wild = inverted(model, steps=2, lr=1.0, inner_steps=5)
    first = wild.unconditional[:, :1]
    latents, prompts = model.encode(SUPPORTS), conditions(model, *WORDS)
    found, started = (
        (model.sample(wild.noise, prompts, nulls, steps=2, guidance=7.5) - latents)
        .square()
        .flatten(1)
        .mean(1)
        for nulls in (wild.unconditional, first)
    )
    assert bool((found <= started * 1.0001).all())


def test_negative_prompt_inversion_needs_two_passes_a_timestep(model: Diffusion) -> None:
    passes = Passes(model)
    found = inverted(model, mode="negative_prompt")
    assert passes.rows == [4] * 16
    assert torch.equal(found.unconditional, conditions(model, *WORDS)[:, None])
    again = model.decode(sampled(model, found, found.unconditional, 7.5))
    assert psnr(again, SUPPORTS).tolist() == pytest.approx(found.psnr.tolist(), abs=0.01)


def test_ddim_inversion_guides_by_the_empty_prompt_and_tells_where_that_leads(model: Diffusion) -> None:
    passes = Passes(model)
    found = inverted(model, mode="ddim", guidance=5.0)
    assert passes.rows == [4] * 8 + [8] * 8  # up, then down under both prompts at once
    assert torch.equal(found.unconditional, model.unconditional()[:, None].expand(4, -1, -1, -1))
    again = model.decode(sampled(model, found, found.unconditional, 5.0))
    assert psnr(again, SUPPORTS).tolist() == pytest.approx(found.psnr.tolist(), abs=0.01)


def test_supports_of_mixed_sizes_and_modes_are_squeezed_and_inverted(model: Diffusion) -> None:
    contents = []
    for mode, size in (("L", (40, 9)), ("P", (3, 3)), ("RGBA", (16, 31)), ("RGB", (100, 100))):
        buffer = io.BytesIO()
        Image.new(mode, size, 90 if mode in ("L", "P") else None).save(buffer, "PNG")
        contents.append((mode, buffer.getvalue()))
    supports = image_tensors.squares(contents, model.resolution).float() / 255
    params = NullTextInversionParams(mode="null_text", steps=2, inner_steps=1)
    found = invert(model, supports, conditions(model, *WORDS), params, report=silent)
    assert found.noise.shape == (4, *model.latent_shape)
    assert found.unconditional.shape == (4, 2, model.context, model.width)
    assert bool(torch.stack([found.psnr, found.vae_psnr]).isfinite().all())


def test_one_image_far_smaller_than_the_model_is_inverted_at_its_resolution(model: Diffusion) -> None:
    small = torch.rand(1, 3, 2, 3)
    params = NullTextInversionParams(mode="null_text", steps=2, inner_steps=1)
    found = invert(model, small, conditions(model, "red"), params, report=silent)
    wanted = psnr(model.decode(model.encode(small)), image_tensors.resize(small, 16))
    assert found.vae_psnr.tolist() == pytest.approx(wanted.tolist(), abs=1e-3)


def test_where_memory_is_full_the_batch_halves_and_the_result_is_the_same(model: Diffusion) -> None:
    whole = inverted(model, steps=3)
    model.unet.register_forward_pre_hook(refuse_more_than(2))
    halved = inverted(model, steps=3)
    for name, value in vars(halved).items():
        assert torch.allclose(getattr(whole, name), value, rtol=1e-3, atol=1e-3), name


def test_images_without_their_conditions_and_losses_that_are_no_numbers_are_errors(model: Diffusion) -> None:
    params = NullTextInversionParams(mode="null_text", steps=2)
    with pytest.raises(DataError, match="4 images and 1 conditions"):
        invert(model, SUPPORTS, conditions(model, "red"), params, report=silent)
    with pytest.raises(DataError, match="0 images"):
        invert(model, SUPPORTS[:0], conditions(model, "red")[:0], params, report=silent)
    with pytest.raises(TrainingError, match="no number"):
        invert(model, SUPPORTS * torch.nan, conditions(model, *WORDS), params, report=silent)
