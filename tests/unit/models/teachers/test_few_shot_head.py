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


def unit(features: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    centred = features - CENTRE.numpy().astype(np.float64)
    return centred / np.linalg.norm(centred, axis=1, keepdims=True)  # type: ignore[no-any-return]


def test_the_ridge_head_solves_the_penalised_normal_equations() -> None:
    params = HeadParams(head="ridge", ridge_lambda=0.3, logit_scale=5)
    head = few_shot_head.fit(FEATURES, LABELS, CENTRE, params, CLASSES, 128)
    # The primal form with a column of ones whose weight goes free of the penalty.
    design = np.hstack([unit(FEATURES.numpy().astype(np.float64)), np.ones((30, 1))])
    penalty = 0.3 * np.diag([1.0] * 8 + [0.0])
    solution = np.linalg.solve(design.T @ design + penalty, design.T @ np.eye(3)[LABELS.numpy()])
    assert np.allclose(head.logits(FEATURES).numpy(), 5 * design @ solution, atol=1e-4)


def test_the_prototype_head_chooses_the_nearest_class_mean() -> None:
    head = few_shot_head.fit(FEATURES, LABELS, CENTRE, HeadParams(head="prototypes"), CLASSES, 128)
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
    head = few_shot_head.fit(FEATURES, LABELS, CENTRE, params, CLASSES, 128)
    head.save(tmp_path)
    read = few_shot_head.load(tmp_path)
    assert torch.equal(read.logits(FEATURES), head.logits(FEATURES))
    assert (read.classes, read.input_size, read.kind) == (CLASSES, 128, kind)


def test_a_refitted_head_equals_one_fitted_to_those_images_alone() -> None:
    params = HeadParams(ridge_lambda=0.7)
    head = few_shot_head.fit(FEATURES, LABELS, CENTRE, params, CLASSES, 128)
    part, centre = FEATURES[:12], FEATURES[:12].mean(0)
    alone = few_shot_head.fit(part, LABELS[:12], centre, params, CLASSES, 128)
    refitted = head.refit(part, LABELS[:12], centre)
    assert torch.equal(refitted.logits(FEATURES), alone.logits(FEATURES))
    assert not torch.allclose(refitted.logits(FEATURES), head.logits(FEATURES))
