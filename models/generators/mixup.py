"""Mixes of two real images: MixUp by brightness, CutMix by area.

Each mix is drawn from a generator of its own, made from the job's seed and the mix's position, so that a part of
them can be made alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.arrays import Pixels
from models.data import augment, images
from models.errors import DataError
from models.runtime import generator

#: A share at the margin itself counts as within it, in floating point too.
_SLACK = 1e-9
_TRIES = 1000


@dataclass(frozen=True)
class Mix:
    """share * image `first` + (1 - share) * image `second`; CutMix pastes the second over `box`.

    `box` is (left, top, right, bottom) in pixels.
    """

    first: int
    second: int
    share: float
    box: tuple[int, int, int, int] | None = None

    def nearly_one_of_the_two(self, margin: float) -> bool:
        return self.share <= margin + _SLACK or self.share >= 1 - margin - _SLACK


def draw(
    maker: Literal["mixup", "cutmix"],
    index: int,
    count: int,
    side: int,
    beta: float,
    seed: int,
    attempt: int = 0,
) -> Mix:
    """The mix at position `index` of two different of `count` images of `side` pixels.

    MixUp: share ~ Beta(beta, beta), rounded to 2 decimals (Nguyen et al., arXiv:2207.12106, section 3.2). CutMix:
    the share is that of the area left (Yun et al., arXiv:1905.04899, equation 1 and section 3.1).
    """
    if count < 2:
        raise DataError(f"there is {count} image; mixes need 2", "Add images, or set synthesis.images to 0.")
    random = generator(seed, "mix", index, attempt)
    first, step = (int(torch.randint(high, (1,), generator=random)) for high in (count, count - 1))
    second = (first + 1 + step) % count
    share = augment.beta(beta, random)
    if maker == "mixup":
        return Mix(first, second, round(share, 2))
    reach = side * math.sqrt(1 - share) / 2
    x, y = (torch.rand(2, generator=random, dtype=torch.float64) * side).tolist()
    left, right = (min(side, max(0, round(edge))) for edge in (x - reach, x + reach))
    top, bottom = (min(side, max(0, round(edge))) for edge in (y - reach, y + reach))
    return Mix(first, second, 1 - (right - left) * (bottom - top) / side**2, (left, top, right, bottom))


def draw_apart(
    maker: Literal["mixup", "cutmix"],
    index: int,
    count: int,
    side: int,
    beta: float,
    seed: int,
    margin: float,
) -> Mix:
    """The mix at position `index`, drawn again until it is more than nearly one of its two images."""
    for attempt in range(_TRIES):
        mix = draw(maker, index, count, side, beta, seed, attempt)
        if not mix.nearly_one_of_the_two(margin):
            return mix
    raise DataError(
        f"of {_TRIES} mixes none has shares above {margin}", "Lower synthesis.margin or raise synthesis.beta."
    )


def blend(pixels: Pixels, mixes: list[Mix]) -> Pixels:
    """The mixes uint8 [m, 3, S, S], rounded, of real images uint8 [N, 3, S, S]."""
    first, second = (
        pixels[torch.tensor([getattr(mix, name) for mix in mixes], dtype=torch.long)].float() / 255
        for name in ("first", "second")
    )
    share = torch.tensor([mix.share for mix in mixes]).view(-1, 1, 1, 1)
    pasted = torch.tensor([mix.box is not None for mix in mixes]).view(-1, 1, 1, 1)
    inside = _inside([mix.box or (0, 0, 0, 0) for mix in mixes], pixels.shape[-1])[:, None]
    mixed = torch.where(pasted, torch.where(inside, second, first), torch.lerp(second, first, share))
    return images.to_pixels(mixed)


def _inside(boxes: list[tuple[int, int, int, int]], side: int) -> Tensor:
    """bool [m, side, side]: the pixels within each box."""
    left, top, right, bottom = torch.tensor(boxes, dtype=torch.long).view(-1, 4, 1).unbind(1)
    at = torch.arange(side)
    columns, rows = (at >= left) & (at < right), (at >= top) & (at < bottom)
    return rows[:, :, None] & columns[:, None, :]
