"""Accuracy over few-shot episodes: how sure it is, where the doubt comes from, what would lessen it. No torch.

The student of an episode has a true accuracy p_e, which differs from episode to episode with variance s_b^2
("between": other classes, other supports, another training). Each of its Q queries is a coin flip within it, of
variance s_w^2 on average ("within"). So for E episodes

    Var(mean accuracy) = s_b^2 / E + s_w^2 / (E Q).

Source: Landolsi and Kahl, arXiv:2406.03146, the analysis of evaluation with few episodes and many queries; the
moments are those of one-way random effects (Searle, Casella, McCulloch, "Variance Components", 1992, chapter 3).
`tests/unit/models/evaluation/test_variance_components.py` holds every formula against simulated episodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from models.evaluation.accuracy import CONFIDENCE, Ints, wilson

Right = NDArray[np.bool_]

#: Of anything between 0 and 1.
LARGEST_VARIANCE = 0.25

STUDENT_T = "Student's t over episodes"
ALL_ALIKE = "Wilson score over all queries: the episodes do not differ at all"
NONE = "none: one episode cannot tell how much episodes differ"


@dataclass(frozen=True)
class Components:
    """The two variances: `between` episodes (s_b^2), with its own 95 % interval, and `within` them (s_w^2).

    `measured` is the observed variance S^2 of the episodes' accuracies, which estimates s_b^2 + s_w^2 / Q.
    """

    between: float
    between_low: float
    between_high: float
    within: float
    measured: float

    def variance(self, queries: int) -> float:
        """Of the measured accuracy of one episode: s_b^2 + s_w^2 / Q."""
        return self.between + self.within / queries


@dataclass(frozen=True)
class EpisodicAccuracy:
    """Mean accuracy over episodes with its 95 % interval; one episode alone has neither interval nor components.

    `half_width` is half of the interval before it is cut at 0 and 1.
    """

    value: float
    low: float | None
    high: float | None
    half_width: float | None
    interval: str  # how it was computed
    episodes: int
    queries: int  # of each episode
    components: Components | None
    confidence: float = CONFIDENCE


def estimate(right: Right, classes: Ints) -> EpisodicAccuracy:
    """Accuracy over E >= 1 episodes of Q queries each, as a sample of all episodes that might be drawn.

    `right`: bool [E, Q]; `classes`: int [E, Q], the class of each query among its episode's.

    The interval is Student's t over the episodes' accuracies, t_{E-1} S / sqrt(E), and never narrower than the coin
    flips of all queries alone, z s_w / sqrt(E Q): a few episodes can agree by luck. In simulation (2 to 30 episodes;
    see the tests) it covered 94.5 to 99 %, and t alone as little as 88 % of two episodes.
    """
    episodes, queries = right.shape
    value = float(right.mean())
    if episodes < 2:
        return EpisodicAccuracy(value, None, None, None, NONE, episodes, queries, None)
    components = variance_components(right, classes)
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    flips = z * math.sqrt(components.within / right.size)
    reach = max(_t(episodes) * math.sqrt(components.measured / episodes), flips)
    if reach == 0:
        low, high = wilson(int(right.sum()), right.size)
        return EpisodicAccuracy(value, low, high, (high - low) / 2, ALL_ALIKE, episodes, queries, components)
    low, high = max(0.0, value - reach), min(1.0, value + reach)
    return EpisodicAccuracy(value, low, high, reach, STUDENT_T, episodes, queries, components)


def moments(right: Right, classes: Ints) -> tuple[float, float]:
    """Unbiased estimates of the variance of an episode's measured accuracy, s_b^2 + s_w^2 / Q, and of s_w^2.

    As an episode has a set number of queries of each class, only the coin flips within a class are left to chance:
    s_w^2 = sum_c (n_c / Q) p_c (1 - p_c), with p_c (1 - p_c) estimated by n_c / (n_c - 1) times its plug-in value.
    An episode of which a class has a single query counts as one class: that puts s_w^2 rather too high.
    """
    measured = float(right.mean(1).var(ddof=1))
    return measured, float(np.mean([_within(row, of) for row, of in zip(right, classes, strict=True)]))


def variance_components(right: Right, classes: Ints) -> Components:
    """Method of moments: s_b^2 is the variance of the episodes' accuracies, less s_w^2 / Q, and within 0 to 1/4.

    Its interval takes the accuracies as normal: (E - 1) S^2 over chi-square quantiles, less s_w^2 / Q. Where luck
    made the episodes more alike than coin flips allow, the upper end starts from s_w^2 / Q in place of S^2.
    """
    episodes, queries = right.shape
    measured, within = moments(right, classes)
    flips = within / queries
    many, few = stats.chi2.ppf([0.5 + CONFIDENCE / 2, 0.5 - CONFIDENCE / 2], episodes - 1)
    between, low, high = (
        min(max(0.0, variance - flips), LARGEST_VARIANCE)
        for variance in (
            measured,
            (episodes - 1) * measured / float(many),
            (episodes - 1) * max(measured, flips) / float(few),
        )
    )
    return Components(between, low, high, within, measured)


def half_width(components: Components, queries: int, episodes: int) -> float:
    """Half of the 95 % interval that `episodes` >= 2 of `queries` give: t_{E-1} sqrt(s_b^2 / E + s_w^2 / (E Q))."""
    return _t(episodes) * math.sqrt(components.variance(queries) / episodes)


def episodes_needed(components: Components, queries: int, wanted: float) -> int:
    """The fewest episodes (2 at least), those already run included, with a half-width of at most `wanted` > 0."""
    enough = 2
    while half_width(components, queries, enough) > wanted:
        enough *= 2
    short = enough // 2  # too few, unless 2 are enough
    while enough - short > 1:
        middle = (enough + short) // 2
        if half_width(components, queries, middle) > wanted:
            short = middle
        else:
            enough = middle
    return enough


def best_queries(components: Components, episode_cost: float, query_cost: float) -> float:
    """Queries an episode that give the least variance for a given cost E (c_e + Q c_q), both costs > 0:

    Q* = sqrt((s_w^2 / s_b^2) (c_e / c_q)). Infinite where episodes do not differ.
    """
    if components.between == 0:
        return math.inf
    return math.sqrt(components.within / components.between * episode_cost / query_cost)


def _t(episodes: int) -> float:
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, episodes - 1))


def _within(right: Right, classes: Ints) -> float:
    """s_w^2 of one episode, from its answers [Q]."""
    counts = np.bincount(classes)
    if counts[counts > 0].min() < 2:
        classes, counts = np.zeros_like(classes), np.array([len(classes)])
    counts, hits = counts[counts > 0], np.bincount(classes, weights=right)[counts > 0]
    share = hits / counts
    return float((counts * counts / (counts - 1) * share * (1 - share)).sum() / len(right))
