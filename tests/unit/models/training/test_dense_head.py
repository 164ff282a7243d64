"""A linear layer on the tokens of patches is the optimum for the shares of classes that these show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from models import teachers
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


def test_no_more_patches_are_learnt_from_than_allowed(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    fit = linear_probe.fit_shares

    def counting(features: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seen.append(len(features))
        return fit(features, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(linear_probe, "fit_shares", counting)
    dense_head.fit(teacher, shots_of(4), DenseHeadParams(most_patches=100), seed=0)
    dense_head.fit(teacher, shots_of(4), DenseHeadParams(), seed=0)
    assert 60 < seen[0] < 140  # drawn, so about
    assert seen[1] == 4 * 2 * 64


def test_masks_that_know_no_class_are_nothing_to_learn_from(teacher: Teacher) -> None:
    shots = shots_of(2)
    blank = Shots(shots.pixels, [torch.full_like(mask, IGNORED) for mask in shots.masks], CLASSES)
    with pytest.raises(
        DataError, match="no pixel that is learnt from in 2 of the masks has a class"
    ) as caught:
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
