"""How a black box's answers become soft labels."""

from __future__ import annotations

import math

import pytest
import torch

from models.teachers import black_box_questions
from models.teachers.black_box import AnswerKind
from models.teachers.black_box_questions import Introduction


def introduction(answers: AnswerKind, columns: tuple[int, ...] = (2, 0)) -> Introduction:
    names = tuple("abcd"[column] for column in columns)
    return Introduction(names, columns, answers, "key", 0.1, 32, held_out=(1, 3))


def test_probabilities_are_put_in_the_student_s_order_and_shared_among_its_classes() -> None:
    rows = torch.tensor([[0.2, 0.3, 0.4, 0.1], [0.0, 0.5, 0.5, 0.0]])
    read = introduction(AnswerKind.PROBABILITIES).probabilities(rows)
    assert torch.allclose(read, torch.tensor([[0.4 / 0.6, 0.2 / 0.6], [1.0, 0.0]]))


def test_an_answer_that_gives_nothing_to_the_student_s_classes_says_nothing() -> None:
    read = introduction(AnswerKind.PROBABILITIES).probabilities(torch.tensor([[0.0, 0.7, 0.0, 0.3]]))
    assert read.tolist() == [[0.5, 0.5]]


def test_what_a_top_k_answer_leaves_of_1_goes_to_the_classes_not_named() -> None:
    nan = math.nan
    kind = introduction(AnswerKind.TOP_K, columns=(0, 1, 2, 3))
    read = kind.probabilities(torch.tensor([[nan, 0.6, nan, 0.2]]))
    assert read.tolist()[0] == pytest.approx([0.1, 0.6, 0.1, 0.2])


def test_a_label_is_smoothed() -> None:
    kind = introduction(AnswerKind.LABEL, columns=(3, 2, 1, 0))
    read = kind.probabilities(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    assert read.tolist()[0] == pytest.approx([0.9] + [0.1 / 3] * 3)


def test_soft_labels_have_the_answers_as_their_softmax_even_where_one_is_0() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.0, 0.75, 0.0]])
    soft = black_box_questions.soft_labels(introduction(AnswerKind.PROBABILITIES), rows, torch.tensor([4, 7]))
    assert torch.isfinite(soft.logits).all()
    wanted = torch.tensor([[0.0, 1.0], [0.75, 0.25]])
    assert torch.allclose(soft.logits.softmax(1), wanted, atol=1e-6)
    assert soft.image.tolist() == [4, 7]
    assert soft.view.tolist() == [[0.0, 0.0, 1.0, 1.0, 0.0]] * 2


def test_images_that_are_held_out_are_not_kept() -> None:
    assert introduction(AnswerKind.LABEL).kept(5).tolist() == [0, 2, 4]
