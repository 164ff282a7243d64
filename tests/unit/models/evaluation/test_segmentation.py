"""Intersection over union, pixel accuracy and their intervals, against what was worked out by hand or by sets."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from models.data.archive import IGNORED
from models.evaluation import segmentation
from models.evaluation.segmentation import Counts

CLASSES = ("ground", "disc", "square")


def test_figures_are_those_worked_out_by_hand() -> None:
    truth = np.array([[0, 0, 1], [1, IGNORED, 2]], np.uint8)
    answer = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    confusion = segmentation.confusion(truth, answer, 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    counts = segmentation.counts_of(confusion[None])
    assert segmentation.ious(counts[0]).tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert segmentation.mean_iou(counts[0]) == pytest.approx(1 / 3)
    assert segmentation.pixel_accuracy(counts[0]) == pytest.approx(3 / 5)


def test_a_class_that_neither_occurs_nor_is_answered_does_not_count() -> None:
    confusion = np.array([[[6, 2, 0], [0, 4, 0], [0, 0, 0]]])
    counts = segmentation.counts_of(confusion)
    assert segmentation.mean_iou(counts[0]) == pytest.approx((6 / 8 + 4 / 6) / 2)
    rows = segmentation.per_class(counts, counts, CLASSES)
    assert (rows[2].iou, rows[2].teacher_iou, rows[2].images, rows[2].pixels) == (None, None, 0, 0)
    confusion[0, 0, 2] = 1  # answered once, and wrongly
    assert segmentation.mean_iou(segmentation.counts_of(confusion)[0]) == pytest.approx(
        (6 / 9 + 4 / 6 + 0) / 3
    )


def test_pixels_are_counted_over_all_images_together() -> None:
    random = np.random.default_rng(0)
    truths = [random.integers(0, 3, (5, size)).astype(np.uint8) for size in (4, 90)]
    answers = [random.integers(0, 3, truth.shape).astype(np.uint8) for truth in truths]
    confusions = [segmentation.confusion(*pair, 3) for pair in zip(truths, answers, strict=True)]
    found = segmentation.share(segmentation.mean_iou, segmentation.counts_of(np.stack(confusions)))
    truth, answer = (np.concatenate([each.ravel() for each in parts]) for parts in (truths, answers))
    expected = [
        ((truth == label) & (answer == label)).sum() / ((truth == label) | (answer == label)).sum()
        for label in range(3)
    ]
    assert found.value == pytest.approx(np.mean(expected))


def images_of(shares: np.ndarray, pixels: int = 1000) -> Counts:
    """Counts of images of one class and size, with these shares answered rightly: accuracy is then their mean."""
    right = (shares * pixels).round().astype(np.int64)
    confusions = np.zeros((len(shares), 2, 2), np.int64)
    confusions[:, 0, 0], confusions[:, 0, 1] = right, pixels - right
    return segmentation.counts_of(confusions)


@pytest.mark.parametrize("images", [4, 10, 40])
def test_for_a_mean_the_interval_is_about_student_s(images: int) -> None:
    shares = np.random.default_rng(images).uniform(0.5, 0.9, images)
    found = segmentation.share(segmentation.pixel_accuracy, images_of(shares))
    low, high = stats.t.interval(0.95, images - 1, shares.mean(), stats.sem(shares))
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(high - low, rel=0.35 if images == 4 else 0.15)
    assert found.low < found.value < found.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = []
    for _ in range(200):
        shares = random.beta(6, 2, 12)
        found = segmentation.share(segmentation.pixel_accuracy, images_of(shares))
        covered.append(found.low <= 6 / 8 <= found.high)  # type: ignore[operator]
    assert 0.9 <= np.mean(covered) <= 0.99


def test_of_a_cross_validation_the_interval_is_wider_and_says_why() -> None:
    counts = images_of(np.random.default_rng(2).uniform(0.6, 0.8, 12))
    plain, folded = (segmentation.share(segmentation.pixel_accuracy, counts, folds=folds) for folds in (1, 4))
    assert plain.low is not None
    assert folded.low is not None
    assert folded.value == plain.value
    assert (folded.value - folded.low) / (plain.value - plain.low) == pytest.approx((1 + 4 / 3) ** 0.5)
    assert (
        folded.interval
        == "expanded percentile bootstrap over 12 images, stretched as folds share training images"
    )


def test_one_image_gives_no_interval() -> None:
    found = segmentation.share(segmentation.mean_iou, images_of(np.array([0.7])))
    assert (found.low, found.high, found.images) == (None, None, 1)
    assert "one image" in found.interval


def test_a_difference_of_networks_on_the_same_images_is_judged_in_pairs() -> None:
    random = np.random.default_rng(3)
    shares = random.uniform(0.3, 0.9, 20)
    ours, theirs = images_of(shares), images_of(shares - 0.05)
    value, low, high = segmentation.interval(
        lambda one, other: segmentation.pixel_accuracy(one) - segmentation.pixel_accuracy(other), ours, theirs
    )
    assert value == pytest.approx(0.05)
    assert 0.049 < low <= high < 0.051  # images differ much, but the difference does not
