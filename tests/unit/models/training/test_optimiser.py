from __future__ import annotations

import pytest
import torch
from torch import nn

from models.training import optimiser


def test_the_learning_rate_rises_to_its_highest_and_falls_to_almost_nothing() -> None:
    rates = [optimiser.one_cycle(step, 1000, 0.01) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01 / 25)
    assert max(rates) == pytest.approx(rates[150]) == pytest.approx(0.01)
    assert rates[1000] == pytest.approx(1e-6)
    assert rates[:151] == sorted(rates[:151])
    assert rates[150:] == sorted(rates[150:], reverse=True)


def test_the_schedule_equals_torch_s_own_one_cycle() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        sgd,
        max_lr=0.3,
        total_steps=201,
        pct_start=0.155,
        div_factor=25,
        final_div_factor=400,
        cycle_momentum=False,
    )
    for step in range(200):  # torch turns one step before pct_start: 0.155 * 201 - 1 = 30.155
        assert optimiser.one_cycle(step, 200, 0.3) == pytest.approx(reference.get_last_lr()[0], abs=2e-3)
        sgd.step()
        reference.step()


def test_biases_and_norms_do_not_decay() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    decaying, others = optimiser.adamw(network, 0.1, 0.5).param_groups
    assert [tuple(p.shape) for p in decaying["params"]] == [(2, 3)]
    assert decaying["weight_decay"] == 0.5
    assert others["weight_decay"] == 0
    assert len(others["params"]) == 3


def test_the_average_follows_its_recurrence_and_copies_counters() -> None:
    network = nn.BatchNorm1d(1)
    average = optimiser.WeightAverage(network, 0.9)
    expected = 1.0
    for step, value in enumerate((3.0, -2.0, 5.0)):
        with torch.no_grad():
            network.weight.fill_(value)
        network.num_batches_tracked += 1
        average.update(network, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    assert float(average.network.weight) == pytest.approx(expected)  # type: ignore[arg-type]
    assert int(average.network.num_batches_tracked) == 3  # type: ignore[arg-type]
    assert not average.network.training
