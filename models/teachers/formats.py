"""What a black box is shown and what it says, as arrays: images in its format, answers as rows. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.errors import TeacherError
from models.teachers.black_box import AnswerKind, Answers, InputFormat, Pixels

#: How far a probability may lie outside 0..1, and a row's sum from 1: what float16 and rounded JSON leave.
VALUE_TOLERANCE = 1e-3
SUM_TOLERANCE = 0.02
#: From so many rows on, sums of 1 are no coincidence.
_ROWS_THAT_PROVE = 8


def prepared(images: Sequence[Pixels], format: InputFormat) -> NDArray[np.float32] | NDArray[np.uint8]:
    """Images [H, W, 3] of any sizes as one batch [N, C, H, W] or [N, H, W, C], as the black box expects it."""
    shape = (len(images), format.height, format.width, format.channels)
    pixels = np.empty(shape, np.uint8)
    for at, image in enumerate(images):
        pixels[at] = _squeezed(image, format)
    if format.layout == "NCHW":
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return pixels if format.dtype == "uint8" else _scaled(pixels, format)


def _squeezed(image: Pixels, format: InputFormat) -> Pixels:
    """[H, W, 3] -> [format.height, format.width, format.channels], bilinear with antialias, its sides' ratio lost."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if picture.size != (format.width, format.height):
        picture = picture.resize((format.width, format.height), Image.Resampling.BILINEAR)
    if format.channels == 1:
        picture = picture.convert("L")  # luma, ITU-R BT.601
    return np.asarray(picture).reshape(format.height, format.width, format.channels)


def _scaled(pixels: NDArray[np.uint8], format: InputFormat) -> NDArray[np.float32]:
    per_channel = (-1, 1, 1) if format.layout == "NCHW" else (-1,)
    values = pixels.astype(np.float32)
    if format.range == "0..1":
        values /= 255
    elif format.range == "-1..1":
        values /= 127.5
        values -= 1
    if format.mean:
        values -= np.asarray(format.mean, np.float32).reshape(per_channel)
    if format.std:
        values /= np.asarray(format.std, np.float32).reshape(per_channel)
    return values


def read_answers(raw: NDArray[np.generic], kind: AnswerKind, classes: int, images: int) -> Answers:
    """What a black box said about N images, as rows [N, C] (`AnswerKind` says what a row holds).

    `raw` is [N, C]; for `label` class indices [N] will do too; for top_k NaN stands where nothing was said. One
    image may come without its first dimension. Raises `TeacherError` where this cannot be what `kind` names.
    """
    if raw.dtype.kind not in "fiu":
        raise TeacherError(
            f"the teacher answered with values of type {raw.dtype}", "Its answers must be numbers."
        )
    rows = raw.astype(np.float64)
    if kind is AnswerKind.LABEL and rows.shape in ((images,), (images, 1)):
        return _one_hot(rows.reshape(images), classes)
    if images == 1 and rows.shape == (classes,):
        rows = rows[None]
    if rows.shape != (images, classes):
        raise _wrong_shape(rows.shape, classes, images)
    if np.isinf(rows).any() or (np.isnan(rows).any() and kind is not AnswerKind.TOP_K):
        at = int(np.argmax(~np.isfinite(rows).all(axis=1)))
        raise TeacherError(
            f"the teacher's answer to image {at + 1} of {images} holds NaN or infinity",
            "Check the teacher with that image, and the input's range, mean and std.",
        )
    if kind is AnswerKind.PROBABILITIES:
        return _probabilities(rows)
    if kind is AnswerKind.LOGITS:
        return _softmax(rows)
    if kind is AnswerKind.TOP_K:
        return _some_probabilities(rows)
    return _labels(rows)


def looks_like(raw: NDArray[np.generic]) -> AnswerKind | None:
    """Which kind of answer finite rows [N, C] or class indices [N] seem to be; None: no kind."""
    if raw.dtype.kind not in "fiu" or not raw.size:
        return None
    rows = raw.astype(np.float64)
    if not np.isfinite(rows).all():
        return None
    if rows.ndim == 1 or (rows.ndim == 2 and rows.shape[1] == 1):
        return AnswerKind.LABEL if raw.dtype.kind in "iu" and (rows >= 0).all() else None
    if rows.ndim != 2:
        return None
    return AnswerKind.PROBABILITIES if _are_probabilities(rows) else AnswerKind.LOGITS


def _are_probabilities(rows: NDArray[np.float64]) -> bool:
    return bool(_are_fractions(rows) and np.all(np.abs(rows.sum(axis=1) - 1) <= SUM_TOLERANCE))


