"""The model card of a student that gives class maps; its sections are those of `model_card`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.export import model_card
from models.export.model_card import plain, size, times
from models.teachers import AnyTeacher

Report = Mapping[str, Any]


def render(report: Report, teacher: AnyTeacher, normalisation: Mapping[str, Any], onnxruntime: str) -> str:
    """Markdown. `onnxruntime` is the version that the student was checked with."""
    sections = (
        f"# {report['student']['name']}: a class map of {len(report['classes'])} classes\n",
        _summary(report, teacher),
        "## How to run it\n",
        _usage(normalisation, onnxruntime),
        "## How good it is\n",
        _quality(report),
        _per_class(report),
        "## What it learned from\n",
        model_card.data(report, teacher),
        "## Licences\n",
        model_card.licences(report, teacher),
        "## Limits\n",
        _limits(report),
    )
    return "\n".join(sections)


def _summary(report: Report, teacher: AnyTeacher) -> str:
    student, smaller = report["student"], report["compression"]
    fewer = times(smaller["parameters"], "fewer", "more")
    lines = (
        f"- {student['parameters']:,} parameters, {fewer} than the teacher; {size(student['bytes'])}",
        f"- mean intersection over union {_percent(student['miou'])}",
        f"- one image in {_median(report, 'student')}, the teacher in {_median(report, 'teacher')}",
        f"- classes: {', '.join(plain(name) for name in report['classes'])}",
    )
    return (
        f"A small vision transformer that says of each pixel what it shows, made of **{plain(teacher.title)}** with a"
        " few images and masks.\n\n" + "\n".join(lines) + "\n"
    )


def _usage(normalisation: Mapping[str, Any], onnxruntime: str) -> str:
    side = normalisation["resize"]["size"]
    return (
        "    pip install onnxruntime pillow\n"
        "    python predict.py --check\n"
        "    python predict.py photo.jpg\n\n"
        "Input `image`: uint8 [batch, height, width, 3], upright RGB, any size, any batch. Output `classes`: uint8"
        " [batch, height, width], the class of each pixel; `labels.json` names the classes in order. Output `logits`:"
        " float [batch, classes, height, width].\n"
        f"Resizing to {side} x {side}, normalisation and resizing back happen inside the graph: do none yourself.\n"
        f"Standard ONNX operators of opset {normalisation['opset']} only; checked with ONNX Runtime"
        f" {onnxruntime}. `sha256sum -c SHA256SUMS` checks the files.\n"
    )


def _quality(report: Report) -> str:
    student, teacher, latency = report["student"], report["teacher"], report["latency"]
    rows = [
        "| | student | teacher |",
        "|---|---|---|",
        f"| mean intersection over union | {_percent(student['miou'])} | {_percent(teacher['miou'])} |",
        f"| pixel accuracy | {_percent(student['pixel_accuracy'])} | {_percent(teacher['pixel_accuracy'])} |",
        f"| parameters | {student['parameters']:,} | {teacher['parameters']:,} |",
        f"| ONNX file | {size(student['bytes'])} | {size(teacher['bytes'])} |",
        f"| latency, median | {_median(report, 'student')} | {_median(report, 'teacher')} |",
    ]
    paired = report["student_against_teacher"]
    against = f"The student's mean minus the teacher's: {100 * paired['miou_difference']:+.1f} points"
    if paired["low"] is not None:
        against += f" (95 % interval {100 * paired['low']:+.1f} to {100 * paired['high']:+.1f})"
    shown = latency["image"]
    timed = (
        f"Latency: {latency['runtime']}, {latency['threads']} thread, batch 1, image of {shown['width']} x"
        f" {shown['height']} pixels, both timed in turn on the machine that made this bundle."
    )
    text = (report["evaluation"]["explanation"], "", *rows, "")
    return "\n".join((*text, f"{against}. The teacher has a layer of the same kind.", "", timed, ""))


def _per_class(report: Report) -> str:
    rows = [
        f"| {plain(row['label'])} | {row['images']} | {_share(row['iou'])} | {_share(row['teacher_iou'])} |"
        for row in report["per_class"]
    ]
    head = ["| class | images that show it | intersection over union | the teacher's |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _limits(report: Report) -> str:
    few = min(report["data"]["shots"].values())
    return (
        f"- It knows {len(report['classes'])} classes and gives one of them to every pixel, also to what is none of"
        " them.\n"
        f"- It learned a class from as few as {few} images: images taken otherwise (light, angle, camera) may do worse"
        " than the figures above.\n"
        "- It decides patch by patch and interpolates between them: edges are soft, and what is smaller than a patch is"
        " easily missed.\n"
        "- An image is squeezed to a square, whatever its shape.\n"
        "- Its errors follow the teacher's, and so do its biases. Test it on your own images before decisions"
        " about people rest on it.\n"
    )


def _percent(share: Mapping[str, Any]) -> str:
    return f"{100 * share['value']:.1f} %" if share["low"] is None else model_card.percent(share)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _median(report: Report, name: str) -> str:
    return f"{report['latency'][name]['median_ms']:.2f} ms"
