"""What a teacher of the catalogue sees in the images that the embedded ViT learns from, computed once.

The teacher is shown each image as it is, at the size at which its maps of stride 16 have one place for every patch of
the ViT. A mirrored or moved image gets the maps mirrored or moved with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from models.arrays import Pixels, Probabilities
from models.data import images as image_tensors
from models.runtime import generator, training_autocast
from models.stages import HeadParams
from models.teachers import few_shot_head
from models.teachers.protocol import Teacher
from models.zoo.command import PausedError
from models.zoo.pictures import Pictures
from models.zoo.vit_network import GRID

#: Side in pixels at which the teacher sees the images.
TEACHER_SIZE = 16 * GRID
#: Images in a file of the cache, and of which the principal components are computed.
CHUNK, _SAMPLE = 2000, 1000
_BATCH = 100


@dataclass(frozen=True)
class Targets:
    """What the teacher says of N images. Features and maps are centred, with mean square 1.

    `features` float16 [N, D] pooled; `maps` float16 [N, P, 8, 8], the principal components of its last two stages;
    `answers` float32 [N, K], probabilities of a ridge head that was fitted to all the labels.
    """

    features: Tensor
    maps: Tensor
    answers: Probabilities


def make(
    teacher: Teacher,
    shown: Pictures,
    channels: int,
    folder: Path,
    *,
    seed: int,
    deadline: float,
    say: Callable[[str], None],
    chunk: int = CHUNK,
) -> Targets:
    """The targets for all images, maps with `channels` components.

    `folder` keeps what is done, chunk by chunk. Raises `PausedError` after a chunk at `deadline` (monotonic seconds),
    unless it was the last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "basis.safetensors").is_file():
        order = torch.randperm(len(shown.pixels), generator=generator(seed, "basis"))
        _, maps = look(teacher, shown.pixels[order[:_SAMPLE]])
        _write(folder / "basis.safetensors", basis(maps, channels))
    axes = load_file(folder / "basis.safetensors")
    files = [folder / f"{start:09d}.safetensors" for start in range(0, len(shown.pixels), chunk)]
    for number, file in enumerate(files):
        if file.is_file():
            continue
        features, maps = look(teacher, shown.pixels[number * chunk : (number + 1) * chunk])
        _write(file, {"features": features, "maps": project(maps, axes).half()})
        if number + 1 < len(files):
            if time.monotonic() >= deadline:
                raise PausedError(f"stopped after {(number + 1) * chunk:,} images of the teacher")
            say(f"teacher: {(number + 1) * chunk:,} of {len(shown.pixels):,} images")
    done = [load_file(file) for file in files]
    features = torch.cat([part["features"] for part in done])
    centred = features - features.mean(0)
    head = few_shot_head.fit(
        features,
        shown.labels,
        torch.arange(len(features)),
        features.mean(0),
        HeadParams(rounds=0),
        shown.classes,
        TEACHER_SIZE,
    )
    return Targets(
        (centred / centred.square().mean().sqrt()).half(),
        torch.cat([part["maps"] for part in done]),
        head.logits(features).softmax(-1),
    )


@torch.inference_mode()
def look(teacher: Teacher, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Pooled features float32 [N, D] and maps float32 [N, C, 8, 8] of stride 16 and, enlarged, of stride 32."""
    device = next(teacher.network.parameters()).device
    pooled, maps = [], []
    for part in torch.split(pixels, _BATCH):
        images = image_tensors.resize(part.to(device), TEACHER_SIZE)
        ready = image_tensors.normalise(images, teacher.mean, teacher.std)
        with training_autocast(device):
            final, (fine, coarse) = teacher.network.forward_intermediates(  # type: ignore[operator]
                ready.contiguous(memory_format=torch.channels_last), indices=2
            )
            pooled.append(teacher.network.forward_head(final).float().cpu())  # type: ignore[operator]
        enlarged = functional.interpolate(coarse.float(), (GRID, GRID), mode="bilinear")
        maps.append(torch.cat([fine.float(), enlarged], 1).contiguous().cpu())
    return torch.cat(pooled), torch.cat(maps)


def basis(maps: Tensor, channels: int) -> dict[str, Tensor]:
    """The principal components of the standardised channels of maps [N, C, 8, 8], for `project`.

    "mean" [C], and "axes" [C, P], which divide by the deviation first and make the mean square 1.
    """
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2).double()
    deviation, mean = torch.std_mean(rows, 0)
    deviation = deviation.clamp(min=1e-6)
    strengths, vectors = torch.linalg.eigh(((rows - mean) / deviation).T.cov())
    scale = strengths[-channels:].mean().clamp(min=1e-12).sqrt()
    axes = vectors[:, -channels:] / deviation[:, None] / scale
    return {"mean": mean.float(), "axes": axes.float().contiguous()}


def project(maps: Tensor, axes: dict[str, Tensor]) -> Tensor:
    """Components [N, P, 8, 8] of maps [N, C, 8, 8]."""
    centred = maps - axes["mean"].view(1, -1, 1, 1)
    return torch.einsum("nchw,cp->nphw", centred, axes["axes"])


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, file.with_suffix(".writing"))
    file.with_suffix(".writing").rename(file)
