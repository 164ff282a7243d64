"""Null-text inversion: noise and null embeddings from which guided sampling gives an image back.

Source: Mokady et al., "Null-text inversion", arXiv:2211.09794, algorithm 1, of many images at once. Fast options are
negative-prompt inversion, Miyake et al., arXiv:2305.16807, and DDIM inversion alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.arrays import Images
from models.data import images as image_tensors
from models.errors import DataError, TrainingError
from models.generators.diffusion import Batches, Diffusion, psnr
from models.methods.tint import NullTextInversionParams
from models.pipeline import Checkpoints, Report
from models.training.loop import NoCheckpoints

BATCH = 16
#: Classifier-free guidance where the parameters name none (Mokady et al., section 4).
GUIDANCE = 7.5
_FILE = "ways.safetensors"


@dataclass(frozen=True)
class Inversions:
    """Of K images: `noise` float32 [K, C, h, w] (z_T), `unconditional` float32 [K, R, L, D] (null embeddings, noisiest
    step first; R = steps, or 1 where none are optimised), `psnr` and `vae_psnr` float32 [K] in dB: the
    reconstruction and the VAE's own round trip, both against the image at the model's resolution.
    """

    noise: Tensor
    unconditional: Tensor
    psnr: Tensor
    vae_psnr: Tensor


@dataclass(frozen=True)
class _Way:
    """The way of n images: `path` [n, T + 1, C, h, w] is z_0 ... z_T, up which they went; `nulls` [n, R, L, D] are the
    null embeddings of the first R steps down, which have led to `reached` [n, C, h, w].
    """

    path: Tensor
    nulls: Tensor
    reached: Tensor

    def of(self, rows: slice, device: torch.device) -> _Way:
        """The way of some of the images."""
        return _Way(*(value[rows].to(device) for value in vars(self).values()))


def invert(
    diffusion: Diffusion,
    supports: Images,
    conditions: Tensor,
    params: NullTextInversionParams,
    *,
    report: Report,
    checkpoints: Checkpoints | None = None,
    batch_size: int = BATCH,
) -> Inversions:
    """Invert images [K, 3, H, W], of one class or many, each under its own `conditions` [K, L, D].

    A checkpoint holds the images that are inverted, and a null-text inversion between two timesteps. Raises
    `TrainingError` where an embedding's loss is no number.
    """
    if not len(supports) or len(supports) != len(conditions):
        raise DataError(f"there are {len(supports)} images and {len(conditions)} conditions to invert")
    latents = diffusion.encode_all(supports)
    conditions = conditions.to(diffusion.device)
    saved = checkpoints or NoCheckpoints()
    folder = saved.latest()
    done, begun = _restore(folder) if folder else ([], None)
    first = sum(len(way.reached) for way in done)

    def keep(step: int, unfinished: _Way | None = None) -> None:
        if saved.due():
            saved.save(step, partial(_save, done=done, begun=unfinished))

    def part(rows: slice) -> _Way:
        here = slice(first + rows.start, first + rows.stop)

        def advance(steps: int, way: _Way | None = None) -> None:
            step = 2 * params.steps * here.start + steps * (here.stop - here.start)
            report(step, 2 * params.steps * len(supports))
            if way is not None and way.nulls.shape[1] < params.steps:
                keep(step, way)

        fits = begun is not None and rows.stop <= len(begun.reached)
        start = begun.of(rows, diffusion.device) if begun is not None and fits else None
        return _invert(diffusion, latents[here], conditions[here], params, advance, start)

    for way in Batches(len(begun.reached) if begun else batch_size).of(len(supports) - first, part):
        done.append(way.of(slice(None), torch.device("cpu")))
        keep(2 * params.steps * sum(len(way.reached) for way in done))
    path, nulls, reached = (torch.cat([getattr(way, name) for way in done]) for name in vars(done[0]))
    wanted = image_tensors.resize(supports.cpu(), diffusion.resolution)
    return Inversions(
        noise=path[:, -1].clone(),
        unconditional=nulls,
        psnr=psnr(diffusion.decode_all(reached), wanted),
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
    advance: Callable[..., None],
    begun: _Way | None,
) -> _Way:
    """The whole way of `latents` [N, C, h, w], or the rest of one that was `begun`."""
    if begun is None:
        path = torch.stack(trajectory(diffusion, latents, conditions, params.steps, advance), 1)
        nulls = diffusion.unconditional().repeat(len(latents), 1, 1)[:, None]
        begun = _Way(path, nulls[:, :0], path[:, -1])
    guidance = params.guidance or GUIDANCE
    if params.mode != "null_text":
        empty = diffusion.unconditional().expand_as(conditions)
        nulls, guided = (conditions, 1.0) if params.mode == "negative_prompt" else (empty, guidance)
        nulls = nulls[:, None].clone()
        back = diffusion.sample(begun.reached, conditions, nulls, steps=params.steps, guidance=guided)
        advance(2 * params.steps)
        return _Way(begun.path, nulls, back)
    way = begun
    scheduler = diffusion.ddim(params.steps)
    times = scheduler.timesteps.tolist()
    for number in range(way.nulls.shape[1], len(times)):
        with torch.no_grad():
            conditional = diffusion.predict(way.reached, times[number], conditions)
        step = _Step(diffusion, scheduler, times[number], way.reached, conditional, guidance)
        start = way.nulls[:, -1] if number else diffusion.unconditional().repeat(len(latents), 1, 1)
        null, reached = _optimise(step, start, way.path[:, -2 - number], params)
        way = _Way(way.path, torch.cat([way.nulls, null[:, None]], 1), reached)
        advance(params.steps + number + 1, way)
    return way


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


def _save(folder: Path, done: list[_Way], begun: _Way | None) -> None:
    """Write the ways of the batches that are inverted, and of the one that is not yet."""
    ways = {str(number): way for number, way in enumerate(done)} | ({"begun": begun} if begun else {})
    tensors = {
        f"{name}.{member}": value.cpu().clone(memory_format=torch.contiguous_format)
        for name, way in ways.items()
        for member, value in vars(way).items()
    }
    save_file(tensors, folder / _FILE)


def _restore(folder: Path) -> tuple[list[_Way], _Way | None]:
    """What `_save` has written."""
    ways: dict[str, dict[str, Tensor]] = {}
    for path, value in load_file(folder / _FILE).items():
        name, member = path.split(".")
        ways.setdefault(name, {})[member] = value
    begun = ways.pop("begun", None)
    return [_Way(**ways[str(number)]) for number in range(len(ways))], _Way(**begun) if begun else None
