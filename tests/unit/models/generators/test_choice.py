"""Which synthetic images are asked about."""

from __future__ import annotations

import numpy as np
import torch

from models.generators import choice


def test_the_least_sure_of_each_class_are_chosen() -> None:
    sure, unsure = [0.98, 0.01, 0.01], [0.4, 0.3, 0.3]
    probabilities = torch.tensor([sure, unsure, sure[::-1], unsure[::-1], sure, unsure])
    assert choice.least_sure(probabilities, 3).tolist() == [1, 3, 5]


def test_a_class_that_is_rarely_named_gets_its_share() -> None:
    random = np.random.default_rng(0)
    first = random.dirichlet([3, 1, 1], 300)
    first[:, 0] += 1
    rare = np.tile([0.01, 0.98, 0.01], (5, 1))
    rows = np.concatenate([first / first.sum(1, keepdims=True), rare])
    chosen = choice.least_sure(torch.tensor(rows), 60)
    assert len(chosen) == len(set(chosen.tolist())) == 60
    assert set(range(300, 305)) <= set(chosen.tolist())
    entropy = -(rows * np.log(rows)).sum(1)
    left = np.setdiff1d(np.arange(300), chosen.numpy())
    common = chosen[chosen < 300].numpy()
    assert entropy[common].min() >= entropy[left].max()


def test_all_are_chosen_where_all_may_be() -> None:
    probabilities = torch.rand(7, 3).softmax(1)
    assert choice.least_sure(probabilities, 7).tolist() == list(range(7))
