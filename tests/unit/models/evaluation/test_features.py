"""Likeness of features: against values known beforehand, and against other ways to compute them."""

from __future__ import annotations

import numpy as np
import pytest

from models.evaluation import features

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(size=(60, 8))


def test_a_cosine_is_one_for_any_length_and_nothing_for_a_right_angle() -> None:
    first = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    second = np.array([[3.0, 0.0], [1.0, 0.0], [-2.0, -2.0]])
    np.testing.assert_allclose(features.cosines(first, second), [1, 0, -1], atol=1e-12)
    assert features.mean_cosine(first, second).value == pytest.approx(0)
    same = features.mean_cosine(ROWS, 3 * ROWS)
    assert (same.low, same.value, same.high) == pytest.approx((1, 1, 1))


def test_the_interval_of_a_mean_cosine_is_that_of_a_mean() -> None:
    other = ROWS + RANDOM.normal(size=ROWS.shape)
    found = features.mean_cosine(ROWS, other)
    values = features.cosines(ROWS, other)
    reach = 1.96 * values.std() / np.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - reach, abs=0.3 * reach)
    assert found.high == pytest.approx(values.mean() + reach, abs=0.3 * reach)


def test_cka_does_not_see_turning_scaling_and_moving() -> None:
    turned, _ = np.linalg.qr(RANDOM.normal(size=(8, 8)))
    found = features.cka(ROWS, 5 * ROWS @ turned + 7)
    assert (found.low, found.value, found.high) == pytest.approx((1, 1, 1))


def test_cka_is_the_alignment_of_centred_similarities() -> None:
    other = ROWS[:, :5] + RANDOM.normal(size=(60, 5))
    centring = np.eye(60) - 1 / 60
    first, second = (centring @ (rows @ rows.T) @ centring for rows in (ROWS, other))
    expected = (first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum())
    found = features.cka(ROWS, other)
    assert found.value == pytest.approx(expected)
    assert 0 <= found.low < found.value < found.high <= 1


def test_the_nearest_is_another_row_or_a_known_one() -> None:
    asked = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.2, 1.0]])
    assert features.nearest(asked).tolist() == [1, 0, 3, 2]
    known = np.array([[0.0, 9.0], [0.1, 0.0]])
    assert features.nearest(asked, known).tolist() == [1, 1, 0, 0]
