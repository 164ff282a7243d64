"""What student and teacher answer to the images they are judged on: a test split, or held-back folds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

from models.data import archive
from models.errors import DataError
from models.evaluation import accuracy
from models.evaluation.accuracy import Ints
from models.evaluation.compare import Scores
from models.export.samples import Sample


@dataclass(frozen=True)
class Answers:
    """Scores float [N, C] of student and teacher, labels int [N] and names of the same N images.

    `folds` are the rows that each student of a cross-validation answered; a test split is one fold.
    """

    kind: Literal["test", "cross_validation"]
    student: Scores
    teacher: Scores
    labels: Ints
    names: tuple[str, ...]
    folds: tuple[Ints, ...]

    def accuracy_of(self, scores: Scores) -> accuracy.Accuracy:
        """The accuracy of `scores` [N, C] with the interval that this kind of answers allows."""
        right = scores.argmax(1) == self.labels
        if self.kind == "test":
            return accuracy.on_test_split(right)
        return accuracy.cross_validated([right[rows] for rows in self.folds])


@dataclass(frozen=True)
class Measured:
    """Scores float [N, C] of each ONNX file, labels int [N] and names of the images it was run on."""

    scores: dict[str, Scores]
    labels: Ints
    names: tuple[str, ...]


def run_files(
    sessions: Mapping[str, onnxruntime.InferenceSession],
    images: Iterable[Sample],
    on_image: Callable[[int], None] = lambda number: None,
) -> Measured:
    """Run each session on each labelled image, one image at a time, as a user would."""
    rows: dict[str, list[Scores]] = {name: [] for name in sessions}
    labels, names = [], []
    for number, sample in enumerate(images, start=1):
        if sample.label is None:
            raise DataError(f"'{sample.name}' has no label, so no answer to it is right or wrong")
        for name, session in sessions.items():
            rows[name].append(session.run(None, {"image": sample.pixels[None]})[0])
        labels.append(sample.label)
        names.append(sample.name)
        on_image(number)
    scores = {name: np.concatenate(parts) for name, parts in rows.items()}
    return Measured(scores, np.array(labels, dtype=np.int64), tuple(names))


def on_test_split(student: Scores, measured: Measured, teacher: tuple[Path, ...]) -> Answers:
    """The student's scores beside what the teacher answered, in shards, to the same images."""
    shards = [load_file(folder / "probabilities.safetensors") for folder in teacher]
    labels = np.concatenate([shard["labels"] for shard in shards])
    if not np.array_equal(labels, measured.labels):
        raise DataError("the teacher's answers do not belong to the images of this test split")
    scores = np.concatenate([shard["probabilities"] for shard in shards])
    rows = np.arange(len(labels))
    return Answers("test", student, scores, measured.labels, measured.names, (rows,))


def cross_validated(folders: tuple[Path, ...], support: Path) -> Answers:
    """What students trained without an image answered to it, and few-shot heads fitted without it."""
    shards = [load_file(folder / "predictions.safetensors") for folder in folders]
    ends = np.cumsum([len(shard["index"]) for shard in shards])
    folds = tuple(np.split(np.arange(ends[-1]), ends[:-1]))
    position = np.concatenate([shard["index"] for shard in shards])
    images = archive.read_index(support / archive.FILE_NAME).images
    if not np.array_equal(np.sort(position), np.arange(len(images))):
        raise DataError(f"cross-validation must answer each of the {len(images)} labelled images once")
    names = tuple(images[at].name for at in position)
    student, teacher, labels = (
        np.concatenate([shard[name] for shard in shards]) for name in ("student", "teacher", "labels")
    )
    return Answers("cross_validation", student, teacher, labels.astype(np.int64), names, folds)
