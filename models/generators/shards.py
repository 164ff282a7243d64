"""The synthetic images of a job: made in shards, each alone, and read again by position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.arrays import Pixels
from models.methods import tint
from models.methods.fsbbt import CHUNK
from models.runtime import generator

_FILE = "images.safetensors"


@dataclass(frozen=True)
class Synthetic:
    """Images uint8 [n, 3, S, S] and where they come from.

    `kind` int64 [n], see `models.generators.Kind`; `first` and `second` int64 [n] are the positions of the two real
    images, `share` float32 [n] that of the first. Of a CVAE's image `first` is the class it was asked for, `second` -1.
    """

    pixels: Pixels
    kind: Tensor
    first: Tensor
    second: Tensor
    share: Tensor

    def save(self, folder: Path) -> None:
        save_file({name: value.contiguous() for name, value in vars(self).items()}, folder / _FILE)


@dataclass(frozen=True)
class Generated(Synthetic):
    """Images of a diffusion model. `first` is the labelled image that each comes from (-1: none), with `share` of its
    inverted latent; `second` is -1. `label` int64 [n] is the class asked for, `seed` int64 [n] that of the noise.
    """

    label: Tensor
    seed: Tensor


def load(folder: Path) -> Generated:
    """All of one shard of GENERATE."""
    return Generated(**load_file(folder / _FILE))


def joined(parts: Sequence[Generated]) -> Generated:
    """The images of all parts, one after another."""
    return Generated(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def image_seed(seed: int, *path: int | str) -> int:
    """The seed of one image, see `models.runtime.generator`; of 53 bits, so that whoever reads JSON can hold it."""
    return generator(seed, *path).initial_seed() % 2**53


def column(folders: Sequence[Path], name: str) -> Tensor:
    """What `Synthetic` says of all images under `name`, but for their pixels: [n]."""
    parts = []
    for folder in folders:
        with safe_open(folder / _FILE, framework="pt") as file:
            parts.append(file.get_tensor(name))
    return torch.cat(parts)


def positions(shard: int, images: int) -> range:
    """The images that a shard makes, of `images` in all."""
    return range(shard * CHUNK, min((shard + 1) * CHUNK, images))


def place_in_class(shard: int, classes: int, images_per_class: int) -> tuple[int, range]:
    """The class of which a shard makes images, and which of them: class by class, `tint.CHUNK` at once."""
    label, chunk = divmod(shard, tint.chunks_of_a_class(images_per_class))
    if label >= classes:
        raise ValueError(f"there is no shard {shard} of {images_per_class} images of {classes} classes")
    return label, range(chunk * tint.CHUNK, min((chunk + 1) * tint.CHUNK, images_per_class))


def pixels_at(folders: Sequence[Path], index: Tensor) -> Pixels:
    """The synthetic images [m, 3, S, S] at ascending positions `index` [m]; one shard in memory at a time."""
    return torch.cat(list(parts_at(folders, index)))


def parts_at(folders: Sequence[Path], index: Tensor) -> Iterator[Pixels]:
    """The same, shard by shard."""
    for folder, places in _places(folders):
        here = index[(index >= places.start) & (index < places.stop)] - places.start
        if len(here):
            with safe_open(folder / _FILE, framework="pt") as file:
                yield file.get_tensor("pixels")[here]


def pieces(folders: Sequence[Path], wanted: range, size: int) -> Iterator[Pixels]:
    """The synthetic images at `wanted`, at most `size` at once; nothing else is read."""
    for folder, places in _places(folders):
        with safe_open(folder / _FILE, framework="pt") as file:
            pixels = file.get_slice("pixels")
            last = min(places.stop, wanted.stop)
            for start in range(max(places.start, wanted.start), last, size):
                yield pixels[start - places.start : min(start + size, last) - places.start]


def count(folders: Sequence[Path]) -> int:
    """How many synthetic images there are."""
    return sum(len(places) for _, places in _places(folders))


def _places(folders: Sequence[Path]) -> Iterator[tuple[Path, range]]:
    """Each shard's folder with the positions of its images among all."""
    start = 0
    for folder in folders:
        with safe_open(folder / _FILE, framework="pt") as file:
            stop = start + file.get_slice("kind").get_shape()[0]
        yield folder, range(start, stop)
        start = stop
