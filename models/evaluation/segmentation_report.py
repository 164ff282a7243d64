"""EVALUATE of segmentation: the honest report of one student.

Student and teacher are judged pixel by pixel by the masks of the test split, through their ONNX files. Without a test
split, the masks judge what students of a cross-validation answered to images held back, and the report says so.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from models import students
from models.data import archive, masks
from models.errors import DataError
from models.evaluation import report, segmentation, teacher_facts
from models.evaluation.segmentation import Counts
from models.export import onnx_graph, parity, samples, segmentation_graph, teacher_graph
from models.pipeline import StageContext
from models.stages import EvaluationParams

SCHEMA_VERSION = 1
#: Rows of the list of images that went worst.
WORST = 20

Confusions = NDArray[np.int64]  # [n, C, C]


@dataclass(frozen=True)
class Judged:
    """Confusion matrices of student and teacher for the same n images, with the names of these."""

    kind: Literal["test", "cross_validation"]
    student: Confusions
    teacher: Confusions
    names: tuple[str, ...]
    folds: int  # 1: of a test split


def run(context: StageContext, params: EvaluationParams) -> None:
    """Write `report.json`."""
    classes = archive.read_index(context.folder("support") / archive.FILE_NAME).classes
    judged = _on_test_split(context, len(classes)) if "test" in context.inputs else _cross_validated(context)
    if not judged.student.any():
        raise DataError(
            "no pixel of the masks to judge by has a class",
            f"Give some pixels of test/masks/ another value than {archive.IGNORED}.",
        )
    written = document(context, judged, classes, params)
    text = json.dumps(written, ensure_ascii=False, indent=1, allow_nan=False)
    (context.output / report.FILE_NAME).write_text(text + "\n", encoding="utf-8")
    context.report(1, 1, miou=written["summary"]["miou"])


def document(
    context: StageContext, judged: Judged, classes: tuple[str, ...], params: EvaluationParams
) -> dict[str, Any]:
    """The report as JSON."""
    export = _read(context.folder("student_onnx") / onnx_graph.EXPORT_FILE_NAME)
    facts = teacher_facts.read(context)
    assert facts.parameters is not None
    assert facts.bytes is not None
    student, teacher = segmentation.counts_of(judged.student), segmentation.counts_of(judged.teacher)
    shown = masks.images_showing(masks.stream(context.folder("support")), len(classes)).tolist()
    made: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "task": "segmentation",
        "classes": list(classes),
        "data": {
            "support": context.shape.support,
            "unlabelled": context.shape.unlabelled,
            "test": context.shape.test,
            "shots": dict(zip(classes, shown, strict=True)),
        },
        **report.generated(context),
        "evaluation": _how(judged),
        "student": {
            "name": students.read_name(context.folder("student")),
            "input_size": _read(context.folder("trained_student") / "student.json")["input_size"],
            **_figures(student, judged.folds),
            "parameters": export["parameters"],
            "bytes": export["bytes"],
            **report.shortened(context),
        },
        "teacher": {**asdict(facts), **_figures(teacher, judged.folds)},
        "student_against_teacher": _difference(student, teacher, judged.folds),
        "per_class": [asdict(row) for row in segmentation.per_class(student, teacher, classes, judged.folds)],
        "confusion": judged.student.sum(0).tolist(),
        "worst_images": _worst(student, judged.names),
        "latency": report.time_graphs(context, params.latency_runs),
        "compression": {
            "parameters": facts.parameters / export["parameters"],
            "bytes": facts.bytes / export["bytes"],
        },
        "int8": {"asked": False, "accepted": False, "reason": "not made for segmentation"},
        "parity": _read(context.folder("student_onnx") / "parity.json"),
    }
    return {**made, "summary": summary(made)}


def summary(made: dict[str, Any]) -> dict[str, Any]:
    """The headline figures of a report, for lists of students."""
    student = made["student"]
    return {
        "task": made["task"],
        "miou": student["miou"]["value"],
        "miou_low": student["miou"]["low"],
        "miou_high": student["miou"]["high"],
        "teacher_miou": made["teacher"]["miou"]["value"],
        "pixel_accuracy": student["pixel_accuracy"]["value"],
        "evaluated_by": made["evaluation"]["kind"],
        "evaluated_on": made["evaluation"]["images"],
        "parameters": student["parameters"],
        "bytes": student["bytes"],
        "latency_ms": made["latency"]["student"]["median_ms"],
        "teacher_latency_ms": made["latency"]["teacher"]["median_ms"],
        "int8": False,
    }


def _on_test_split(context: StageContext, classes: int) -> Judged:
    """What both ONNX files answer to the test images, one at a time, in the images' own size."""
    folder = context.folder("test")
    sessions = [
        parity.session(path.read_bytes())
        for path in (
            context.folder("student_onnx") / onnx_graph.FILE_NAME,
            context.folder("teacher_onnx") / teacher_graph.FILE_NAME,
        )
    ]
    count = len(archive.read_index(folder / archive.FILE_NAME).images)
    found: tuple[list[Confusions], list[Confusions]] = ([], [])
    names = []
    for number, (sample, truth) in enumerate(
        zip(samples.stream(folder), masks.stream(folder), strict=True), start=1
    ):
        for session, confusions in zip(sessions, found, strict=True):
            answer = segmentation_graph.class_map(session, sample.pixels)
            confusions.append(segmentation.confusion(truth.numpy(), answer, classes))
        names.append(sample.name)
        context.report(number, count + 1)
    return Judged("test", np.stack(found[0]), np.stack(found[1]), tuple(names), folds=1)


