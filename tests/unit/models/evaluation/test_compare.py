import numpy as np
import pytest

from models.evaluation import compare


def _right(both, first, second, neither):
    first_right = np.array([True] * both + [True] * first + [False] * second + [False] * neither)
    second_right = np.array([True] * both + [False] * first + [True] * second + [False] * neither)
    return first_right, second_right


def test_mcnemar_sums_the_binomial_tail_by_hand():
    found = compare.paired(*_right(20, 1, 7, 4))
    # both tails of 8 fair coins with at most one head: 2 (1 + 8) / 256
    assert found.p_value == pytest.approx(18 / 256)
    assert (found.both_right, found.only_first_right, found.only_second_right, found.both_wrong) == (
        20,
        1,
        7,
        4,
    )
    assert found.difference == pytest.approx(-6 / 32)


def test_equal_answers_are_no_evidence_of_a_difference():
    found = compare.paired(*_right(10, 0, 0, 5))
    assert (found.difference, found.p_value) == (0.0, 1.0)
    assert found.low < 0 < found.high


def test_the_interval_of_the_difference_covers_it_19_times_in_20():
    random = np.random.default_rng(1)
    shares = np.array([0.5, 0.2, 0.1, 0.2])  # both, first only, second only, neither: difference 0.1
    covered = 0
    for counts in random.multinomial(60, shares, size=2000):
        found = compare.paired(*_right(*counts))
        covered += found.low <= 0.1 <= found.high
    assert 0.935 <= covered / 2000 <= 0.975


def test_agreement_counts_equal_answers_right_or_wrong():
    found = compare.agreement(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2]))
    assert (found.value, found.images) == (0.75, 4)
    assert 0 < found.low < 0.75 < found.high < 1


CLASSES = ("cat", "dog", "owl")
NAMES = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")
LABELS = np.array([0, 1, 2, 0])
STUDENT = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.88, 0.02], [0.4, 0.35, 0.25]], dtype=np.float32)
TEACHER = np.array([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.3, 0.4, 0.3], [0.1, 0.2, 0.7]], dtype=np.float32)


def test_the_worst_mistakes_come_first_and_name_image_and_scores():
    first, second = compare.worst_mistakes(STUDENT, LABELS, NAMES, CLASSES, 10)
    assert (first.image, first.label, first.answer) == ("c.jpg", "owl", "dog")
    assert (first.score_of_answer, first.score_of_label) == pytest.approx((0.88, 0.02))
    assert second.image == "b.jpg"
    assert len(compare.worst_mistakes(STUDENT, LABELS, NAMES, CLASSES, 1)) == 1


def test_disagreements_say_who_is_right_and_leave_out_common_answers():
    first, second = compare.disagreements(STUDENT, TEACHER, LABELS, NAMES, CLASSES, 10)
    assert (first.image, first.student, first.teacher, first.right) == ("b.jpg", "cat", "dog", "teacher")
    assert (second.image, second.student, second.teacher, second.right) == ("d.jpg", "cat", "owl", "student")


def test_a_disagreement_that_both_lose_is_won_by_neither():
    (found,) = compare.disagreements(STUDENT[1:2], TEACHER[1:2], np.array([2]), NAMES, CLASSES, 5)
    assert found.right == "neither"


def test_a_disagreement_on_an_image_without_a_label_is_won_by_nobody():
    first, second = compare.disagreements(STUDENT, TEACHER, np.array([0, -1, -1, 0]), NAMES, CLASSES, 10)
    assert (first.image, first.label, first.student, first.right) == ("b.jpg", None, "cat", None)
    assert (second.image, second.label, second.right) == ("d.jpg", "cat", "student")
