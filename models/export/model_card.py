"""The student's model card, for people who get the bundle and know nothing of the job.

The sections follow Mitchell et al., "Model Cards for Model Reporting", arXiv:1810.03993, section 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models.teachers import AnyTeacher, TeacherSpec
from models.teachers.black_box import HttpTeacher

Report = Mapping[str, Any]

#: Classes that the card names one by one; `labels.json` has all.
_NAMED_CLASSES = 100


def render(report: Report, teacher: AnyTeacher, normalisation: Mapping[str, Any], onnxruntime: str) -> str:
    """Markdown. `onnxruntime` is the version that the student was checked with."""
    student = report["student"]
    sections = (
        f"# {student['name']}: {len(report['classes'])} classes\n",
        _summary(report, teacher),
        "## How to run it\n",
        _usage(normalisation, onnxruntime),
        "## How good it is\n",
        _quality(report),
        _per_class(report),
        "## What it learned from\n",
        data(report, teacher),
        "## Licences\n",
        licences(report, teacher),
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
    """A name that users chose, as one line of text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(name.split()))


def _summary(report: Report, teacher: AnyTeacher) -> str:
    student = report["student"]
    images = "a few labelled images" if report["data"]["support"] else "images without labels"
    title = plain(teacher.title)
    learned = f"{title}**, a black box," if report["teacher"]["black_box"] else f"{title}**"
    lines = [
        f"- {student['parameters']:,} parameters{_ratio(report, 'parameters', 'fewer', 'more', ' than the teacher')};"
        f" {size(student['bytes'])}{_ratio(report, 'bytes', 'smaller', 'larger')}",
        _headline(report),
        f"- one image in {_median(report['latency']['student'])}{_pace(report)}",
        f"- classes: {_class_names(report['classes'])}",
    ]
    return f"A small image classifier distilled from **{learned} with {images}.\n\n" + "\n".join(lines) + "\n"


def _headline(report: Report) -> str:
    """The accuracy, or what is known instead."""
    accuracy, agreement = report["student"]["accuracy"], report["agreement"]
    if accuracy is not None:
        return f"- accuracy {percent(accuracy)}"
    return (
        f"- accuracy not known, for lack of labels; it gives the teacher's answer to {_agreed(agreement)} of"
        f" {agreement['images']} images that it did not learn from"
    )


def _agreed(agreement: Mapping[str, Any]) -> str:
    low, high = 100 * agreement["low"], 100 * agreement["high"]
    return f"{100 * agreement['value']:.1f} % (95 % interval {low:.1f} to {high:.1f} %)"


def _ratio(report: Report, what: str, less: str, more: str, than: str = "") -> str:
    """`, 29 times smaller than the teacher`; empty where the teacher's size is not known."""
    ratio = report["compression"][what]
    return "" if ratio is None else f", {times(ratio, less, more)}{than}"


def _pace(report: Report) -> str:
    """`, the teacher in 27.1 ms`, and what there is to say of it."""
    timed, note = report["latency"]["teacher"], report["latency"]["teacher_note"]
    return (f", the teacher in {_median(timed)}" if timed else "") + (f"; {note}" if note else "")


def _class_names(classes: Sequence[str]) -> str:
    named = ", ".join(plain(name) for name in classes[:_NAMED_CLASSES])
    more = len(classes) - _NAMED_CLASSES
    return f"{named} and {more:,} more, see `labels.json`" if more > 0 else named


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
    paired, int8 = report["student_against_teacher"], report["int8"]
    ours, theirs = latency["student"], latency["teacher"]
    parameters, file_size = teacher["parameters"], teacher["bytes"]
    rows = [
        "| | student | teacher |",
        "|---|---|---|",
        f"| accuracy | {_known(student['accuracy'], percent)} | {_known(teacher['accuracy'], percent)} |",
        f"| parameters | {student['parameters']:,} | {_known(parameters, '{:,}'.format)} |",
        f"| ONNX file | {size(student['bytes'])} | {_known(file_size, size)} |",
        f"| latency, median | {ours['median_ms']:.2f} ms | {_known(theirs, _median)} |",
        f"| latency, 95th percentile | {ours['p95_ms']:.2f} ms | {_known(theirs, _slowest)} |",
    ]
    share = _agreed(report["agreement"])
    if report["evaluation"]["kind"] == "cross_validation":  # its folds depend on each other
        share = f"{100 * report['agreement']['value']:.1f} %"
    agreement = f"Student and teacher give the same answer to {share} of the images."
    if paired is not None:
        low, high = 100 * paired["low"], 100 * paired["high"]
        agreement += (
            f" The student's accuracy minus the teacher's: {100 * paired['difference']:+.1f} points (95 % interval"
            f" {low:+.1f} to {high:+.1f}; exact McNemar p = {paired['p_value']:.2g})."
        )
    where = "on the machine that made this bundle"
    timed = (
        f"Latency: {latency['runtime']}, {latency['threads']} thread, batch 1, image of {latency['image']['width']} x"
        f" {latency['image']['height']} pixels, "
        + (f"{where}; {note}." if (note := latency["teacher_note"]) else f"both timed in turn {where}.")
    )
    text = [report["evaluation"]["explanation"], "", *rows, "", agreement, "", timed, ""]
    if int8["asked"]:
        verdict = "included" if int8["accepted"] else "not included"
        text += [f"`model.int8.onnx` is {verdict}: {int8['reason']}.", ""]
    return "\n".join(text)


