"""How well class maps agree with masks: intersection over union and pixel accuracy, with intervals over images.

Pixels are counted over all images together, as is usual for segmentation, and pixels of one image are no independent
evidence. So intervals come from drawing whole images anew, with replacement (bootstrap).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from models.data.archive import IGNORED
from models.evaluation.accuracy import CONFIDENCE, Ints

RESAMPLES = 2000

Floats = NDArray[np.float64]
#: [n, 3, C] of n images: pixels answered rightly, pixels of the class, pixels answered as the class.
Counts = NDArray[np.int64]
#: From counts [..., 3, C] to figures [...] or [..., C].
Statistic = Callable[..., Floats]


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval over `images`; none of one image, which says nothing of others."""

    value: float
    low: float | None
    high: float | None
    images: int
    interval: str  # how it was computed
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class ClassIou:
    """One row of the per-class table. `images`: that show the class. None where it neither occurs nor is answered."""

    label: str
    images: int
    pixels: int
    iou: float | None
    iou_low: float | None
    iou_high: float | None
    teacher_iou: float | None


def confusion(truth: NDArray[np.uint8], answer: NDArray[np.uint8], classes: int) -> Ints:
    """Pixels int [C, C] of a mask [H, W] by true class (row) and answer [H, W] (column); ignored ones are left out."""
    known = truth != IGNORED
    pairs = truth[known].astype(np.int64) * classes + answer[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def counts_of(confusions: Ints) -> Counts:
    """What the figures are made of, from confusion matrices [n, C, C]."""
    right = np.diagonal(confusions, axis1=1, axis2=2)
    return np.stack([right, confusions.sum(2), confusions.sum(1)], axis=1)


def ious(counts: NDArray[np.int64]) -> Floats:
    """Intersection over union [..., C] from counts [..., 3, C]; NaN where a class neither occurs nor is answered."""
    right, true, answered = np.moveaxis(counts, -2, 0)
    union = true + answered - right
    return _ratio(right, union)


def mean_iou(counts: NDArray[np.int64]) -> Floats:
    """The mean [...] over those classes that have an intersection over union."""
    found = ious(counts)
    present = ~np.isnan(found)
    total = np.where(present, found, 0.0).sum(-1)
    return _ratio(total, present.sum(-1))


def pixel_accuracy(counts: NDArray[np.int64]) -> Floats:
    """The share [...] of pixels that were answered rightly."""
    right, true, _ = np.moveaxis(counts, -2, 0)
    return _ratio(right.sum(-1), true.sum(-1))


def share(statistic: Statistic, *counts: Counts, folds: int = 1) -> Share:
    """A figure of all images, for example `mean_iou`, with its interval within 0 to 1."""
    value, *ends = interval(statistic, *counts, folds=folds)
    low, high = np.clip(ends, 0, 1)
    images = len(counts[0])
    return Share(float(value), _known(low), _known(high), images, _how(images, folds))


def interval(statistic: Statistic, *counts: Counts, folds: int = 1) -> tuple[Floats, Floats, Floats]:
    """A statistic of the counts [n, 3, C] of one or more networks on the same images, and the ends of its interval.

    The expanded percentile bootstrap of Hesterberg, "What Teachers Should Know about the Bootstrap", arXiv:1411.5279:
    percentiles further out, so that for a mean of few images the interval is about as wide as Student's. Images that
    `folds` students of a cross-validation answered share training images: the interval is stretched by the root of
    1 + K / (K - 1), as `accuracy.cross_validated` does. The ends are NaN for one image.
    """
    value = statistic(*(one.sum(0) for one in counts))
    images = len(counts[0])
    if images < 2:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    drawn = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    resampled = statistic(*(np.tensordot(drawn, one, axes=1) for one in counts))
    reach = stats.t.ppf(0.5 + CONFIDENCE / 2, images - 1) * np.sqrt(images / (images - 1))
    tail = 100 * stats.norm.cdf(-reach)
    low, high = (_percentile(resampled, level) for level in (tail, 100 - tail))
    stretch = np.sqrt(1 + folds / (folds - 1)) if folds > 1 else 1.0
    return value, value + stretch * (low - value), value + stretch * (high - value)


def per_class(student: Counts, teacher: Counts, classes: Sequence[str], folds: int = 1) -> list[ClassIou]:
    """One row for each class, with intervals as of `interval`."""
    value, low, high = interval(ious, student, folds=folds)
    theirs = ious(teacher.sum(0))
    pixels, images = student[:, 1].sum(0), (student[:, 1] > 0).sum(0)
    return [
        ClassIou(
            name,
            int(images[number]),
            int(pixels[number]),
            _known(value[number]),
            _known(np.clip(low[number], 0, 1)),
            _known(np.clip(high[number], 0, 1)),
            _known(theirs[number]),
        )
        for number, name in enumerate(classes)
    ]


def _percentile(resampled: Floats, level: float) -> Floats:
    """Over the first axis, of the figures that there are; NaN where there are none."""
    found: Floats = np.full(resampled.shape[1:], np.nan)
    some = ~np.isnan(resampled).all(0)
    found[some] = np.nanpercentile(resampled[:, some], level, axis=0)
    return found


def _ratio(part: NDArray[np.float64 | np.int64], whole: NDArray[np.int64]) -> Floats:
    """NaN where the whole is 0."""
    found: Floats = np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)
    return found


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _how(images: int, folds: int) -> str:
    if images < 2:
        return "none: one image says nothing of others"
    stretched = ", stretched as folds share training images" if folds > 1 else ""
    return f"expanded percentile bootstrap over {images} images{stretched}"
