from __future__ import annotations

import numpy as np
import torch
from scipy.special import log_softmax, rel_entr, softmax

from models.training import losses

RANDOM = np.random.default_rng(0)
STUDENT, TEACHER = RANDOM.normal(size=(2, 6, 4))


def test_distillation_is_t_squared_times_the_mean_divergence() -> None:
    temperature = 3.0
    teacher = softmax(TEACHER / temperature, axis=1)
    student = softmax(STUDENT / temperature, axis=1)
    expected = temperature**2 * rel_entr(teacher, student).sum(1).mean()
    softened = losses.softened(torch.tensor(TEACHER), temperature)
    value = float(losses.distillation(torch.tensor(STUDENT), softened, temperature))
    assert np.isclose(value, expected, rtol=1e-10)


def test_distillation_vanishes_for_a_student_that_agrees() -> None:
    softened = losses.softened(torch.tensor(TEACHER), 2.0)
    assert abs(float(losses.distillation(torch.tensor(TEACHER + 5), softened, 2.0))) < 1e-12


def test_cross_entropy_counts_only_the_rows_with_a_label() -> None:
    targets = np.zeros((6, 4))
    targets[1, 2] = targets[4, 0] = 1
    log_p = log_softmax(STUDENT, axis=1)
    expected = -(log_p[1, 2] + log_p[4, 0]) / 2
    assert np.isclose(float(losses.cross_entropy(torch.tensor(STUDENT), torch.tensor(targets))), expected)


def test_cross_entropy_is_zero_without_any_label() -> None:
    assert float(losses.cross_entropy(torch.tensor(STUDENT), torch.zeros(6, 4))) == 0
