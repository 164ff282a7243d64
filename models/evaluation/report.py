"""EVALUATE: the honest report of one student.

Accuracy is measured through the exported ONNX file on images that nothing was trained on. Without a test split it
is estimated by cross-validation, or, of a student of a black box, by its agreement with the teacher on images held
out, and the report says so. Whether the int8 file ships is decided here, too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime

from models import generators, students
from models.data import archive
from models.evaluation import accuracy, compare, latency, teacher_facts
from models.evaluation.answers import (
    FEWEST_LABELLED,
    Answers,
    Measured,
    cross_validated,
    held_out_positions,
    on_held_out,
    on_test_split,
    run_files,
)
from models.evaluation.compare import Scores
from models.export import onnx_graph, parity, samples, teacher_graph
from models.pipeline import StageContext
from models.stages import EvaluationParams
from models.training import selection

FILE_NAME = "report.json"
SCHEMA_VERSION = 1
#: Rows of the lists of mistakes and disagreements.
WORST = 20
#: Classes up to which the confusion matrix is written: a black box may have thousands.
MOST_CONFUSED = 1000

STUDENT, INT8 = "student", "student_int8"


def run(context: StageContext, params: EvaluationParams) -> None:
    """Write `report.json`."""
    export = _read(context.folder("student_onnx") / onnx_graph.EXPORT_FILE_NAME)
    facts = teacher_facts.read(context)
    student = students.load(context.folder("trained_student"))
    classes = student.classes
    measured, judged = _judged(context, classes, export["int8"]["made"])
    labelled = judged.with_labels()
    agreement = compare.agreement(judged.student.argmax(1), judged.teacher.argmax(1))
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "classes": list(classes),
        "data": data(context),
        **generated(context),
        "evaluation": _how(judged, labelled, context),
        "student": {
            "name": students.read_name(context.folder("student")),
            "input_size": student.input_size,
            "accuracy": _accuracy(labelled, labelled.student) if labelled else None,
            "parameters": export["parameters"],
            "bytes": export["bytes"],
            **shortened(context),
        },
        "teacher": {
            **asdict(facts),
            "accuracy": _accuracy(labelled, labelled.teacher) if labelled else None,
        },
        "agreement": asdict(agreement),
        **_by_label(labelled, classes),
        "disagreements": [
            asdict(row)
            for row in compare.disagreements(
                judged.student, judged.teacher, judged.labels, judged.names, classes, WORST
            )
        ],
        "latency": time_graphs(context, params.latency_runs),
        "compression": {
            "parameters": facts.parameters / export["parameters"] if facts.parameters else None,
            "bytes": facts.bytes / export["bytes"] if facts.bytes else None,
        },
        "int8": _judge_int8(export, measured, judged, labelled),
        "parity": _read(context.folder("student_onnx") / "parity.json"),
    }
    report["summary"] = summary(report)
    text = json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False)
    (context.output / FILE_NAME).write_text(text + "\n", encoding="utf-8")
    headline = {"accuracy": report["summary"]["accuracy"], "agreement": agreement.value}
    known = {name: value for name, value in headline.items() if value is not None}
    context.report(1, 1, **known)


def _judged(context: StageContext, classes: Sequence[str], int8: bool) -> tuple[Measured, Answers]:
    """What the exported files answer to the images at hand, and the answers that the student is judged by."""
    sessions = {STUDENT: _session(context, onnx_graph.FILE_NAME)}
    if int8:
        sessions[INT8] = _session(context, onnx_graph.INT8_FILE_NAME)
    if "test" in context.inputs:
        total = context.shape.test + 1
        images = samples.stream(context.folder("test"), classes=classes)
        measured = run_files(sessions, images, lambda number: context.report(number, total))
        teacher = context.inputs["teacher_on_test"]
        return measured, on_test_split(measured.scores[STUDENT], measured, teacher, context.folder("test"))
    if "teacher_on_held_out" in context.inputs:
        asked = context.folder("teacher_on_held_out")
        held_out = held_out_positions(asked)
        images = samples.in_a_row(samples.learned_from(context.inputs), held_out, classes)
        total = len(held_out) + 1
        measured = run_files(sessions, images, lambda number: context.report(number, total))
        return measured, on_held_out(measured.scores[STUDENT], measured, asked)
    measured = run_files(sessions, samples.stream(context.folder("support"), classes=classes))
    return measured, cross_validated(context.inputs["cross_validation"], context.folder("support"))


def _accuracy(labelled: Answers, scores: Scores) -> dict[str, Any]:
    return asdict(labelled.accuracy_of(scores))


def _by_label(labelled: Answers | None, classes: Sequence[str]) -> dict[str, Any]:
    """What can be told only of images whose class is known: null or nothing where they are too few."""
    if labelled is None:
        return {"student_against_teacher": None, "per_class": [], "confusion": None, "worst_mistakes": []}
    labels, answers = labelled.labels, labelled.student.argmax(1)
    mistakes = compare.worst_mistakes(labelled.student, labels, labelled.names, classes, WORST)
    return {
        "student_against_teacher": asdict(
            compare.paired(answers == labels, labelled.teacher.argmax(1) == labels)
        ),
        "per_class": [asdict(row) for row in accuracy.per_class(labels, answers, classes)],
        "confusion": accuracy.confusion(labels, answers, len(classes)).tolist()
        if len(classes) <= MOST_CONFUSED
        else None,
        "worst_mistakes": [asdict(row) for row in mistakes],
    }


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The headline figures of a report, for lists of students; null where a figure is not known."""
    student, teacher = report["student"], report["teacher"]
    accuracy, timed = student["accuracy"] or {}, report["latency"]["teacher"] or {}
    return {
        "accuracy": accuracy.get("value"),
        "accuracy_low": accuracy.get("low"),
        "accuracy_high": accuracy.get("high"),
        "teacher_accuracy": (teacher["accuracy"] or {}).get("value"),
        "evaluated_by": report["evaluation"]["kind"],
        "evaluated_on": report["evaluation"]["images"],
        "agreement": report["agreement"]["value"],
        "agreement_low": report["agreement"]["low"],
        "agreement_high": report["agreement"]["high"],
        "parameters": student["parameters"],
        "bytes": student["bytes"],
        "latency_ms": report["latency"]["student"]["median_ms"],
        "teacher_latency_ms": timed.get("median_ms"),
        "int8": report["int8"]["accepted"],
    }


