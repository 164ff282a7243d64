"""Mixes of two real images."""

from __future__ import annotations

import math
from itertools import starmap

import numpy as np
import pytest
import torch

from models.data.images import to_pixels
from models.errors import DataError
from models.generators import mixup
from models.generators.mixup import Mix


def pictures(count: int, side: int = 8) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=random, dtype=torch.uint8)


def test_a_mix_is_the_weighted_mean_of_its_two_images_rounded() -> None:
    pixels = pictures(3)
    (mixed,) = mixup.blend(pixels, [Mix(0, 2, 0.3)])
    first, _, second = pixels.numpy().astype(np.float64)
    assert np.abs(mixed.numpy() - (0.3 * first + 0.7 * second)).max() <= 0.5 + 1e-3


def test_cutmix_pastes_the_second_image_over_its_box_and_shares_by_area() -> None:
    pixels = pictures(2)
    mix = mixup.draw("cutmix", 5, 2, 8, 1.0, seed=0)
    (mixed,) = mixup.blend(pixels, [mix])
    assert mix.box is not None
    left, top, right, bottom = mix.box
    wanted = pixels[mix.first].clone()
    wanted[:, top:bottom, left:right] = pixels[mix.second][:, top:bottom, left:right]
    assert torch.equal(mixed, wanted)
    assert mix.share == pytest.approx(1 - (right - left) * (bottom - top) / 64)


def test_a_mix_depends_on_its_position_and_the_seed_alone() -> None:
    drawn = [mixup.draw("mixup", index, 50, 32, 1.0, seed=3) for index in range(20)]
    again = [mixup.draw("mixup", index, 50, 32, 1.0, seed=3) for index in reversed(range(20))]
    assert drawn == again[::-1]
    assert drawn != [mixup.draw("mixup", index, 50, 32, 1.0, seed=4) for index in range(20)]


def test_shares_follow_the_beta_distribution_in_steps_of_a_hundredth() -> None:
    """Beta(1, 1) is uniform: mean 1/2, variance 1/12; Beta(b, b) has the variance 1 / (4 (2 b + 1))."""
    for beta in (1.0, 4.0):
        shares = np.array([mixup.draw("mixup", index, 9, 32, beta, 0).share for index in range(3000)])
        assert np.abs(shares * 100 - np.round(shares * 100)).max() < 1e-9
        deviation = math.sqrt(1 / (4 * (2 * beta + 1)))
        assert shares.mean() == pytest.approx(0.5, abs=4 * deviation / math.sqrt(3000))
        assert shares.std() == pytest.approx(deviation, rel=0.06)


def test_a_share_at_the_margin_counts_as_nearly_one_of_the_two() -> None:
    shares = (0.05, 0.06, 0.5, 0.94, 0.95)
    near = [mix.nearly_one_of_the_two(0.05) for mix in starmap(Mix, [(0, 1, share) for share in shares])]
    assert near == [True, False, False, False, True]


@pytest.mark.parametrize("maker", ["mixup", "cutmix"])
def test_a_mix_that_is_drawn_apart_lies_within_the_margins(maker: str) -> None:
    mixes = [mixup.draw_apart(maker, index, 5, 32, 0.3, 0, margin=0.2) for index in range(200)]  # type: ignore[arg-type]
    assert all(0.2 < mix.share < 0.8 and mix.first != mix.second for mix in mixes)


def test_one_image_cannot_be_mixed() -> None:
    with pytest.raises(DataError, match="mixes need 2"):
        mixup.draw("mixup", 0, 1, 32, 1.0, 0)


def test_a_mix_of_an_image_with_itself_would_be_that_image() -> None:
    pixels = pictures(1)
    (mixed,) = mixup.blend(pixels, [Mix(0, 0, 0.37)])
    assert torch.equal(mixed, to_pixels(pixels[0].float() / 255))
