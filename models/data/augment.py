"""Augmentation of whole batches on their device: one resampling, then colours, erasing and mixing.

All numbers are drawn on the CPU from the generator that is handed in, so a batch is the same on every device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from models.arrays import Images, Views
from models.runtime import generator


@dataclass(frozen=True)
class Augmentation:
    """How strongly a batch is changed; the fields are those of `stages.DistillationParams`."""

    shift: float = 0.125
    crop: float = 0.0
    flip: bool = True
    colour: float = 0.0
    erase: float = 0.0

    def __call__(self, images: Images, views: Views, random: torch.Generator) -> Images:
        """Images [N, 3, S, S], each seen through its view [N, 5] and changed at random within it."""
        changed = resample(images, self.transforms(views, images.shape[-1], random))
        return self.recolour(changed, random)

    def recolour(self, images: Images, random: torch.Generator) -> Images:
        """The part that moves nothing: colours and greyed rectangles."""
        if self.colour:
            images = jitter_colours(images, self.colour, random)
        if self.erase:
            images = erase_rectangles(images, self.erase, random)
        return images

    def transforms(self, views: Views, size: int, random: torch.Generator) -> Tensor:
        """Affine maps [N, 2, 3] from the output's to the input's coordinates, both in -1..1."""
        count = len(views)
        area = 1 - self.crop * torch.rand(count, generator=random)
        aspect = torch.exp(math.log(4 / 3) * (2 * torch.rand(count, generator=random) - 1) * bool(self.crop))
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        # Whole pixels: without a crop nothing is interpolated and the image stays sharp.
        reach = round(self.shift * size)
        moves = torch.randint(-reach, reach + 1, (2, count), generator=random) * (2 / size)
        slack = (2 * torch.rand(2, count, generator=random) - 1) * torch.stack([1 - width, 1 - height])
        mirror = torch.where(torch.rand(count, generator=random) < 0.5 * self.flip, -1.0, 1.0)
        inner = (width * mirror, slack[0] + moves[0], height, slack[1] + moves[1])
        return _compose(views.cpu(), inner)


def resample(images: Images, transforms: Tensor) -> Images:
    """Images [N, 3, S, S] through affine maps [N, 2, 3]: bilinear, mirrored at the border."""
    grid = functional.affine_grid(transforms.to(images.device), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def look(images: Images, views: Views) -> Images:
    """What the views show, at the size of `images`."""
    count = len(views)
    still = (torch.ones(count), torch.zeros(count), torch.ones(count), torch.zeros(count))
    return resample(images, _compose(views.cpu(), still))


def jitter_colours(images: Images, strength: float, random: torch.Generator) -> Images:
    """Random brightness, contrast and saturation, each by a factor in 1 -+ `strength`."""
    count = len(images)
    factors = 1 + strength * (2 * torch.rand(3, count, 1, 1, 1, generator=random) - 1)
    brightness, contrast, saturation = factors.to(images.device)
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)  # BT.601 luma
    changed = images * brightness
    grey = (changed * weights).sum(1, keepdim=True)
    changed = grey + saturation * (changed - grey)
    mean = grey.mean((2, 3), keepdim=True)
    jittered: Images = (mean + contrast * (changed - mean)).clamp(0, 1)
    return jittered


def erase_rectangles(images: Images, share: float, random: torch.Generator) -> Images:
    """Grey out one rectangle in a `share` of the images, 2 to 25 % of the area (Zhong et al., arXiv:1708.04896)."""
    count, size = len(images), images.shape[-1]
    area = 0.02 + 0.23 * torch.rand(count, generator=random)
    aspect = torch.exp(math.log(3) * (2 * torch.rand(count, generator=random) - 1))
    inside = _rectangles((area * aspect).sqrt(), (area / aspect).sqrt(), size, random)
    inside &= (torch.rand(count, generator=random) < share).view(-1, 1, 1)
    return torch.where(inside[:, None].to(images.device), torch.full_like(images, 0.5), images)


def mixup(
    images: Images, targets: tuple[Tensor, ...], alpha: float, random: torch.Generator
) -> tuple[Images, tuple[Tensor, ...]]:
    """Blend each image and its targets [N, C] with another of the batch (Zhang et al., arXiv:1710.09412)."""
    share = beta(alpha, random)
    order = torch.randperm(len(images), generator=random).to(images.device)
    mixed = tuple(torch.lerp(target[order], target, share) for target in targets)
    return torch.lerp(images[order], images, share), mixed


def cutmix(
    images: Images, targets: tuple[Tensor, ...], alpha: float, random: torch.Generator
) -> tuple[Images, tuple[Tensor, ...]]:
    """Paste a rectangle of another image; targets mix by area (Yun et al., arXiv:1905.04899, equation 1)."""
    side = torch.full((1,), math.sqrt(1 - beta(alpha, random)))
    inside = _rectangles(side, side, images.shape[-1], random).to(images.device)
    order = torch.randperm(len(images), generator=random).to(images.device)
    share = 1 - float(inside.float().mean())
    mixed = tuple(torch.lerp(target[order], target, share) for target in targets)
    return torch.where(inside[:, None], images[order], images), mixed


def beta(alpha: float, random: torch.Generator) -> float:
    """A draw from Beta(alpha, alpha), as the ratio of two Gamma draws."""
    gamma = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=random)
    return float(gamma[0] / gamma.sum())


def view_boxes(positions: Tensor, numbers: Tensor, smallest: float = 0.35) -> Views:
    """The view `numbers` [N] of the images at `positions` [N]: 0 the image, 1 its mirror image, others crops.

    A crop keeps `smallest` to 1 of the area. The same position and number always give the same view.
    """
    return torch.stack([_view_box(int(p), int(v), smallest) for p, v in zip(positions, numbers, strict=True)])


def _view_box(position: int, number: int, smallest: float) -> Tensor:
    if number < 2:
        return torch.tensor([0.0, 0.0, 1.0, 1.0, float(number)])
    draws = torch.rand(5, generator=generator(position, "view", number))
    area = smallest + (1 - smallest) * draws[0]
    aspect = torch.exp(math.log(4 / 3) * (2 * draws[1] - 1))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    mirrored = float(number % 2)
    return torch.stack(
        [draws[2] * (1 - width), draws[3] * (1 - height), width, height, torch.tensor(mirrored)]
    )


def _compose(views: Views, inner: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The affine map of a view [N, 5] after `inner` (x scale, x shift, y scale, y shift) within it."""
    left, top, width, height, mirrored = views.unbind(1)
    x_scale, x_shift, y_scale, y_shift = inner
    facing = 1 - 2 * mirrored
    maps = torch.zeros(len(views), 2, 3)
    maps[:, 0, 0] = width * facing * x_scale
    maps[:, 0, 2] = 2 * left + width - 1 + width * facing * x_shift
    maps[:, 1, 1] = height * y_scale
    maps[:, 1, 2] = 2 * top + height - 1 + height * y_shift
    return maps


def _rectangles(width: Tensor, height: Tensor, size: int, random: torch.Generator) -> Tensor:
    """bool [N, size, size]: inside a rectangle of these shares of the side, its centre anywhere."""
    centre = torch.rand(2, len(width), 1, generator=random) * size
    pixel = torch.arange(size) + 0.5
    columns = (pixel - centre[0]).abs() < width[:, None] * size / 2
    rows = (pixel - centre[1]).abs() < height[:, None] * size / 2
    return rows[:, :, None] & columns[:, None, :]
