"""EVALUATE of a feature extractor: how alike its features are to its teacher's.

Both are asked through their ONNX files, on the test images or, without any, on images that the student learned from,
and the report says so. Images with labels tell besides how often the nearest image shows the same class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from models import students
from models.data import archive
from models.evaluation import accuracy, features, report, teacher_facts
from models.evaluation.accuracy import Accuracy
from models.evaluation.features import Ints, Rows
from models.export import feature_graph, onnx_graph, parity, samples, teacher_graph
from models.export.samples import Sample
from models.methods.wecolora_features import FeatureEvaluationParams
from models.pipeline import StageContext

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Seen:
    """Features [N, D] of both networks for the same images, and their labels [N], -1: none."""

    student: Rows
    teacher: Rows
    labels: Ints

    def at(self, rows: Ints) -> Seen:
        return Seen(self.student[rows], self.teacher[rows], self.labels[rows])


def run(context: StageContext, params: FeatureEvaluationParams) -> None:
    """Write `report.json`."""
    written = document(context, params)
    text = json.dumps(written, ensure_ascii=False, indent=1, allow_nan=False)
    (context.output / report.FILE_NAME).write_text(text + "\n", encoding="utf-8")
    context.report(1, 1, cosine=written["summary"]["cosine"])


def document(context: StageContext, params: FeatureEvaluationParams) -> dict[str, Any]:
    """The report as JSON."""
    export = _read(context.folder("student_onnx") / onnx_graph.EXPORT_FILE_NAME)
    facts = teacher_facts.read(context)
    assert facts.parameters is not None
    assert facts.bytes is not None
    judged_on: Literal["test", "learned_from"] = "test" if "test" in context.inputs else "learned_from"
    seen = _ask(context, _judged(context, params.images))
    same = accuracy.on_test_split(features.nearest(seen.student) == features.nearest(seen.teacher))
    neighbours = _neighbours(context, seen)
    made: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "task": "features",
        "classes": [],
        "data": report.data(context),
        **report.generated(context),
        "evaluation": {
            "kind": judged_on,
            "images": len(seen.labels),
            "folds": None,
            "explanation": _how(judged_on, len(seen.labels), neighbours),
        },
        "student": {
            "name": students.read_name(context.folder("student")),
            "input_size": _read(context.folder("trained_student") / "student.json")["input_size"],
            "width": export["width"],
            "accuracy": asdict(neighbours.student) if neighbours else None,
            "parameters": export["parameters"],
            "bytes": export["bytes"],
            **report.shortened(context),
        },
        "teacher": {**asdict(facts), "accuracy": asdict(neighbours.teacher) if neighbours else None},
        "cosine": asdict(features.mean_cosine(seen.student, seen.teacher)),
        "cka": asdict(features.cka(seen.student, seen.teacher)),
        "agreement": asdict(same),
        "latency": report.time_graphs(context, params.latency_runs),
        "compression": {
            "parameters": facts.parameters / export["parameters"],
            "bytes": facts.bytes / export["bytes"],
        },
        "int8": {"asked": False, "accepted": False, "reason": "not made of a feature extractor"},
        "parity": _read(context.folder("student_onnx") / "parity.json"),
    }
    return {**made, "summary": summary(made)}


def summary(made: dict[str, Any]) -> dict[str, Any]:
    """The headline figures of a report, for lists of students."""
    student, teacher = made["student"], made["teacher"]
    return {
        "task": made["task"],
        "cosine": made["cosine"]["value"],
        "cka": made["cka"]["value"],
        "accuracy": (student["accuracy"] or {}).get("value"),
        "teacher_accuracy": (teacher["accuracy"] or {}).get("value"),
        "agreement": made["agreement"]["value"],
        "evaluated_by": made["evaluation"]["kind"],
        "evaluated_on": made["evaluation"]["images"],
        "parameters": student["parameters"],
        "bytes": student["bytes"],
        "latency_ms": made["latency"]["student"]["median_ms"],
        "teacher_latency_ms": made["latency"]["teacher"]["median_ms"],
        "int8": False,
    }


@dataclass(frozen=True)
class Neighbours:
    """How often the nearest labelled image is of the same class."""

    student: Accuracy
    teacher: Accuracy


def _neighbours(context: StageContext, seen: Seen) -> Neighbours | None:
    """None without labelled images. The neighbour of a test image is a labelled one, of a labelled one another."""
    if "support" not in context.inputs:
        return None
    support = context.folder("support")
    known = _ask(context, samples.stream(support)) if "test" in context.inputs else None
    asked = seen.at(np.flatnonzero(seen.labels >= 0))
    if len(asked.labels) < 2:
        return None

    def right(ours: Rows, theirs: Rows | None) -> Accuracy:
        labels = asked.labels if known is None else known.labels
        return accuracy.on_test_split(labels[features.nearest(ours, theirs)] == asked.labels)

    return Neighbours(
        right(asked.student, known.student if known else None),
        right(asked.teacher, known.teacher if known else None),
    )


def _judged(context: StageContext, most: int) -> Iterator[Sample]:
    """At most `most` of the test images, or of those learned from, evenly over all of them."""
    folders = [context.folder("test")] if "test" in context.inputs else samples.learned_from(context.inputs)
    named = context.folder("support") if "support" in context.inputs else folders[0]
    classes = archive.read_index(named / archive.FILE_NAME).classes
    total = sum(len(archive.read_index(folder / archive.FILE_NAME).images) for folder in folders)
    spread = np.linspace(0, total - 1, min(most, total)).round().astype(int).tolist()
    return samples.in_a_row(folders, spread, classes)


def _ask(context: StageContext, shown: Iterator[Sample]) -> Seen:
    """Both ONNX files, one image at a time."""
    sessions = [
        parity.session(path.read_bytes())
        for path in (
            context.folder("student_onnx") / onnx_graph.FILE_NAME,
            context.folder("teacher_onnx") / teacher_graph.FILE_NAME,
        )
    ]
    found: tuple[list[Rows], list[Rows]] = ([], [])
    labels = []
    for number, sample in enumerate(shown, start=1):
        for session, rows in zip(sessions, found, strict=True):
            rows.append(feature_graph.features(session, sample.pixels[None])[0].astype(np.float64))
        labels.append(-1 if sample.label is None else sample.label)
        context.report(number, number + 1)
    return Seen(np.stack(found[0]), np.stack(found[1]), np.array(labels))


def _how(kind: str, count: int, neighbours: Neighbours | None) -> str:
    """How the figures came about, for people."""
    where = (
        f"{count} test images that nothing was trained on"
        if kind == "test"
        else f"{count} images that the student learned from, as there is no test split: of others it may be less alike"
    )
    text = (
        f"The features of student and teacher were compared with the exported ONNX files on {where}. Agreement is the "
        "share of images whose nearest image among these, by cosine, is the same for both."
    )
    if neighbours is None:
        return text + " No class is known, so that there is no accuracy."
    whose = "the nearest labelled image" if kind == "test" else "the nearest other labelled image"
    return text + (
        f" Accuracy is the share of {neighbours.student.total} images of which {whose} shows the same class."
    )


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
