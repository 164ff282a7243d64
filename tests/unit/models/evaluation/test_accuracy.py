"""Intervals against closed formulas, published values and coverage in simulation."""

import math

import numpy as np
import pytest

from models.evaluation import accuracy


# Agresti and Coull, The American Statistician 52 (1998), and Newcombe, Statistics in Medicine 17 (1998), table I:
# 81/263 is 0.2553 to 0.3662, 15/148 is 0.0624 to 0.1605, 0/20 is 0 to 0.1611, 1/29 is 0.0061 to 0.1718.
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_limits(correct, total, low, high):
    assert accuracy.wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_fractional_counts_solves_the_score_equation():
    low, high = accuracy.wilson(12.5, 40.25)
    share, z = 12.5 / 40.25, 1.959963984540054
    for limit in (low, high):  # |share - p| = z sqrt(p (1 - p) / n) at both limits
        assert abs(share - limit) == pytest.approx(z * math.sqrt(limit * (1 - limit) / 40.25), rel=1e-9)


def test_wilson_of_no_answers_says_nothing():
    assert accuracy.wilson(0, 0) == (0.0, 1.0)


def test_a_test_split_counts_every_answer():
    measured = accuracy.on_test_split(np.array([True] * 30 + [False] * 10))
    assert (measured.value, measured.correct, measured.total, measured.effective_total) == (
        0.75,
        30,
        40,
        40.0,
    )
    assert (measured.low, measured.high) == accuracy.wilson(30, 40)


def test_cross_validation_is_less_sure_than_a_test_split_of_the_same_size():
    fold = np.array([True] * 12 + [False] * 8)
    folds = [fold] * 5
    found = accuracy.cross_validated(folds)
    # equal folds: only Nadeau and Bengio's 1 + K/(K - 1) = 2.25 is left
    assert found.effective_total == pytest.approx(100 / 2.25)
    assert (found.value, found.correct, found.total) == (0.6, 60, 100)
    test_split = accuracy.on_test_split(np.concatenate(folds))
    assert found.low < test_split.low < test_split.high < found.high


def test_folds_that_differ_widen_the_interval_further():
    equal = [np.array([True] * 10 + [False] * 10)] * 4
    uneven = [np.array([True] * k + [False] * (20 - k)) for k in (2, 6, 14, 18)]
    # observed variance of the fold means (0.1, 0.3, 0.7, 0.9) is 0.4/3, the binomial one 0.25/20
    assert accuracy.design_effect(uneven) == pytest.approx((1 + 4 / 3) * (0.4 / 3) / (0.25 / 20))
    assert accuracy.cross_validated(uneven).effective_total < accuracy.cross_validated(equal).effective_total


def test_all_right_in_every_fold_is_not_certainty():
    found = accuracy.cross_validated([np.ones(4, dtype=bool)] * 5)
    assert found.value == 1.0
    assert found.low < accuracy.wilson(20, 20)[0] < found.high == pytest.approx(1.0)


def test_the_cross_validated_interval_covers_the_true_accuracy_and_the_binomial_one_does_not():
    """Nearest class means on Gaussian data, where the trained classifier's true accuracy has a formula."""
    random = np.random.default_rng(0)
    dimensions, per_class, folds, draws = 20, 20, 5, 1500
    shift = np.zeros(dimensions)
    shift[0] = 0.8
    covered = {"cross_validated": 0, "binomial": 0}
    for _ in range(draws):
        data = random.standard_normal((2, per_class, dimensions)) + np.stack([-shift, shift])[:, None]
        fold = np.arange(per_class) % folds
        right = []
        for number in range(folds):
            means = data[:, fold != number].mean(1)
            held = data[:, fold == number]
            distance = ((held[:, :, None] - means[None, None]) ** 2).sum(-1)
            right.append((distance.argmin(-1) == np.array([0, 1])[:, None]).ravel())
        truth = _accuracy_of_means(data.mean(1), shift)
        found = accuracy.cross_validated(right)
        naive = accuracy.wilson(found.correct, found.total)
        covered["cross_validated"] += found.low <= truth <= found.high
        covered["binomial"] += naive[0] <= truth <= naive[1]
    assert covered["cross_validated"] / draws >= 0.95
    assert covered["binomial"] / draws < 0.93


def _accuracy_of_means(means, shift):
    """The chance that a new point N(-shift or shift, 1) lies nearer to its own class's mean."""
    direction = means[1] - means[0]
    middle = means.mean(0)
    length = np.linalg.norm(direction)
    first = (middle + shift) @ direction / length
    second = (shift - middle) @ direction / length
    return 0.5 * (_normal(first) + _normal(second))


def _normal(value):
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


def test_per_class_rows_and_confusion_count_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 2])
    answers = np.array([0, 0, 1, 1, 0, 1])
    counts = accuracy.confusion(labels, answers, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    cat, dog, owl, yak = accuracy.per_class(labels, answers, ("cat", "dog", "owl", "yak"))
    assert (cat.label, cat.images, cat.correct) == ("cat", 3, 2)
    assert (cat.recall, cat.precision) == pytest.approx((2 / 3, 2 / 3))
    assert (dog.recall, dog.precision) == pytest.approx((1 / 2, 1 / 3))
    assert (owl.recall, owl.precision) == (0.0, None)
    assert (yak.images, yak.recall, yak.recall_low, yak.precision) == (0, None, None, None)
    assert (cat.recall_low, cat.recall_high) == accuracy.wilson(2, 3)
