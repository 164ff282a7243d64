"""Student beside teacher, and one file beside another, on the same images: paired statistics. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from models.evaluation.accuracy import CONFIDENCE, Ints, wilson

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """The share of images to which two give the same answer, right or wrong."""

    value: float
    low: float
    high: float
    images: int


@dataclass(frozen=True)
class PairedComparison:
    """Two classifiers on the same images, by the images that only one of them gets right.

    `difference` is first minus second accuracy, with Wald's interval for paired proportions in Bonett and
    Price's form; `p_value` is McNemar's exact one: how likely so uneven a split of the disagreements is if
    both are equally good. With cross-validated answers both are optimistic, as folds depend on each other.
    """

    both_right: int
    only_first_right: int
    only_second_right: int
    both_wrong: int
    difference: float
    low: float
    high: float
    p_value: float
    test: str = "exact McNemar"
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class Mistake:
    """An image that the student gets wrong, with the scores that it gave."""

    image: str
    label: str
    answer: str
    score_of_answer: float
    score_of_label: float


@dataclass(frozen=True)
class Disagreement:
    """An image to which student and teacher give different answers. `right`: student, teacher or neither.

    `label` and `right` are None where the image's class is not known.
    """

    image: str
    label: str | None
    student: str
    student_score: float
    teacher: str
    teacher_score: float
    right: str | None


def agreement(first: Ints, second: Ints) -> Agreement:
    """Agreement of two lists of answers int [N], with Wilson's interval."""
    same = int((first == second).sum())
    low, high = wilson(same, len(first))
    return Agreement(same / max(1, len(first)), low, high, len(first))


def paired(first_right: NDArray[np.bool_], second_right: NDArray[np.bool_]) -> PairedComparison:
    """Compare two classifiers by which images [N] each gets right (McNemar 1947, in its exact form).

    Interval: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based
    on paired data", J. Educ. Behav. Stat. 37 (2012), equation 5: one image is added to either kind of disagreement.
    """
    total = len(first_right)
    first_only = int((first_right & ~second_right).sum())
    second_only = int((~first_right & second_right).sum())
    both = int((first_right & second_right).sum())
    apart = first_only + second_only
    p_value = float(stats.binomtest(first_only, apart, 0.5).pvalue) if apart else 1.0
    up, down = (first_only + 1) / (total + 2), (second_only + 1) / (total + 2)
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    half = z * float(np.sqrt((up + down - (up - down) ** 2) / (total + 2)))
    return PairedComparison(
        both_right=both,
        only_first_right=first_only,
        only_second_right=second_only,
        both_wrong=total - both - apart,
        difference=(first_only - second_only) / max(1, total),
        low=max(-1.0, up - down - half),
        high=min(1.0, up - down + half),
        p_value=p_value,
    )


def worst_mistakes(
    scores: Scores, labels: Ints, names: Sequence[str], classes: Sequence[str], count: int
) -> list[Mistake]:
    """The wrong answers in which the true class got the lowest score, lowest first. `scores` float [N, C]."""
    answers = scores.argmax(1)
    of_label = scores[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(answers != labels)
    ordered = wrong[np.argsort(of_label[wrong], kind="stable")][:count]
    return [
        Mistake(
            names[row],
            classes[labels[row]],
            classes[answers[row]],
            float(scores[row, answers[row]]),
            float(of_label[row]),
        )
        for row in ordered
    ]


def disagreements(
    student: Scores, teacher: Scores, labels: Ints, names: Sequence[str], classes: Sequence[str], count: int
) -> list[Disagreement]:
    """The images on which student and teacher differ most (total variation of their scores), most first.

    `labels` int [N], -1: none.
    """
    ours, theirs = student.argmax(1), teacher.argmax(1)
    distance = np.abs(student - teacher).sum(1) / 2
    apart = np.flatnonzero(ours != theirs)
    ordered = apart[np.argsort(-distance[apart], kind="stable")][:count]
    return [
        Disagreement(
            names[row],
            classes[labels[row]] if labels[row] >= 0 else None,
            classes[ours[row]],
            float(student[row, ours[row]]),
            classes[theirs[row]],
            float(teacher[row, theirs[row]]),
            _who(ours[row] == labels[row], theirs[row] == labels[row]) if labels[row] >= 0 else None,
        )
        for row in ordered
    ]


def _who(student_right: bool, teacher_right: bool) -> str:
    if student_right:
        return "student"
    return "teacher" if teacher_right else "neither"
