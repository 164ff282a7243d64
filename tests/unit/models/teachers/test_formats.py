"""Images as a black box expects them, and its answers as rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from models.errors import TeacherError
from models.teachers.black_box import AnswerKind, InputFormat, Pixels
from models.teachers.formats import looks_like, prepared, read_answers

PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]], np.float32)
LOGITS = np.array([[4.0, -1.0, 0.5], [0.0, 900.0, 1.0]], np.float32)


def _noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_images_of_its_size_reach_a_black_box_as_they_are() -> None:
    image = _noise(5, 7)
    batch = prepared([image], InputFormat(height=5, width=7, dtype="uint8", layout="NHWC", range="0..255"))
    assert batch.dtype == np.uint8
    np.testing.assert_array_equal(batch, image[None])


@pytest.mark.parametrize(("height", "width"), [(40, 60), (20, 90), (13, 17)])
def test_images_of_any_size_are_squeezed_as_torch_squeezes_them(height: int, width: int) -> None:
    image = _noise(height, width)
    batch = prepared([image], InputFormat(height=20, width=24, range="0..255"))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    reference = functional.interpolate(pixels, (20, 24), mode="bilinear", antialias=True)
    np.testing.assert_allclose(batch, reference.numpy(), atol=1.01)  # both passes round to whole grey values


def test_images_of_different_sizes_make_one_batch() -> None:
    batch = prepared([_noise(8, 9), _noise(30, 20), _noise(12, 12)], InputFormat(height=12, width=12))
    assert batch.shape == (3, 3, 12, 12)
    assert batch.dtype == np.float32


def test_no_images_make_an_empty_batch() -> None:
    assert prepared([], InputFormat(height=4, width=5, layout="NHWC")).shape == (0, 4, 5, 3)


def test_grey_is_the_luma_of_bt_601() -> None:
    image = _noise(6, 6)
    batch = prepared([image], InputFormat(height=6, width=6, channels=1, range="0..255"))
    luma = image @ np.array([0.299, 0.587, 0.114])
    assert batch.shape == (1, 1, 6, 6)
    np.testing.assert_allclose(batch[0, 0], luma, atol=0.51)


def test_a_grey_image_stays_the_same_to_the_last_bit() -> None:
    image = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    batch = prepared([image], InputFormat(height=16, width=16, channels=1, range="0..255", dtype="uint8"))
    np.testing.assert_array_equal(batch[0, 0], image[:, :, 0])


@pytest.mark.parametrize(
    ("range", "black", "white"), [("0..1", 0.0, 1.0), ("-1..1", -1.0, 1.0), ("0..255", 0.0, 255.0)]
)
def test_black_and_white_are_the_ends_of_the_range(range: str, black: float, white: float) -> None:
    image = np.zeros((2, 1, 3), np.uint8)
    image[1] = 255
    batch = prepared([image], InputFormat.model_validate({"height": 2, "width": 1, "range": range}))
    np.testing.assert_array_equal(batch[0, :, :, 0], [[black, white]] * 3)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_each_channel_has_its_own_mean_and_std(layout: str) -> None:
    image = _noise(3, 4)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expects = InputFormat.model_validate(
        {"height": 3, "width": 4, "layout": layout, "mean": mean, "std": std}
    )
    expected = (image / 255.0 - mean) / std
    batch = prepared([image], expects)[0]
    np.testing.assert_allclose(batch.transpose(1, 2, 0) if layout == "NCHW" else batch, expected, atol=1e-5)


def test_probabilities_are_kept() -> None:
    rows = read_answers(PROBABILITIES, AnswerKind.PROBABILITIES, 3, 2)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, PROBABILITIES, atol=1e-7)


def test_rounded_probabilities_are_made_to_sum_to_one() -> None:
    raw = np.array([[0.3333, 0.3333, 0.3333], [-0.0004, 0.99, 0.001]])
    rows = read_answers(raw, AnswerKind.PROBABILITIES, 3, 2)
    np.testing.assert_allclose(rows.sum(axis=1), 1, atol=1e-6)
    assert rows.min() == 0


def test_logits_become_their_softmax_even_where_they_are_huge() -> None:
    rows = read_answers(LOGITS, AnswerKind.LOGITS, 3, 2)
    np.testing.assert_allclose(rows, torch.from_numpy(LOGITS).softmax(1).numpy(), atol=1e-6)


def test_log_probabilities_can_be_read_as_logits() -> None:
    rows = read_answers(np.log(PROBABILITIES[:1]), AnswerKind.LOGITS, 3, 1)
    np.testing.assert_allclose(rows, PROBABILITIES[:1], atol=1e-6)


def test_one_image_may_be_answered_without_the_first_dimension() -> None:
    assert read_answers(PROBABILITIES[0], AnswerKind.PROBABILITIES, 3, 1).shape == (1, 3)
    with pytest.raises(TeacherError, match=r"shape \[3\]; expected \[3, 3\]"):
        read_answers(PROBABILITIES[0], AnswerKind.PROBABILITIES, 3, 3)


def test_top_answers_leave_open_what_was_not_said() -> None:
    raw = np.array([[0.6, np.nan, 0.3], [np.nan, 1.0005, np.nan]])
    rows = read_answers(raw, AnswerKind.TOP_K, 3, 2)
    np.testing.assert_array_equal(np.isnan(rows), np.isnan(raw))
    np.testing.assert_allclose(rows[0, [0, 2]], [0.6, 0.3], atol=1e-6)
    assert rows[1, 1] == 1


@pytest.mark.parametrize(
    "raw",
    [
        np.array([2, 0], np.int64),
        np.array([[2], [0]], np.int32),
        np.array([2.0, 0.0]),
        np.array([[0, 0, 1], [1, 0, 0]], np.float32),
    ],
    ids=["indices", "column", "floats", "one_hot"],
)
def test_labels_become_one_hot_rows(raw: NDArray[np.generic]) -> None:
    np.testing.assert_array_equal(read_answers(raw, AnswerKind.LABEL, 3, 2), [[0, 0, 1], [1, 0, 0]])


NAN = np.array([[0.5, np.nan, 0.5], [1, 0, 0]])
REFUSED: dict[str, tuple[AnswerKind, NDArray[np.generic], str]] = {
    "logits_for_probabilities": (AnswerKind.PROBABILITIES, LOGITS, "set answers to 'logits'"),
    "percentages": (AnswerKind.PROBABILITIES, PROBABILITIES * 100, "Divide them by 100"),
    "independent_scores": (AnswerKind.PROBABILITIES, np.full((2, 3), 0.9), "sum to 2.7"),
    "sums_below_one": (AnswerKind.PROBABILITIES, np.full((2, 3), 0.3), "'top_k'"),
    "all_zero": (AnswerKind.PROBABILITIES, np.zeros((2, 3)), "sum to 0"),
    "nan": (AnswerKind.PROBABILITIES, NAN, "image 1 of 2 holds NaN"),
    "nan_logits": (AnswerKind.LOGITS, NAN, "holds NaN"),
    "infinite_logits": (AnswerKind.LOGITS, np.array([[1, 2, 3], [1, 2, np.inf]]), "image 2 of 2"),
    "infinite_top": (AnswerKind.TOP_K, np.array([[np.nan, 1, 0], [1, -np.inf, 0]]), "infinity"),
    "too_many_outputs": (
        AnswerKind.PROBABILITIES,
        np.full((2, 4), 0.25),
        "4 outputs, the class list 3 names",
    ),
    "too_few_answers": (AnswerKind.PROBABILITIES, PROBABILITIES[:1], "1 answers to 2 images"),
    "three_dimensions": (AnswerKind.LOGITS, np.zeros((2, 3, 1)), "choose the output"),
    "text": (AnswerKind.LABEL, np.array(["cat", "dog"]), "must be numbers"),
    "top_without_names": (AnswerKind.TOP_K, np.array([[np.nan] * 3, [1, 0, 0]]), "named no class"),
    "top_above_one": (AnswerKind.TOP_K, np.array([[0.8, 0.7, np.nan], [1, 0, 0]]), "after the softmax"),
    "top_logits": (AnswerKind.TOP_K, np.array([[8.1, np.nan, np.nan], [7, 1, 0]]), "after the softmax"),
    "label_too_high": (AnswerKind.LABEL, np.array([0, 3]), "label 3; labels are 0 to 2"),
    "label_negative": (AnswerKind.LABEL, np.array([0, -1]), "label -1"),
    "label_nan": (AnswerKind.LABEL, np.array([0, np.nan]), "label nan"),
    "label_between": (AnswerKind.LABEL, np.array([0, 0.5]), "label 0.5"),
    "probabilities_for_labels": (AnswerKind.LABEL, PROBABILITIES, "set answers to 'probabilities'"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_no_such_answer_is_refused_in_words(name: str) -> None:
    kind, raw, words = REFUSED[name]
    with pytest.raises(TeacherError) as refused:
        read_answers(raw, kind, 3, 2)
    assert words in f"{refused.value.detail} {refused.value.hint}"
    assert refused.value.hint


def test_many_probabilities_are_not_taken_for_logits() -> None:
    rows = np.random.default_rng(0).dirichlet([1, 1, 1], 8)
    with pytest.raises(TeacherError, match="no logits"):
        read_answers(rows, AnswerKind.LOGITS, 3, 8)
    assert read_answers(rows[:1], AnswerKind.LOGITS, 3, 1).shape == (1, 3)  # one such row may be chance


def test_what_answers_look_like_is_told() -> None:
    assert looks_like(PROBABILITIES) is AnswerKind.PROBABILITIES
    assert looks_like(LOGITS) is AnswerKind.LOGITS
    assert looks_like(np.array([3, 1])) is AnswerKind.LABEL
    assert looks_like(np.array([[np.nan, 1.0]])) is None
    assert looks_like(np.zeros((2, 3, 4))) is None