def _per_class(report: Report) -> str:
    """How the student does on each class, where labels tell."""
    rows = report["per_class"]
    if not rows:
        return "How good it is at each class is not known: too few of the images that it was judged on have labels.\n"
    judged = [row for row in rows if row["images"]]
    text = [
        "| class | images | found | answers naming it that are right |",
        "|---|---|---|---|",
        *(
            f"| {plain(row['label'])} | {row['images']} | {_share(row['recall'])} | {_share(row['precision'])} |"
            for row in judged
        ),
        "",
    ]
    if unseen := len(rows) - len(judged):
        text += [f"Of {unseen} more classes there was no image to judge by.", ""]
    return "\n".join(text)


def _known(value: Any, words: Callable[[Any], str]) -> str:
    return "not known" if value is None else words(value)


def _median(timed: Mapping[str, Any]) -> str:
    return f"{timed['median_ms']:.2f} ms"


def _slowest(timed: Mapping[str, Any]) -> str:
    return f"{timed['p95_ms']:.2f} ms"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}".replace("%", " %")


def data(report: Report, teacher: AnyTeacher) -> str:
    """What the student learnt from, and what of that is in the bundle."""
    counts = report["data"]
    shots = sorted(set(counts["shots"].values()))
    if shots:
        each = f"{shots[0]}" if len(shots) == 1 else f"{shots[0]} to {shots[-1]}"
        given = (
            f"{counts['support']} labelled images ({each} a class) and {counts['unlabelled']} unlabelled ones"
        )
    else:
        given = f"{counts['unlabelled']} images without labels"
    apart, learned = f"{counts['test']} test images were kept apart", "these"
    if report["evaluation"]["kind"] == "held_out":
        apart, learned = f"{report['evaluation']['images']} of them were held out", "the others"
    how = f"Besides, it learned from the answers of {plain(teacher.title)}, which saw data of its own before"
    shortened = report["student"].get("shortened")
    if shortened:
        how = _shortened(shortened, report["student"]["input_size"], teacher)
    if report["teacher"]["black_box"]:
        how = (
            f"It learned what {plain(teacher.title)} answers to {learned} and to any images that were made from them;"
            " that teacher saw data of its own before"
        )
    generator = report.get("generator")
    if generator:
        from_names = report["teacher"]["black_box"] or shortened
        origin = "the names of the classes" if from_names else "the labelled ones"
        if shortened and not shots:
            origin = "a neutral word"
        how += f"; and from {generator['kept']} images that {plain(generator['title'])}, a generator, made of {origin}"
    return (
        f"{given}, all given by the bundle's owner; {apart}. {how}.\n\n"
        f"`golden/` holds some of {'the labelled' if shots else 'these'} images, shrunk: whoever gets this bundle"
        " gets those images.\n"
    )


def _shortened(about: Mapping[str, Any], input_size: int, teacher: AnyTeacher) -> str:
    """What a student has of the vision transformer that it is made of."""
    kept = ", ".join(str(block + 1) for block in about["kept"])
    how = (
        f"Besides, it is made of {plain(teacher.title)}, which saw data of its own before: of its {about['depth']}"
        f" blocks it has {len(about['kept'])} ({kept})"
    )
    if about["adaptation"] != "none" or about["start"] == "refitted":
        how += "; it learned to give the tokens that the whole network gives to these images"
    if about["interpolated_from"]:
        how += (
            f"; the position embedding was interpolated from images of {about['interpolated_from']} pixels to"
            f" {input_size}"
        )
    return how


def licences(report: Report, teacher: AnyTeacher) -> str:
    """On what terms the teacher's weights, a generator's and the images stand."""
    images = "The labelled images" if report["data"]["support"] else "The images"
    rest = f" {images} remain under whatever terms their owner has. `predict.py` may be used freely.\n"
    generator = report.get("generator")
    if generator:
        rest = (
            f" The generator's weights ({generator['source']}): {generator['licence']}, {generator['licence_url']};"
            " the same holds for them, as the student learned from their images." + rest
        )
    if isinstance(teacher, TeacherSpec) and "shortened" in report["student"]:
        return (
            f"The teacher's weights ({teacher.source}): {teacher.licence}, {teacher.licence_url}. The student is made"
            " of these weights, changed: their licence holds for it." + rest
        )
    if isinstance(teacher, TeacherSpec):
        return (
            f"The teacher's weights ({teacher.source}): {teacher.licence}, {teacher.licence_url}. The student was"
            " distilled from them; whether their licence binds what you do with it is for you to judge."
            + rest
        )
    what = "an HTTP endpoint" if isinstance(teacher, HttpTeacher) else "an ONNX file"
    terms = ", ".join(plain(part) for part in (teacher.licence, teacher.licence_url) if part)
    return (
        f"The teacher is {what} of the bundle's owner. Its licence: {terms}. The student was distilled from its"
        " answers; under which terms those may be used so is for the owner to know, and to tell whoever gets this"
        " bundle." + rest
    )


def _limits(report: Report) -> str:
    shots = min(report["data"]["shots"].values(), default=0)
    if shots:
        few = f"It learned from as few as {shots} labelled images of a class: images taken otherwise"
    else:
        few = "It learned from images without labels: images taken otherwise than those"
    return (
        f"- It knows {len(report['classes'])} classes and gives one of them to every image, also to one that shows"
        " none of them.\n"
        f"- {few} (light, angle, camera) may do worse than the figures above.\n"
        "- Its scores sum to 1 but are not calibrated: 0.9 does not mean right nine times in ten.\n"
        "- An image is squeezed to a square, whatever its shape.\n"
        "- Its errors follow the teacher's, and so do its biases. Test it on your own images before decisions"
        " about people rest on it.\n"
    )
