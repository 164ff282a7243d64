"""What student and teacher answer to the images they are judged on: a test split, held-back folds, or images that
were held out, whose labels may not be known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
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

#: Fewer held-out images with labels than this say nothing of accuracy.
FEWEST_LABELLED = 30


@dataclass(frozen=True)
class Answers:
    """Scores float [N, C] of student and teacher, labels int [N] (-1: none) and names of the same N images.

    Only images that were held out may lack labels. `folds` are the rows that each student of a cross-validation
    answered; other answers are one fold.
    """

    kind: Literal["test", "cross_validation", "held_out"]
    student: Scores
    teacher: Scores
    labels: Ints
    names: tuple[str, ...]
    folds: tuple[Ints, ...]

    def with_labels(self) -> Answers | None:
        """The answers to images with labels. None where they are too few to speak of accuracy."""
        rows = np.flatnonzero(self.labels >= 0)
        if len(rows) == len(self.labels) and self.kind != "held_out":
            return self
        if len(rows) < FEWEST_LABELLED:
            return None
        return replace(
            self,
            student=self.student[rows],
            teacher=self.teacher[rows],
            labels=self.labels[rows],
            names=tuple(self.names[row] for row in rows),
            folds=(np.arange(len(rows)),),
        )

    def accuracy_of(self, scores: Scores) -> accuracy.Accuracy:
        """The accuracy of `scores` [N, C] with the interval that this kind of answers allows. All have labels."""
        right = scores.argmax(1) == self.labels
        if self.kind == "cross_validation":
            return accuracy.cross_validated([right[rows] for rows in self.folds])
        return accuracy.on_test_split(right)


@dataclass(frozen=True)
class Measured:
    """Scores float [N, C] of each ONNX file, labels int [N] (-1: none) and names of the images it was run on."""

    scores: dict[str, Scores]
    labels: Ints
    names: tuple[str, ...]


def run_files(
    sessions: Mapping[str, onnxruntime.InferenceSession],
    images: Iterable[Sample],
    on_image: Callable[[int], None] = lambda number: None,
) -> Measured:
    """Run each session on each image, one at a time, as a user would."""
    rows: dict[str, list[Scores]] = {name: [] for name in sessions}
    labels, names = [], []
    for number, sample in enumerate(images, start=1):
        for name, session in sessions.items():
            rows[name].append(session.run(None, {"image": sample.pixels[None]})[0])
        labels.append(-1 if sample.label is None else sample.label)
        names.append(sample.name)
        on_image(number)
    if not labels:
        raise DataError("there is no image to judge the student on")
    scores = {name: np.concatenate(parts) for name, parts in rows.items()}
    return Measured(scores, np.array(labels, dtype=np.int64), tuple(names))


def on_test_split(student: Scores, measured: Measured, teacher: tuple[Path, ...], test: Path) -> Answers:
    """The student's scores beside what the teacher answered, in shards, to the same images of the split `test`."""
    without = [name for name, label in zip(measured.names, measured.labels, strict=True) if label < 0]
    if without:
        raise DataError(
            f"{len(without)} test images, such as '{without[0]}', are of no class that the student knows",
            "Give test classes the names of the teacher's classes, or remove them.",
        )
    shards = [load_file(folder / "probabilities.safetensors") for folder in teacher]
    labels = np.concatenate([shard["labels"] for shard in shards])
    images = archive.read_index(test / archive.FILE_NAME).images
    if labels.tolist() != [image.label for image in images]:
        raise DataError("the teacher's answers do not belong to the images of this test split")
    scores = np.concatenate([shard["probabilities"] for shard in shards])
    rows = np.arange(len(labels))
    return Answers("test", student, scores, measured.labels, measured.names, (rows,))


def on_held_out(student: Scores, measured: Measured, teacher: Path) -> Answers:
    """The student's scores beside what the teacher answered to images that nothing was trained on.

    `measured`: those at `held_out_positions(teacher)`.
    """
    document = load_file(teacher / "answers.safetensors")
    scores = document["probabilities"][np.argsort(document["index"])]
    if len(scores) != len(measured.labels):
        raise DataError("the teacher's answers do not belong to the images that were held out")
    rows = np.arange(len(scores))
    return Answers("held_out", student, scores, measured.labels, measured.names, (rows,))


def held_out_positions(teacher: Path) -> list[int]:
    """Which of the labelled and then the unlabelled images were held out, ascending."""
    positions: list[int] = np.sort(load_file(teacher / "answers.safetensors")["index"]).tolist()
    return positions


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
