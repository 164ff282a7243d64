"""The student's model card, for people who get the bundle and know nothing of the job.

The sections follow Mitchell et al., "Model Cards for Model Reporting", arXiv:1810.03993, section 4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from models.teachers import TeacherSpec

Report = Mapping[str, Any]


def render(report: Report, teacher: TeacherSpec, normalisation: Mapping[str, Any], onnxruntime: str) -> str:
    """Markdown. `onnxruntime` is the version that the student was checked with."""
    student = report["student"]
    sections = (
        f"# {student['name']}: {len(report['classes'])} classes\n",
        _summary(report, teacher),
        "## How to run it\n",
        _usage(normalisation, onnxruntime),
        "## How good it is\n",
        _quality(report),
        "## What it learned from\n",
        _data(report, teacher),
        "## Licences\n",
        _licences(teacher),
        "## Limits\n",
        _limits(report),
    )
    return "\n".join(sections)


def percent(accuracy: Mapping[str, Any]) -> str:
    """`63.0 % (95 % interval 59.9 to 66.0 %)`."""
    value, low, high = (100 * accuracy[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % ({accuracy['confidence']:.0%} interval {low:.1f} to {high:.1f} %)".replace(
        "95%", "95 %"
    )


def size(count: int) -> str:
    """Bytes for people: `450 kB`, `1.2 MB`."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def times(ratio: float, less: str, more: str) -> str:
    """A ratio for people: `29 times smaller`, `1.4 times larger`."""
    factor, word = (ratio, less) if ratio >= 1 else (1 / ratio, more)
    return f"{factor:.0f} times {word}" if factor >= 10 else f"{factor:.1f} times {word}"


def plain(name: str) -> str:
    """A name that users chose, as text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", name)


def _summary(report: Report, teacher: TeacherSpec) -> str:
    student, compression = report["student"], report["compression"]
    return (
        f"A small image classifier distilled from **{teacher.title}** with a few labelled images.\n\n"
        f"- {student['parameters']:,} parameters, {times(compression['parameters'], 'fewer', 'more')} than the"
        f" teacher; {size(student['bytes'])}, {times(compression['bytes'], 'smaller', 'larger')}\n"
        f"- accuracy {percent(student['accuracy'])}\n"
        f"- one image in {report['latency']['student']['median_ms']:.2f} ms, the teacher in"
        f" {report['latency']['teacher']['median_ms']:.2f} ms\n"
        f"- classes: {', '.join(plain(name) for name in report['classes'])}\n"
    )


def _usage(normalisation: Mapping[str, Any], onnxruntime: str) -> str:
    side = normalisation["resize"]["size"]
    return (
        "    pip install onnxruntime pillow\n"
        "    python predict.py --check\n"
        "    python predict.py photo.jpg\n\n"
        "Input `image`: uint8 [batch, height, width, 3], upright RGB, any size, any batch. Output `probabilities`:"
        " float [batch, classes]; `labels.json` names the classes in order.\n"
        f"Resizing to {side} x {side} and normalisation happen inside the graph: do neither yourself.\n"
        f"Standard ONNX operators of opset {normalisation['opset']} only; checked with ONNX Runtime"
        f" {onnxruntime}. `sha256sum -c SHA256SUMS` checks the files.\n"
    )


def _quality(report: Report) -> str:
    student, teacher, latency = report["student"], report["teacher"], report["latency"]
    agreement, paired, int8 = report["agreement"], report["student_against_teacher"], report["int8"]
    rows = [
        "| | student | teacher |",
        "|---|---|---|",
        f"| accuracy | {percent(student['accuracy'])} | {percent(teacher['accuracy'])} |",
        f"| parameters | {student['parameters']:,} | {teacher['parameters']:,} |",
        f"| ONNX file | {size(student['bytes'])} | {size(teacher['bytes'])} |",
        f"| latency, median | {latency['student']['median_ms']:.2f} ms | {latency['teacher']['median_ms']:.2f} ms |",
        f"| latency, 95th percentile | {latency['student']['p95_ms']:.2f} ms"
        f" | {latency['teacher']['p95_ms']:.2f} ms |",
    ]
    low, high = 100 * paired["low"], 100 * paired["high"]
    text = [
        report["evaluation"]["explanation"],
        "",
        *rows,
        "",
        f"Student and teacher give the same answer to {100 * agreement['value']:.1f} % of the images. The"
        f" student's accuracy minus the teacher's: {100 * paired['difference']:+.1f} points (95 % interval {low:+.1f}"
        f" to {high:+.1f};"
        f" exact McNemar p = {paired['p_value']:.2g}).",
        "",
        f"Latency: {latency['runtime']}, {latency['threads']} thread, batch 1, image of {latency['image']['width']} x"
        f" {latency['image']['height']} pixels, both timed in turn on the machine that made this bundle.",
        "",
    ]
    if int8["asked"]:
        verdict = "included" if int8["accepted"] else "not included"
        text += [f"`model.int8.onnx` is {verdict}: {int8['reason']}.", ""]
    text += [
        "| class | images | found | answers naming it that are right |",
        "|---|---|---|---|",
        *(
            f"| {plain(row['label'])} | {row['images']} | {_share(row['recall'])} | {_share(row['precision'])} |"
            for row in report["per_class"]
        ),
        "",
    ]
    return "\n".join(text)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}".replace("%", " %")


def _data(report: Report, teacher: TeacherSpec) -> str:
    data = report["data"]
    shots = sorted(set(data["shots"].values()))
    each = f"{shots[0]}" if len(shots) == 1 else f"{shots[0]} to {shots[-1]}"
    return (
        f"{data['support']} labelled images ({each} a class) and {data['unlabelled']} unlabelled ones, all given by"
        f" the bundle's owner; {data['test']} test images were kept apart. Besides, it learned from the answers of"
        f" {teacher.title}, which saw data of its own before.\n\n"
        "`golden/` holds some of the labelled images, shrunk: whoever gets this bundle gets those images.\n"
    )


def _licences(teacher: TeacherSpec) -> str:
    return (
        f"The teacher's weights ({teacher.source}): {teacher.licence}, {teacher.licence_url}. The student was"
        " distilled from them; whether their licence binds what you do with it is for you to judge. The labelled"
        " images remain under whatever terms their owner has. `predict.py` may be used freely.\n"
    )


def _limits(report: Report) -> str:
    shots = min(report["data"]["shots"].values())
    return (
        f"- It knows {len(report['classes'])} classes and gives one of them to every image, also to one that shows"
        " none of them.\n"
        f"- It learned from as few as {shots} labelled images of a class: images taken otherwise (light, angle,"
        " camera) may do worse than the figures above.\n"
        "- Its scores sum to 1 but are not calibrated: 0.9 does not mean right nine times in ten.\n"
        "- An image is squeezed to a square, whatever its shape.\n"
        "- Its errors follow the teacher's, and so do its biases. Test it on your own images before decisions"
        " about people rest on it.\n"
    )
