"""Null-text inversion: noise and null embeddings from which guided sampling gives an image back.

Source: Mokady et al., "Null-text inversion", arXiv:2211.09794, algorithm 1, of many images at once; the fast option is
negative-prompt inversion, Miyake et al., arXiv:2305.16807.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.arrays import Images
from models.data import images as image_tensors
from models.errors import DataError, TrainingError
from models.generators.diffusion import Batches, Diffusion, psnr
from models.methods.tint import NullTextInversionParams
from models.pipeline import Report

BATCH = 16


@dataclass(frozen=True)
class Inversions:
    """Of K images: `noise` float32 [K, C, h, w] (z_T), `unconditional` float32 [K, R, L, D] (null embeddings, noisiest
    step first; R = steps, or 1 of negative-prompt inversion), `psnr` and `vae_psnr` float32 [K] in dB: the
    reconstruction and the VAE's own round trip, both against the image at the model's resolution.
    """

    noise: Tensor
    unconditional: Tensor
    psnr: Tensor
    vae_psnr: Tensor


def invert(
    diffusion: Diffusion,
    supports: Images,
    conditions: Tensor,
    params: NullTextInversionParams,
    *,
    report: Report,
    batch_size: int = BATCH,
) -> Inversions:
    """Invert images [K, 3, H, W], of one class or many, each under its own `conditions` [K, L, D].

    Raises `TrainingError` where an embedding's loss is no number.
    """
    if not len(supports) or len(supports) != len(conditions):
        raise DataError(f"there are {len(supports)} images and {len(conditions)} conditions to invert")
    latents = diffusion.encode_all(supports)
    conditions = conditions.to(diffusion.device)
    total = len(supports) * params.steps * 2

    def part(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        def advance(steps: int) -> None:
            report(rows.start * params.steps * 2 + steps * (rows.stop - rows.start), total)

        return _invert(diffusion, latents[rows], conditions[rows], params, advance)

    parts = Batches(batch_size).of(len(supports), part)
    noise, unconditional, reconstructed = (torch.cat(each) for each in zip(*parts, strict=True))
    wanted = image_tensors.resize(supports.cpu(), diffusion.resolution)
    return Inversions(
        noise=noise.cpu(),
        unconditional=unconditional.cpu(),
        psnr=psnr(diffusion.decode_all(reconstructed), wanted),
        vae_psnr=psnr(diffusion.decode_all(latents), wanted),
    )


def trajectory(
    diffusion: Diffusion,
    latents: Tensor,
    conditions: Tensor,
    steps: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> list[Tensor]:
    """z_0 ... z_T, each [N, C, h, w]: DDIM inversion at guidance 1 (Song et al., arXiv:2010.02502, section 4.3)."""
    scheduler = diffusion.ddim_inverse(steps)
    path = [latents]
    with torch.no_grad():
        for time in scheduler.timesteps.tolist():
            output = diffusion.predict(path[-1], time, conditions)
            path.append(scheduler.step(output, time, path[-1]).prev_sample)
            advance(len(path) - 1)
    return path


@dataclass(frozen=True)
class _Step:
    """One guided DDIM step from `latents` [N, C, h, w]; `conditional` [N, C, h, w] is predicted once for all tries."""

    diffusion: Diffusion
    scheduler: Any
    time: int
    latents: Tensor
    conditional: Tensor
    guidance: float

    def __call__(self, rows: Tensor, null: Tensor) -> Tensor:
        """Where the latents of `rows` [n] land under null embeddings [n, L, D]."""
        latents = self.latents[rows]
        output = torch.lerp(
            self.diffusion.predict(latents, self.time, null), self.conditional[rows], self.guidance
        )
        landed: Tensor = self.scheduler.step(output, self.time, latents).prev_sample
        return landed


def _invert(
    diffusion: Diffusion,
    latents: Tensor,
    conditions: Tensor,
    params: NullTextInversionParams,
    advance: Callable[[int], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """z_T, the null embeddings, and the latents that guided sampling from them gives."""
    path = trajectory(diffusion, latents, conditions, params.steps, advance)
    noise = path.pop()
    if params.mode == "negative_prompt":
        nulls = conditions[:, None]
        back = diffusion.sample(noise, conditions, nulls, steps=params.steps, guidance=1.0)
        advance(2 * params.steps)
        return noise, nulls, back
    current = noise
    null = diffusion.unconditional().repeat(len(latents), 1, 1)
    found = []
    scheduler = diffusion.ddim(params.steps)
    for time in scheduler.timesteps.tolist():
        with torch.no_grad():
            conditional = diffusion.predict(current, time, conditions)
        step = _Step(diffusion, scheduler, time, current, conditional, params.guidance)
        null, current = _optimise(step, null, path.pop(), params)
        found.append(null)
        advance(params.steps + len(found))
    return noise, torch.stack(found, 1), current


def _optimise(
    step: _Step, start: Tensor, wanted: Tensor, params: NullTextInversionParams
) -> tuple[Tensor, Tensor]:
    """Null embeddings [N, L, D] from which `step` lands nearest to `wanted` [N, C, h, w], and where it lands.

    Each image has its own embedding, its own Adam state and stops by itself, so a batch gives what each gives alone.
    An embedding is kept only where its error is lower than all before: the start is never made worse.
    """
    embeddings = [row.clone().requires_grad_() for row in start]
    adam = torch.optim.Adam(embeddings, params.lr)
    best, landed_at = start.clone(), torch.zeros_like(wanted)
    error = torch.full((len(start),), torch.inf, device=start.device)
    going = torch.arange(len(start), device=start.device)
    for attempt in range(params.inner_steps + 1):
        last = attempt == params.inner_steps
        with torch.set_grad_enabled(not last):
            tried = torch.stack([embeddings[row] for row in going.tolist()])
            landed = step(going, tried)
            loss = (landed - wanted[going]).square().flatten(1).mean(1)
        lower = loss.detach() < error[going]
        rows = going[lower]
        error[rows], best[rows], landed_at[rows] = (each.detach()[lower] for each in (loss, tried, landed))
        unfinished = loss.detach() > params.tolerance
        going = going[unfinished]
        if last or not len(going):
            break
        adam.zero_grad()
        loss[unfinished].sum().backward()  # type: ignore[no-untyped-call]
        adam.step()
    if not bool(error.isfinite().all()):
        raise TrainingError("the loss of null-text inversion is no number", "Lower the guidance or lr.")
    return best, landed_at
