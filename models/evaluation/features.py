"""How alike the features of two networks are on the same images: by cosine, CKA and nearest neighbours. No torch.

Features are rows of float [N, D]. Neighbours are by cosine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.evaluation.accuracy import CONFIDENCE

Rows = NDArray[np.float64]
Ints = NDArray[np.int64]

_RESAMPLES = 1000


@dataclass(frozen=True)
class Likeness:
    """A figure with the 95 % interval that comes from drawing images anew."""

    value: float
    low: float
    high: float
    confidence: float = CONFIDENCE


def cosines(first: Rows, second: Rows) -> Rows:
    """[N]: of each image's two features."""
    found: Rows = (_unit(first) * _unit(second)).sum(1)
    return found


def mean_cosine(first: Rows, second: Rows) -> Likeness:
    values = cosines(first, second)
    return _resampled(len(values), lambda rows: float(values[rows].mean()))


def cka(first: Rows, second: Rows) -> Likeness:
    """Linear centred kernel alignment: 1 where one is the other turned, scaled and moved (Kornblith et al.,
    arXiv:1905.00414, section 3). Its interval leaves images out instead of drawing them twice, which would raise it.
    """
    value = _cka(first, second)
    parts = np.array_split(np.random.default_rng(0).permutation(len(first)), min(20, len(first)))
    without = np.array([_cka(*(np.delete(rows, part, axis=0) for rows in (first, second))) for part in parts])
    spread = np.sqrt((len(parts) - 1) / len(parts) * ((without - without.mean()) ** 2).sum())  # jackknife
    return Likeness(value, max(0.0, value - 1.96 * spread), min(1.0, value + 1.96 * spread))


def nearest(asked: Rows, known: Rows | None = None) -> Ints:
    """Index [N] of the row of `known` that is nearest to each of `asked`; without `known`, of another of `asked`."""
    alike = _unit(asked) @ _unit(asked if known is None else known).T
    if known is None:
        np.fill_diagonal(alike, -np.inf)
    found: Ints = alike.argmax(1)
    return found


def _cka(first: Rows, second: Rows) -> float:
    first, second = first - first.mean(0), second - second.mean(0)
    cross = np.linalg.norm(first.T @ second) ** 2
    own = np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)
    return float(cross / own) if own > 0 else 0.0


def _unit(rows: Rows) -> Rows:
    unit: Rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def _resampled(count: int, figure: Callable[[Ints], float]) -> Likeness:
    random = np.random.default_rng(0)
    drawn = [figure(random.integers(0, count, count)) for _ in range(_RESAMPLES)]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return Likeness(figure(np.arange(count)), float(low), float(high))