def _are_fractions(rows: NDArray[np.float64]) -> bool:
    """Whether all that is said lies in 0..1."""
    return not bool(np.any(rows < -VALUE_TOLERANCE) or np.any(rows > 1 + VALUE_TOLERANCE))


def _probabilities(rows: NDArray[np.float64]) -> Answers:
    if not _are_fractions(rows):
        lowest, highest = rows.min(), rows.max()
        if lowest >= 0 and np.all(np.abs(rows.sum(axis=1) - 100) <= 100 * SUM_TOLERANCE):
            raise TeacherError(
                "the teacher answered percentages, not probabilities", "Divide them by 100 in the teacher."
            )
        raise TeacherError(
            f"the teacher's answers are no probabilities: they reach from {lowest:.4g} to {highest:.4g}",
            "These look like logits: set answers to 'logits'.",
        )
    sums = rows.sum(axis=1)
    worst = float(sums[np.argmax(np.abs(sums - 1))]) if len(sums) else 1.0
    if abs(worst - 1) > SUM_TOLERANCE:
        raise TeacherError(
            f"the teacher's probabilities of an image sum to {worst:.4g}, not to 1",
            "These look like scores that are independent of each other, or like a part of the classes. Let the"
            " teacher end with a softmax over all classes, or set answers to 'top_k' if it names only some.",
        )
    return _normalised(rows)


def _softmax(rows: NDArray[np.float64]) -> Answers:
    if len(rows) >= _ROWS_THAT_PROVE and _are_probabilities(rows):
        raise TeacherError(
            "the teacher's answers are no logits: all lie in 0..1 and those of an image sum to 1",
            "These look like probabilities: set answers to 'probabilities'.",
        )
    return _normalised(np.exp(rows - rows.max(axis=1, keepdims=True)))


def _some_probabilities(rows: NDArray[np.float64]) -> Answers:
    """top_k: what is said, in 0..1, with a sum of at most 1; NaN elsewhere."""
    if np.isnan(rows).all(axis=1).any():
        raise TeacherError("the teacher named no class for an image", "It must name at least one.")
    sums = np.nansum(rows, axis=1, keepdims=True)
    if not _are_fractions(rows) or np.any(sums > 1 + SUM_TOLERANCE):
        raise TeacherError(
            f"the teacher's top answers are no probabilities: they reach from {np.nanmin(rows):.4g} to"
            f" {np.nanmax(rows):.4g}, and those of an image sum to up to {sums.max():.4g}",
            "They must be taken after the softmax over all classes.",
        )
    kept: Answers = np.clip(rows / np.maximum(1, sums), 0, 1).astype(np.float32)
    return kept


def _labels(rows: NDArray[np.float64]) -> Answers:
    """Rows that must be one-hot."""
    if np.any((rows != 0) & (rows != 1)) or np.any(rows.sum(axis=1) != 1):
        kind = "probabilities" if _are_probabilities(rows) else "logits"
        raise TeacherError(
            "the teacher's answers are no labels: an image's row must hold one 1 and else 0",
            f"These look like {kind}: set answers to '{kind}'.",
        )
    return rows.astype(np.float32)


def _one_hot(labels: NDArray[np.float64], classes: int) -> Answers:
    wrong = ~((labels >= 0) & (labels < classes) & (labels == np.floor(labels)))  # NaN is wrong too
    if wrong.any():
        raise TeacherError(
            f"the teacher answered with the label {labels[wrong][0]:.6g}; labels are 0 to {classes - 1}",
            "A label is the place in the class list, from 0. List all classes of the teacher, in its order.",
        )
    return np.eye(classes, dtype=np.float32)[labels.astype(np.int64)]


def _normalised(rows: NDArray[np.float64]) -> Answers:
    positive = np.clip(rows, 0, None)
    whole: Answers = (positive / positive.sum(axis=1, keepdims=True)).astype(np.float32)
    return whole


def _wrong_shape(shape: tuple[int, ...], classes: int, images: int) -> TeacherError:
    told = f"the teacher answered an array of shape {list(shape)}; expected [{images}, {classes}]"
    if len(shape) == 2 and shape[0] == images:
        return TeacherError(
            f"{told}: it has {shape[1]} outputs, the class list {classes} names",
            "List one class for each output, in the teacher's order.",
        )
    if len(shape) == 2 and shape[1] == classes:
        return TeacherError(
            f"{told}: {shape[0]} answers to {images} images", "It must answer each image of a batch once."
        )
    return TeacherError(told, "One row an image, one column a class: choose the output that has this shape.")