def _how(judged: Answers, labelled: Answers | None, context: StageContext) -> dict[str, Any]:
    """How the figures came about, as fields and as a sentence for people."""
    count, folds = len(judged.labels), len(judged.folds)
    if judged.kind == "test":
        text = f"Measured with the exported ONNX file on {count} test images that nothing was trained on."
        return {"kind": judged.kind, "images": count, "folds": None, "explanation": text}
    if judged.kind == "held_out":
        text = _how_held_out(judged, labelled, context)
        return {"kind": judged.kind, "images": count, "folds": None, "explanation": text}
    effective = judged.accuracy_of(judged.student).effective_total
    text = (
        f"There is no test split: estimated by stratified {folds}-fold cross-validation on the {count} labelled "
        f"images. Each was answered by one of {folds} students trained like this one but without it, in PyTorch; "
        "the shipped student learned from all of them and was itself not tested. The interval is wider than that "
        f"of a test split of the same size, as the folds share training images: it counts the {count} answers as "
        f"{effective:.0f}. Upload a test split for a measurement."
    )
    if "selection" in context.inputs:
        text += (
            " What the generator learned of a class it learned from all labelled images, also from those that a fold "
            "held back: the estimate may be somewhat too high."
        )
    return {"kind": judged.kind, "images": count, "folds": folds, "explanation": text}


def _how_held_out(judged: Answers, labelled: Answers | None, context: StageContext) -> str:
    count, known = len(judged.labels), int((judged.labels >= 0).sum())
    real = context.shape.support + context.shape.unlabelled
    text = (
        f"There is no test split: {count} of the {real} images were held out, so that nothing learned from them, and "
        "the exported ONNX file answered them. Agreement is the share to which it gives the teacher's answer. "
    )
    if labelled is not None:
        return (
            text
            + f"Accuracy is measured on the {known} of them that have labels. Upload a test split for more."
        )
    why = (
        f"only {known} of them have labels, and {FEWEST_LABELLED} are needed" if known else "none has a label"
    )
    return text + (
        f"Accuracy is not known, as {why}: where the teacher is wrong, a student that agrees is wrong, too. Upload a "
        "test split with labels for a measurement."
    )