def _cross_validated(context: StageContext) -> Judged:
    """What students trained without an image answered to it, and the teacher with a head fitted without it."""
    shards = [load_file(folder / "confusions.safetensors") for folder in context.inputs["cross_validation"]]
    position = np.concatenate([shard["index"] for shard in shards])
    images = archive.read_index(context.folder("support") / archive.FILE_NAME).images
    if not np.array_equal(np.sort(position), np.arange(len(images))):
        raise DataError(f"cross-validation must answer each of the {len(images)} labelled images once")
    student, teacher = (np.concatenate([shard[name] for shard in shards]) for name in ("student", "teacher"))
    names = tuple(images[at].name for at in position)
    return Judged("cross_validation", student, teacher, names, folds=len(shards))


def _figures(counts: Counts, folds: int) -> dict[str, Any]:
    return {
        "miou": asdict(segmentation.share(segmentation.mean_iou, counts, folds=folds)),
        "pixel_accuracy": asdict(segmentation.share(segmentation.pixel_accuracy, counts, folds=folds)),
    }


def _difference(student: Counts, teacher: Counts, folds: int) -> dict[str, float | None]:
    """How much larger the student's mean IoU is than the teacher's; images are drawn anew for both at once."""
    value, low, high = segmentation.interval(
        lambda ours, theirs: segmentation.mean_iou(ours) - segmentation.mean_iou(theirs),
        student,
        teacher,
        folds=folds,
    )
    ends = {"low": None, "high": None} if np.isnan(low) else {"low": float(low), "high": float(high)}
    return {"miou_difference": float(value), **ends}


def _worst(counts: Counts, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The images with the lowest mean IoU of their own; those without a known pixel are left out."""
    values, right = segmentation.mean_iou(counts), segmentation.pixel_accuracy(counts)
    order = [row for row in np.argsort(values, kind="stable").tolist() if not np.isnan(right[row])]
    return [
        {"name": names[row], "miou": float(values[row]), "pixel_accuracy": float(right[row])}
        for row in order[:WORST]
    ]


def _how(judged: Judged) -> dict[str, Any]:
    """How the figures came about, as fields and as a sentence for people."""
    count, folds = len(judged.names), judged.folds
    pixels = (
        "Pixels are counted over all images; those whose mask says that the class is not known are left out. Classes "
        "that neither occur nor are answered do not count in the mean."
    )
    if judged.kind == "test":
        text = (
            f"Measured with the exported ONNX file on the masks of {count} test images that nothing was trained on. "
            f"{pixels} The interval comes from drawing images anew (bootstrap)."
        )
        return {"kind": judged.kind, "images": count, "folds": None, "explanation": text}
    text = (
        f"There is no test split: estimated by {folds}-fold cross-validation on the {count} labelled images. Each was "
        f"answered by one of {folds} students trained like this one but without it, in PyTorch; the shipped student "
        f"learned from all of them and was itself not tested. {pixels} The interval comes from drawing images anew "
        "(bootstrap), and is stretched as the folds share training images. Upload test/images/ and test/masks/ for a "
        "measurement."
    )
    return {"kind": judged.kind, "images": count, "folds": folds, "explanation": text}


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
