"""The synthetic images of a job: made in shards, each alone, and read again by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.arrays import Pixels
from models.methods.fsbbt import CHUNK

_FILE = "images.safetensors"


class Kind(IntEnum):
    """How a synthetic image was made."""

    MIXUP = 0
    CUTMIX = 1
    CVAE = 2


@dataclass(frozen=True)
class Synthetic:
    """Images uint8 [n, 3, S, S] and where they come from.

    `kind` int64 [n], see `Kind`; `first` and `second` int64 [n] are the positions of the two real images, `share`
    float32 [n] that of the first. Of a CVAE's image `first` is the class it was asked for, `second` -1.
    """

    pixels: Pixels
    kind: Tensor
    first: Tensor
    second: Tensor
    share: Tensor

    def save(self, folder: Path) -> None:
        save_file({name: value.contiguous() for name, value in vars(self).items()}, folder / _FILE)


def positions(shard: int, images: int) -> range:
    """The images that a shard makes, of `images` in all."""
    return range(shard * CHUNK, min((shard + 1) * CHUNK, images))


def pixels_at(folders: Sequence[Path], index: Tensor) -> Pixels:
    """The synthetic images [m, 3, S, S] at ascending positions `index` [m]; one shard in memory at a time."""
    parts = []
    for shard, folder in enumerate(folders):
        here = index[(index >= shard * CHUNK) & (index < (shard + 1) * CHUNK)] - shard * CHUNK
        if len(here):
            with safe_open(folder / _FILE, framework="pt") as file:
                parts.append(file.get_tensor("pixels")[here])
    return torch.cat(parts)


def count(folders: Sequence[Path]) -> int:
    """How many synthetic images there are."""
    total = 0
    for folder in folders:
        with safe_open(folder / _FILE, framework="pt") as file:
            total += file.get_slice("kind").get_shape()[0]
    return total
