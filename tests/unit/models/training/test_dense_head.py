"""A linear layer on the tokens of patches is the optimum for the shares of classes that these show."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional

from models import teachers
from models.arrays import Mask
from models.data import images, masks
from models.data.archive import IGNORED
from models.errors import DataError
from models.methods.wecolora_segmentation import DenseHeadParams
from models.runtime import generator
from models.students import dense_vit
from models.teachers.protocol import Teacher
from models.training import dense_head, linear_probe
from models.training.dense_head import Shots
from tests import rendered_masks, tiny_vit

CLASSES = rendered_masks.CLASSES


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """Of images of 64 pixels: 8 x 8 patches."""
    return teachers.load(tiny_vit.write(tmp_path_factory.mktemp("teacher")), "cpu", 64)


def shots_of(count: int, seed: int = 0) -> Shots:
    random = np.random.default_rng(seed)
    scenes = [rendered_masks.scene(random, 64, 64) for _ in range(count)]
    pixels = torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture, _ in scenes])
    return Shots(pixels, [torch.from_numpy(mask) for _, mask in scenes], CLASSES)


def test_shares_of_one_class_are_what_labels_are() -> None:
    random = generator(0)
    features = torch.randn(40, 5, generator=random) * 3 + 1
    labels = torch.randint(0, 3, (40,), generator=random)
    expected = linear_probe.fit(features, labels, 3, penalty=0.05)
    twice = linear_probe.fit_shares(features, 2 * functional.one_hot(labels, 3), 0.05)
    for found, wanted in zip(twice, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_mixed_row_counts_as_both_of_its_classes() -> None:
    random = generator(1)
    features = torch.randn(30, 4, generator=random)
    shares = torch.rand(30, 2, generator=random)
    shares[3] = 0  # counts for nothing
    centre, weight, bias = linear_probe.fit_shares(features, shares, penalty=0.1)
    seen = shares.sum(1) > 0
    kept = features[seen].double()
    deviation = kept.std(0, correction=0)
    coefficients = (weight.double() * deviation[:, None]).requires_grad_()
    offset = bias.double().requires_grad_()
    logits = (kept - centre) / deviation @ coefficients + offset
    each = shares[seen].double()
    rows = torch.cat([logits, logits])  # each row once as its first class and once as its second, weighted
    truth = torch.arange(2).repeat_interleave(len(kept))
    losses = functional.cross_entropy(rows, truth, reduction="none")
    loss = (each.T.flatten() * losses).sum() / each.sum() + 0.05 * coefficients.square().sum()
    loss.backward()
    assert coefficients.grad is not None
    assert offset.grad is not None
    assert coefficients.grad.abs().max() < 1e-3
    assert offset.grad.abs().max() < 1e-3


def test_a_head_fits_the_shares_of_all_patches_and_of_their_mirror_images(teacher: Teacher) -> None:
    shots = shots_of(3)
    both = Shots(
        torch.cat([shots.pixels, shots.pixels.flip(-1)]),
        [*shots.masks, *(mask.flip(-1) for mask in shots.masks)],
        CLASSES,
    )
    mirrored = dense_head.fit(teacher, shots, DenseHeadParams(mirror=True), seed=0)
    expected = dense_head.fit(teacher, both, DenseHeadParams(mirror=False), seed=0)
    torch.testing.assert_close(mirrored.weight, expected.weight, rtol=1e-3, atol=1e-3)
    ready = images.normalise(shots.pixels.float() / 255, teacher.mean, teacher.std)
    tokens = dense_vit.patch_tokens(teacher.network, ready).flatten(0, 1)
    shares = torch.cat([masks.cell_shares(mask, 8, 3) for mask in shots.masks])
    answers = mirrored(tokens).softmax(-1)
    assert (answers - shares).abs().mean() < 0.05


@pytest.fixture
def learnt_from(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many patches each head was fitted to."""
    counts: list[int] = []
    fit = linear_probe.fit_shares

    def counting(features: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        counts.append(len(features))
        return fit(features, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(linear_probe, "fit_shares", counting)
    return counts


def test_no_more_patches_are_learnt_from_than_allowed(teacher: Teacher, learnt_from: list[int]) -> None:
    dense_head.fit(teacher, shots_of(4), DenseHeadParams(most_patches=100), seed=0)
    dense_head.fit(teacher, shots_of(4), DenseHeadParams(), seed=0)
    assert learnt_from == [100, 4 * 2 * 64]


def test_few_known_patches_are_all_learnt_from_among_many_unknown_ones(
    teacher: Teacher, learnt_from: list[int]
) -> None:
    shots = shots_of(4)
    for mask in shots.masks:
        mask[8:] = IGNORED  # but for one of the 8 rows of patches
    dense_head.fit(teacher, shots, DenseHeadParams(most_patches=100), seed=0)
    assert learnt_from == [4 * 2 * 8]


def test_drawn_patches_come_from_all_images_alike(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image shows a class of its own."""
    shots = shots_of(40)
    alone = [torch.full_like(mask, number) for number, mask in enumerate(shots.masks)]
    drawn: list[torch.Tensor] = []

    def fit(features: torch.Tensor, shares: torch.Tensor, penalty: float) -> tuple[torch.Tensor, ...]:
        drawn.append(shares.sum(0))
        return features[0], torch.zeros(features.shape[1], 40), torch.zeros(40)

    monkeypatch.setattr(linear_probe, "fit_shares", fit)
    each = Shots(shots.pixels, alone, tuple(str(number) for number in range(40)))
    dense_head.fit(teacher, each, DenseHeadParams(most_patches=1200, mirror=False), seed=0)
    (counts,) = drawn
    assert int(counts.sum()) == 1200
    assert 15 < counts.min() <= counts.max() < 45  # 30 of 64 each, within 4 deviations


class Counted:
    """Masks of which the most that were in memory at once are counted."""

    def __init__(self, masks: list[Mask]) -> None:
        self.masks = masks
        self.most = 0

    def __iter__(self) -> Iterator[Mask]:
        given: list[weakref.ref[Mask]] = []
        for mask in self.masks:
            copy = mask.clone()
            given.append(weakref.ref(copy))
            self.most = max(self.most, sum(each() is not None for each in given))
            yield copy
            del copy


def test_masks_are_not_all_in_memory_at_once(teacher: Teacher) -> None:
    shots = shots_of(8)
    many = Counted(list(shots.masks) * 10)
    repeated = Shots(shots.pixels.repeat(10, 1, 1, 1), many, CLASSES)
    head = dense_head.fit(teacher, repeated, DenseHeadParams(mirror=False), seed=0)
    assert many.most <= 2 * dense_head._AT_ONCE + 1 < len(repeated)
    many.most = 0
    dense_head.confusions(teacher, head, repeated)
    assert many.most <= 2


def test_chosen_images_keep_their_masks_however_often_they_are_gone_through() -> None:
    shots = shots_of(5)
    chosen = torch.tensor([True, False, False, True, False])
    few = shots.where(chosen)
    assert torch.equal(few.pixels, shots.pixels[[0, 3]])
    for _ in range(2):
        found = list(few.masks)
        assert len(found) == len(few) == 2
        for mask, row in zip(found, (0, 3), strict=True):
            assert torch.equal(mask, list(shots.masks)[row])


def test_masks_that_know_no_class_are_nothing_to_learn_from(teacher: Teacher) -> None:
    shots = shots_of(2)
    blank = Shots(shots.pixels, [torch.full_like(mask, IGNORED) for mask in shots.masks], CLASSES)
    with pytest.raises(DataError, match="no pixel of the 2 masks that are learnt from has a class") as caught:
        dense_head.fit(teacher, blank, DenseHeadParams(), seed=0)
    assert "255" in caught.value.hint


def test_pixels_are_counted_by_class_and_answer(teacher: Teacher) -> None:
    shots = shots_of(2)
    always = dense_vit.DenseHead(
        torch.zeros(tiny_vit.WIDTH), torch.zeros(tiny_vit.WIDTH, 3), torch.tensor([0.0, 1.0, 0.0])
    )
    for counts, mask in zip(dense_head.confusions(teacher, always, shots), shots.masks, strict=True):
        assert counts[:, 1].tolist() == [int((mask == label).sum()) for label in range(3)]
        assert int(counts.sum()) == int((mask != IGNORED).sum())


def test_folds_hold_each_image_once_and_are_of_equal_size() -> None:
    fold = dense_head.folds(13, 5, seed=0)
    assert sorted(torch.bincount(fold).tolist()) == [2, 2, 3, 3, 3]
    assert torch.equal(fold, dense_head.folds(13, 5, seed=0))
    assert not torch.equal(fold, dense_head.folds(13, 5, seed=1))
