from __future__ import annotations

import numpy as np
import pytest
import torch

from models.data import augment
from models.data.augment import Augmentation
from models.runtime import generator

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]])
IMAGES = torch.rand(64, 3, 32, 32, generator=generator(0))


def test_without_any_change_the_images_stay_as_they_are() -> None:
    still = Augmentation(shift=0, flip=False)
    assert torch.allclose(still(IMAGES, WHOLE.repeat(64, 1), generator(1)), IMAGES, atol=1e-5)


def test_a_mirrored_view_is_the_mirror_image() -> None:
    mirrored = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]]).repeat(64, 1)
    assert torch.allclose(augment.look(IMAGES, mirrored), IMAGES.flip(-1), atol=1e-5)


def test_a_view_of_the_lower_right_quarter_shows_that_quarter() -> None:
    quarter = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.0]])
    image = torch.zeros(1, 3, 32, 32)
    image[..., 16:, 16:] = 1
    seen = augment.look(image, quarter)
    assert float(seen[..., 1:, 1:].min()) == pytest.approx(1, abs=1e-5)
    assert float(augment.look(image, torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.0]]))[..., :-1, :-1].max()) < 1e-5


def test_shifts_move_whole_pixels_and_reflect_at_the_border() -> None:
    changed = Augmentation(shift=0.125, flip=False)(IMAGES, WHOLE.repeat(64, 1), generator(2))
    padded = np.pad(IMAGES.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="symmetric")
    offsets = set()
    for index in range(64):
        matches = [
            (row, column)
            for row in range(9)
            for column in range(9)
            if np.allclose(
                changed[index].numpy(), padded[index, :, row : row + 32, column : column + 32], atol=1e-4
            )
        ]
        assert len(matches) == 1
        offsets.add(matches[0])
    assert len(offsets) > 25


def test_half_of_the_images_are_mirrored() -> None:
    changed = Augmentation(shift=0)(IMAGES, WHOLE.repeat(64, 1), generator(3))
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-4) for a, b in zip(changed, IMAGES, strict=True)]
    kept = [torch.allclose(a, b, atol=1e-4) for a, b in zip(changed, IMAGES, strict=True)]
    assert sum(mirrored) + sum(kept) == 64
    assert 20 <= sum(mirrored) <= 44


def test_mixup_blends_images_and_targets_by_the_same_share() -> None:
    targets = torch.eye(64)
    mixed, (blended,) = augment.mixup(IMAGES, (targets,), 1.0, generator(4))
    # Row i of the blended identity holds the weights with which the images were blended.
    assert torch.allclose(mixed, torch.einsum("ij,jchw->ichw", blended, IMAGES), atol=1e-5)
    assert torch.allclose(blended.sum(1), torch.ones(64))
    assert 0.01 < float(blended.diagonal().mean()) < 0.99


def test_cutmix_mixes_targets_by_the_area_that_was_pasted() -> None:
    targets = torch.eye(64)
    mixed, (blended,) = augment.cutmix(IMAGES, (targets,), 1.0, generator(6))
    kept = (mixed == IMAGES).all(1).float().mean((1, 2))
    partners = blended.argsort(1, descending=True)[:, :2]
    assert torch.allclose(blended.sum(1), torch.ones(64))
    for index in range(64):
        other = next((int(p) for p in partners[index] if p != index and blended[index, p] > 0), index)
        pasted = (mixed[index] == IMAGES[other]).all(0)
        assert bool((pasted | (mixed[index] == IMAGES[index]).all(0)).all())
        assert float(kept[index]) == pytest.approx(float(blended[index, index]), abs=1e-5)


def test_beta_has_the_moments_of_its_distribution() -> None:
    random = generator(7)
    draws = torch.tensor([augment.beta(0.4, random) for _ in range(4000)])
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(draws.var()) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)


def test_saturation_leaves_grey_images_grey() -> None:
    grey = torch.rand(8, 1, 16, 16, generator=generator(8)).repeat(1, 3, 1, 1)
    changed = augment.jitter_colours(grey, 0.5, generator(9))
    assert torch.allclose(changed[:, 0], changed[:, 2], atol=1e-5)
    assert not torch.allclose(changed, grey, atol=1e-2)


def test_erasing_greys_a_rectangle_of_the_promised_area() -> None:
    erased = augment.erase_rectangles(IMAGES, 1.0, generator(10))
    area = (erased == 0.5).all(1).float().mean((1, 2))
    assert float(area.max()) <= 0.28  # whole pixels round a little above 25 %
    assert float(area.mean()) > 0.05
    assert torch.equal(erased[(erased != 0.5)], IMAGES[(erased != 0.5)])


def test_views_are_the_same_whenever_they_are_made_and_lie_inside_the_image() -> None:
    position, number = torch.arange(40).repeat_interleave(8), torch.arange(8).repeat(40)
    views = augment.view_boxes(position, number)
    assert torch.equal(views, augment.view_boxes(position, number))
    assert torch.equal(views[0], WHOLE[0])
    left, top, width, height, mirrored = views.unbind(1)
    assert float(torch.stack([left, top]).min()) >= 0
    assert float(torch.stack([left + width, top + height]).max()) <= 1 + 1e-6
    assert 0.25 < float((width * height).min()) < 0.5
    assert set(mirrored.tolist()) == {0.0, 1.0}
