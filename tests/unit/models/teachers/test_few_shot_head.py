from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.runtime import generator
from models.stages import HeadParams
from models.teachers import few_shot_head

FEATURES = torch.randn(30, 8, generator=generator(0)) + 2
LABELS = torch.arange(30) % 3
CENTRE = FEATURES.mean(0)
CLASSES = ("a", "b", "c")
IMAGES = torch.arange(30)


def unit(features: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    centred = features - CENTRE.numpy().astype(np.float64)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)  # type: ignore[no-any-return]


def test_the_ridge_head_solves_the_penalised_normal_equations() -> None:
    params = HeadParams(head="ridge", ridge_lambda=0.3, logit_scale=5)
    head = few_shot_head.fit(FEATURES, LABELS, IMAGES, CENTRE, params, CLASSES, 128)
    # The primal form with a column of ones whose weight goes free of the penalty.
    design = np.hstack([unit(FEATURES.numpy().astype(np.float64)), np.ones((30, 1))])
    penalty = 0.3 * np.diag([1.0] * 8 + [0.0])
    solution = np.linalg.solve(design.T @ design + penalty, design.T @ np.eye(3)[LABELS.numpy()])
    assert np.allclose(head.logits(FEATURES).numpy(), 5 * design @ solution, atol=1e-4)


def test_the_prototype_head_chooses_the_nearest_class_mean() -> None:
    head = few_shot_head.fit(FEATURES, LABELS, IMAGES, CENTRE, HeadParams(head="prototypes"), CLASSES, 128)
    rows = unit(FEATURES.numpy().astype(np.float64))
    means = np.stack([rows[LABELS.numpy() == label].mean(0) for label in range(3)])
    distances = ((rows[:, None] - means[None]) ** 2).sum(-1)
    logits = head.logits(FEATURES).numpy()
    assert np.array_equal(logits.argmax(1), distances.argmin(1))
    gaps = -distances / 2 * 12
    assert np.allclose(logits - logits[:, :1], gaps - gaps[:, :1], atol=1e-4)


@pytest.mark.parametrize("kind", ["ridge", "prototypes"])
def test_a_head_is_stored_and_read_without_loss(kind: str, tmp_path: Path) -> None:
    params = HeadParams.model_validate({"head": kind})
    head = few_shot_head.fit(FEATURES, LABELS, IMAGES, CENTRE, params, CLASSES, 128)
    head.save(tmp_path)
    read = few_shot_head.load(tmp_path)
    assert torch.equal(read.logits(FEATURES), head.logits(FEATURES))
    assert (read.classes, read.input_size, read.kind) == (CLASSES, 128, kind)


def test_a_refitted_head_equals_one_fitted_to_those_images_alone() -> None:
    params = HeadParams(ridge_lambda=0.7)
    head = few_shot_head.fit(FEATURES, LABELS, IMAGES, CENTRE, params, CLASSES, 128)
    part, centre = FEATURES[:12], FEATURES[:12].mean(0)
    alone = few_shot_head.fit(part, LABELS[:12], IMAGES[:12], centre, params, CLASSES, 128)
    refitted = head.refit(part, LABELS[:12], IMAGES[:12], centre)
    assert torch.equal(refitted.logits(FEATURES), alone.logits(FEATURES))
    assert not torch.allclose(refitted.logits(FEATURES), head.logits(FEATURES))


def test_the_ridge_head_is_the_same_with_more_rows_than_columns_and_with_fewer() -> None:
    """Its dual and its primal form solve one problem: a copy of every row at half the weight changes nothing."""
    rows, targets = FEATURES[:6].double(), torch.eye(3).repeat(2, 1).double()
    dual = few_shot_head.ridge(rows, torch.ones(6).double(), 0.5)(targets)
    twice = torch.cat([rows, rows]), torch.full((12,), 0.5).double()
    primal = few_shot_head.ridge(*twice, 0.5)(torch.cat([targets, targets]))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(dual, primal, strict=True))


def softmax(scores: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)  # type: ignore[no-any-return]


def test_self_training_fits_again_to_soft_labels_shared_by_the_views_of_an_image() -> None:
    params = HeadParams(ridge_lambda=0.3, logit_scale=5, rounds=2, unlabelled_weight=3)
    labels = torch.where(IMAGES < 12, LABELS, -1)
    image = torch.where(IMAGES < 12, IMAGES, IMAGES // 2 * 2)  # two views of each unlabelled image
    head = few_shot_head.fit(FEATURES, labels, image, CENTRE, params, CLASSES, 128)

    rows = unit(FEATURES.numpy().astype(np.float64))
    design = np.hstack([rows, np.ones((30, 1))])
    penalty = 0.3 * np.diag([1.0] * 8 + [0.0])

    def solved(used: slice, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        part = design[used]
        gram = (part.T * weights) @ part + penalty
        return np.linalg.solve(gram, (part.T * weights) @ targets)  # type: ignore[no-any-return]

    truth = np.eye(3)[LABELS[:12].numpy()]
    solution = solved(slice(12), truth, np.ones(12))
    weights = np.r_[np.ones(12), np.full(18, 3 * 12 / 18)]
    for _ in range(2):
        scores = (design[12:] @ solution).reshape(9, 2, 3).mean(1).repeat(2, axis=0)
        solution = solved(slice(30), np.vstack([truth, softmax(5 * scores)]), weights)
    assert np.allclose(head.logits(FEATURES).numpy(), 5 * design @ solution, atol=1e-4)


def test_without_rounds_or_without_unlabelled_images_only_labelled_ones_count() -> None:
    alone = few_shot_head.fit(
        FEATURES[:12], LABELS[:12], IMAGES[:12], CENTRE, HeadParams(rounds=10), CLASSES, 128
    )
    labels = torch.where(IMAGES < 12, LABELS, -1)
    params = HeadParams(rounds=0)
    head = few_shot_head.fit(FEATURES, labels, IMAGES, CENTRE, params, CLASSES, 128)
    assert torch.equal(head.logits(FEATURES), alone.logits(FEATURES))


@pytest.mark.parametrize("kind", ["ridge", "prototypes"])
def test_self_training_finds_the_clusters_that_few_labels_only_hint_at(kind: str) -> None:
    random = generator(4)
    truth = torch.arange(600) % 3
    middles = 2.2 * torch.eye(3, 16)
    features = middles[truth] + torch.randn(600, 16, generator=random)
    labels = torch.where(torch.arange(600) < 15, truth, -1)

    def accuracy(rounds: int) -> float:
        params = HeadParams.model_validate({"head": kind, "rounds": rounds})
        image = torch.arange(600)
        head = few_shot_head.fit(features, labels, image, features.mean(0), params, CLASSES, 128)
        return float((head.logits(features[15:]).argmax(1) == truth[15:]).float().mean())

    assert accuracy(10) > accuracy(0) + 0.05
