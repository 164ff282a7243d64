"""BUNDLE of segmentation: the files of `bundle`, for a graph that gives class maps."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from models import teachers
from models.export import bundle, onnx_graph, segmentation_card, segmentation_graph
from models.pipeline import StageContext


def run(context: StageContext) -> None:
    """Write the bundle's files to the artefact's folder and, packed, to `bundle.zip`."""
    exported = context.folder("student_onnx")
    preprocess = preprocessing(
        bundle.read(context.folder("trained_student") / "student.json"),
        bundle.read(exported / onnx_graph.EXPORT_FILE_NAME),
    )
    report = bundle.read(context.folder("report") / "report.json")
    spec = teachers.read_any(context.folder("teacher"))
    card = segmentation_card.render(report, spec, preprocess, metadata.version("onnxruntime"))
    golden = bundle.read(exported / "golden.json")
    bundle.write(context, [onnx_graph.FILE_NAME], golden, preprocess, card, "segment_template.py")


def preprocessing(student: Mapping[str, Any], export: Mapping[str, Any]) -> dict[str, Any]:
    """As of a classifier, and what is done to its logits."""
    before = bundle.preprocessing(student, export)
    del before["output"]
    steps = [step for step in before["inside_the_graph"] if step != "softmax"]
    batch, pixels = "batch", ["height", "width"]
    return {
        **before,
        "inside_the_graph": [*steps, "resize to the image's size", "argmax"],
        "outputs": [
            {
                "name": segmentation_graph.LOGITS,
                "dtype": "float32",
                "shape": [batch, len(student["classes"]), *pixels],
            },
            {"name": segmentation_graph.CLASSES, "dtype": "uint8", "shape": [batch, *pixels]},
        ],
    }
