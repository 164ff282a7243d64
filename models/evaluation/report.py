"""EVALUATE: the honest report of one student.

Accuracy is measured through the exported ONNX file on images that nothing was trained on. Without a test split it
is estimated by cross-validation, and the report says so. Whether the int8 file ships is decided here, too.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime

from models import students, teachers
from models.data import archive
from models.evaluation import accuracy, compare, latency
from models.evaluation.answers import Answers, Measured, cross_validated, on_test_split, run_files
from models.export import onnx_graph, parity, samples, teacher_graph
from models.pipeline import StageContext
from models.stages import EvaluationParams

FILE_NAME = "report.json"
SCHEMA_VERSION = 1
#: Rows of the lists of mistakes and disagreements.
WORST = 20

STUDENT, INT8 = "student", "student_int8"


def run(context: StageContext, params: EvaluationParams) -> None:
    """Write `report.json`."""
    export = _read(context.folder("student_onnx") / onnx_graph.EXPORT_FILE_NAME)
    graph = _read(context.folder("teacher_onnx") / teacher_graph.DOCUMENT_NAME)
    index = archive.read_index(context.folder("support") / archive.FILE_NAME)
    sessions = {STUDENT: _session(context, onnx_graph.FILE_NAME)}
    if export["int8"]["made"]:
        sessions[INT8] = _session(context, onnx_graph.INT8_FILE_NAME)
    total = context.shape.test + 1
    if "test" in context.inputs:
        test = samples.stream(context.folder("test"))
        measured = run_files(sessions, test, lambda number: context.report(number, total))
        judged = on_test_split(measured.scores[STUDENT], measured, context.inputs["teacher_on_test"])
    else:
        judged = cross_validated(context.inputs["cross_validation"], context.folder("support"))
        measured = run_files(sessions, samples.stream(context.folder("support")))
    classes = index.classes
    right, teacher_right = (scores.argmax(1) == judged.labels for scores in (judged.student, judged.teacher))
    student_accuracy = judged.accuracy_of(judged.student)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "classes": list(classes),
        "data": _data(context, index),
        "evaluation": _how(judged, student_accuracy),
        "student": {
            "name": students.read_name(context.folder("student")),
            "input_size": students.load(context.folder("trained_student")).input_size,
            "accuracy": asdict(student_accuracy),
            "parameters": export["parameters"],
            "bytes": export["bytes"],
        },
        "teacher": {
            "name": teachers.read_spec(context.folder("teacher")).name,
            "input_size": graph["input_size"],
            "accuracy": asdict(judged.accuracy_of(judged.teacher)),
            "parameters": graph["parameters"],
            "bytes": graph["bytes"],
        },
        "agreement": asdict(compare.agreement(judged.student.argmax(1), judged.teacher.argmax(1))),
        "student_against_teacher": asdict(compare.paired(right, teacher_right)),
        "per_class": [
            asdict(row) for row in accuracy.per_class(judged.labels, judged.student.argmax(1), classes)
        ],
        "confusion": accuracy.confusion(judged.labels, judged.student.argmax(1), len(classes)).tolist(),
        "worst_mistakes": [
            asdict(row)
            for row in compare.worst_mistakes(judged.student, judged.labels, judged.names, classes, WORST)
        ],
        "disagreements": [
            asdict(row)
            for row in compare.disagreements(
                judged.student, judged.teacher, judged.labels, judged.names, classes, WORST
            )
        ],
        "latency": _latency(context, params.latency_runs),
        "compression": {
            "parameters": graph["parameters"] / export["parameters"],
            "bytes": graph["bytes"] / export["bytes"],
        },
        "int8": _judge_int8(export, measured, judged.kind),
        "parity": _read(context.folder("student_onnx") / "parity.json"),
    }
    report["summary"] = summary(report)
    text = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)
    (context.output / FILE_NAME).write_text(text + "\n", encoding="utf-8")
    context.report(total, total, accuracy=student_accuracy.value)


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The headline figures of a report, for lists of students."""
    student, teacher = report["student"], report["teacher"]
    return {
        "accuracy": student["accuracy"]["value"],
        "accuracy_low": student["accuracy"]["low"],
        "accuracy_high": student["accuracy"]["high"],
        "teacher_accuracy": teacher["accuracy"]["value"],
        "evaluated_by": report["evaluation"]["kind"],
        "evaluated_on": report["evaluation"]["images"],
        "agreement": report["agreement"]["value"],
        "parameters": student["parameters"],
        "bytes": student["bytes"],
        "latency_ms": report["latency"]["student"]["median_ms"],
        "teacher_latency_ms": report["latency"]["teacher"]["median_ms"],
        "int8": report["int8"]["accepted"],
    }


