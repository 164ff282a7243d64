"""The model card of a student that gives features; its sections are those of `model_card`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.export import model_card
from models.export.model_card import percent, plain, size, times
from models.teachers import AnyTeacher

Report = Mapping[str, Any]


def render(report: Report, teacher: AnyTeacher, normalisation: Mapping[str, Any], onnxruntime: str) -> str:
    """Markdown. `onnxruntime` is the version that the student was checked with."""
    sections = (
        f"# {report['student']['name']}: {report['student']['width']} features\n",
        _summary(report, teacher),
        "## How to run it\n",
        _usage(report, normalisation, onnxruntime),
        "## How good it is\n",
        _quality(report),
        "## What it learned from\n",
        model_card.data(report, teacher),
        "## Licences\n",
        model_card.licences(report, teacher),
        "## Limits\n",
        _limits(),
    )
    return "\n".join(sections)


def _summary(report: Report, teacher: AnyTeacher) -> str:
    student, smaller = report["student"], report["compression"]
    fewer = times(smaller["parameters"], "fewer", "more")
    lines = (
        f"- {student['parameters']:,} parameters, {fewer} than the teacher; {size(student['bytes'])}",
        f"- cosine of its features and the teacher's: {_likeness(report['cosine'])}",
        f"- one image in {_median(report, 'student')}, the teacher in {_median(report, 'teacher')}",
    )
    return (
        f"A small vision transformer that gives the features of an image, made of **{plain(teacher.title)}**, for"
        " search, clustering or a classifier of your own.\n\n" + "\n".join(lines) + "\n"
    )


def _usage(report: Report, normalisation: Mapping[str, Any], onnxruntime: str) -> str:
    side = normalisation["resize"]["size"]
    return (
        "    pip install onnxruntime pillow\n"
        "    python predict.py --check\n"
        "    python predict.py photo.jpg another.png\n\n"
        "Input `image`: uint8 [batch, height, width, 3], upright RGB, any size, any batch. Output `features`: float"
        f" [batch, {report['student']['width']}], as the network gives them: divide by their length to compare them by"
        " cosine.\n"
        f"Resizing to {side} x {side} and normalisation happen inside the graph: do neither yourself.\n"
        f"Standard ONNX operators of opset {normalisation['opset']} only; checked with ONNX Runtime"
        f" {onnxruntime}. `sha256sum -c SHA256SUMS` checks the files.\n"
    )


def _quality(report: Report) -> str:
    student, teacher, latency = report["student"], report["teacher"], report["latency"]
    rows = ["| | student | teacher |", "|---|---|---|"]
    if student["accuracy"]:
        rows.append(
            f"| nearest image is of the same class | {percent(student['accuracy'])} | {percent(teacher['accuracy'])} |"
        )
    rows += [
        f"| parameters | {student['parameters']:,} | {teacher['parameters']:,} |",
        f"| ONNX file | {size(student['bytes'])} | {size(teacher['bytes'])} |",
        f"| latency, median | {_median(report, 'student')} | {_median(report, 'teacher')} |",
    ]
    alike = (
        f"Student against teacher: mean cosine {_likeness(report['cosine'])}; linear CKA {_likeness(report['cka'])};"
        f" the same nearest image for {percent(report['agreement'])} of the images."
    )
    shown = latency["image"]
    timed = (
        f"Latency: {latency['runtime']}, {latency['threads']} thread, batch 1, image of {shown['width']} x"
        f" {shown['height']} pixels, both timed in turn on the machine that made this bundle."
    )
    return "\n".join([report["evaluation"]["explanation"], "", *rows, "", alike, "", timed, ""])


def _limits() -> str:
    return (
        "- It learned to give the teacher's features for the images above: for images of another kind, or taken"
        " otherwise (light, angle, camera), it may be less like the teacher.\n"
        "- An image is squeezed to a square, whatever its shape.\n"
        "- What the teacher confuses, it confuses, too, and it has the teacher's biases. Test it on your own images"
        " before decisions about people rest on it.\n"
    )


def _likeness(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.3f} (95 % interval {found['low']:.3f} to {found['high']:.3f})"


def _median(report: Report, name: str) -> str:
    return f"{report['latency'][name]['median_ms']:.2f} ms"