def _judge_int8(
    export: dict[str, Any], measured: Measured, judged: Answers, labelled: Answers | None
) -> dict[str, Any]:
    """Whether the int8 file ships: only if its accuracy drops by no more than was allowed.

    Without a test split the drop is measured on the labelled images. The student learned those, so nearly all
    its answers are right there and the drop is nearly the share of answers that change: a strict judge.
    Where too few images that were held out have labels, the teacher's answers count as the right ones.
    """
    int8 = export["int8"]
    verdict: dict[str, Any] = {"asked": int8["asked"], "accepted": False, "reason": "not asked for"}
    if not int8["asked"]:
        return verdict
    limit = export["max_accuracy_drop"]
    verdict["max_accuracy_drop"] = limit
    if not int8["made"]:
        return verdict | {"reason": int8["reason"]}
    split, where = {
        "test": ("test", "test images"),
        "cross_validation": ("support", "labelled images, which it was trained on"),
        "held_out": ("held_out", "images that were held out"),
    }[judged.kind]
    what = "accuracy" if labelled else "agreement with the teacher"
    labels = measured.labels if labelled else judged.teacher.argmax(1)
    full, small = (measured.scores[name].argmax(1)[labels >= 0] for name in (STUDENT, INT8))
    labels = labels[labels >= 0]
    drop = float((full == labels).mean() - (small == labels).mean())
    accepted = drop <= limit + 1e-9
    verb = "within" if accepted else "more than"
    return verdict | {
        "accepted": accepted,
        "reason": f"{what} drops by {100 * drop:.2f} % on {len(labels)} {where}: {verb} the {100 * limit:.2f} %"
        " allowed",
        "measured_on": split,
        "accuracy_drop": drop if labelled else None,
        "agreement_drop": None if labelled else drop,
        "comparison": asdict(compare.paired(full == labels, small == labels)),
        "agreement": asdict(compare.agreement(full, small)),
        "bytes": int8["bytes"],
        "compression": export["bytes"] / int8["bytes"],
        "calibration_images": int8["calibration_images"],
    }


def time_graphs(context: StageContext, runs: int) -> dict[str, Any]:
    """Student, the teacher's graph and the int8 file, as far as there are, timed turn by turn on one image.

    A black box is timed apart, if at all: not as the student is, so that there is no speedup.
    """
    files = {
        STUDENT: context.folder("student_onnx") / onnx_graph.FILE_NAME,
        INT8: context.folder("student_onnx") / onnx_graph.INT8_FILE_NAME,
    }
    if "teacher_onnx" in context.inputs:
        files["teacher"] = context.folder("teacher_onnx") / teacher_graph.FILE_NAME
    sessions = {
        name: parity.session(path.read_bytes(), threads=latency.THREADS)
        for name, path in files.items()
        if path.exists()
    }
    shown, *_ = samples.learned_from(context.inputs)
    (sample,) = samples.stratified(shown, 1)
    seconds = latency.interleaved(sessions, sample.pixels, runs)
    height, width = sample.pixels.shape[:2]
    document: dict[str, Any] = {
        "runtime": f"onnxruntime {onnxruntime.__version__}, CPU",
        "threads": latency.THREADS,
        "batch": 1,
        "image": {"height": height, "width": width},
        "includes": "preprocessing in the graph; not the decoding of the file",
        "order": "interleaved",
        "teacher": None,
        "teacher_note": "",
        **{name: asdict(latency.summary(times)) for name, times in seconds.items()},
        "speedup": None,
    }
    if "teacher" in seconds:
        document["speedup"] = asdict(latency.speedup(seconds["teacher"], seconds[STUDENT]))
    else:
        timed, document["teacher_note"] = teacher_facts.time_black_box(context, sample.pixels, runs)
        document["teacher"] = asdict(timed) if timed else None
    if INT8 in seconds:
        document["int8_speedup"] = asdict(latency.speedup(seconds[STUDENT], seconds[INT8]))
    return document


def data(context: StageContext) -> dict[str, Any]:
    """Counts of images, and labelled ones of each of the data set's classes."""
    shots: dict[str, int] = {}
    if "support" in context.inputs:
        index = archive.read_index(context.folder("support") / archive.FILE_NAME)
        labels = Counter(image.label for image in index.images)
        shots = {name: labels[number] for number, name in enumerate(index.classes)}
    return {
        "support": context.shape.support,
        "unlabelled": context.shape.unlabelled,
        "test": context.shape.test,
        "shots": shots,
    }


def generated(context: StageContext) -> dict[str, Any]:
    """Under "generator": which one made images, how many, and how many were learned from. Empty without any."""
    if "generator" not in context.inputs:
        return {}
    spec = generators.read_spec(context.folder("generator"))
    kept = selection.kept(context)
    about = spec.model_dump(include={"name", "title", "revision", "licence", "licence_url"})
    made = {"images": len(kept), "kept": int(kept.sum())}
    return {"generator": {**about, "source": spec.source if spec.kind == "hub" else spec.kind, **made}}


def shortened(context: StageContext) -> dict[str, Any]:
    """Under "shortened": what a student that is made of its teacher's blocks has of it. Empty for any other."""
    backbone = _read(context.folder("trained_student") / "student.json").get("backbone")
    if backbone is None:
        return {}
    trained_with, shortening = backbone["trained_with"], backbone["shortening"]
    about = {name: shortening[name] for name in ("kept", "depth", "rule")}
    learnt = {name: trained_with[name] for name in ("start", "adaptation", "rank")}
    return {"shortened": {**about, **learnt, "interpolated_from": backbone["interpolated_from"]}}


def _session(context: StageContext, file: str) -> onnxruntime.InferenceSession:
    return parity.session((context.folder("student_onnx") / file).read_bytes())


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