def _how(judged: Answers, measured: accuracy.Accuracy) -> dict[str, Any]:
    """How the accuracy came about, as fields and as a sentence for people."""
    count, folds = len(judged.labels), len(judged.folds)
    if judged.kind == "test":
        text = f"Measured with the exported ONNX file on {count} test images that nothing was trained on."
        return {"kind": judged.kind, "images": count, "folds": None, "explanation": text}
    text = (
        f"There is no test split: estimated by stratified {folds}-fold cross-validation on the {count} labelled "
        f"images. Each was answered by one of {folds} students trained like this one but without it, in PyTorch; "
        "the shipped student learned from all of them and was itself not tested. The interval is wider than that "
        f"of a test split of the same size, as the folds share training images: it counts the {count} answers as "
        f"{measured.effective_total:.0f}. Upload a test split for a measurement."
    )
    return {"kind": judged.kind, "images": count, "folds": folds, "explanation": text}


def _judge_int8(export: dict[str, Any], measured: Measured, kind: str) -> dict[str, Any]:
    """Whether the int8 file ships: only if its accuracy drops by no more than was allowed.

    Without a test split the drop is measured on the labelled images. The student learned those, so nearly all
    its answers are right there and the drop is nearly the share of answers that change: a strict judge.
    """
    int8 = export["int8"]
    verdict: dict[str, Any] = {"asked": int8["asked"], "accepted": False, "reason": "not asked for"}
    if not int8["asked"]:
        return verdict
    limit = export["max_accuracy_drop"]
    verdict["max_accuracy_drop"] = limit
    if not int8["made"]:
        return verdict | {"reason": int8["reason"]}
    split = "test" if kind == "test" else "support"
    labels = measured.labels
    full, small = (measured.scores[name].argmax(1) for name in (STUDENT, INT8))
    drop = float((full == labels).mean() - (small == labels).mean())
    accepted = drop <= limit + 1e-9
    where = (
        f"{len(labels)} {'test images' if split == 'test' else 'labelled images, which it was trained on'}"
    )
    verb = "within" if accepted else "more than"
    return verdict | {
        "accepted": accepted,
        "reason": f"accuracy drops by {100 * drop:.2f} % on {where}: {verb} the {100 * limit:.2f} % allowed",
        "measured_on": split,
        "accuracy_drop": drop,
        "comparison": asdict(compare.paired(full == labels, small == labels)),
        "agreement": asdict(compare.agreement(full, small)),
        "bytes": int8["bytes"],
        "compression": export["bytes"] / int8["bytes"],
        "calibration_images": int8["calibration_images"],
    }


def _latency(context: StageContext, runs: int) -> dict[str, Any]:
    """Student, teacher and (if made) the int8 file, timed turn by turn on one image of the support."""
    files = {
        STUDENT: context.folder("student_onnx") / onnx_graph.FILE_NAME,
        "teacher": context.folder("teacher_onnx") / teacher_graph.FILE_NAME,
        INT8: context.folder("student_onnx") / onnx_graph.INT8_FILE_NAME,
    }
    sessions = {
        name: parity.session(path.read_bytes(), threads=latency.THREADS)
        for name, path in files.items()
        if path.exists()
    }
    (sample,) = samples.stratified(context.folder("support"), 1)
    seconds = latency.interleaved(sessions, sample.pixels, runs)
    height, width = sample.pixels.shape[:2]
    document: dict[str, Any] = {
        "runtime": f"onnxruntime {onnxruntime.__version__}, CPU",
        "threads": latency.THREADS,
        "batch": 1,
        "image": {"height": height, "width": width},
        "includes": "preprocessing in the graph; not the decoding of the file",
        "order": "interleaved",
        **{name: asdict(latency.summary(times)) for name, times in seconds.items()},
        "speedup": asdict(latency.speedup(seconds["teacher"], seconds[STUDENT])),
    }
    if INT8 in seconds:
        document["int8_speedup"] = asdict(latency.speedup(seconds[STUDENT], seconds[INT8]))
    return document


def _data(context: StageContext, index: archive.ArchiveIndex) -> dict[str, Any]:
    """Counts of images, and shots per class."""
    labels = [image.label for image in index.images]
    return {
        "support": context.shape.support,
        "unlabelled": context.shape.unlabelled,
        "test": context.shape.test,
        "shots": {name: labels.count(number) for number, name in enumerate(index.classes)},
    }


def _session(context: StageContext, file: str) -> onnxruntime.InferenceSession:
    return parity.session((context.folder("student_onnx") / file).read_bytes())


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
