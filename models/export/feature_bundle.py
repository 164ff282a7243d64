"""BUNDLE of a feature extractor: the files of `bundle`, for a graph that gives features."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from models import teachers
from models.export import bundle, feature_card, feature_graph, onnx_graph
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
    card = feature_card.render(report, spec, preprocess, metadata.version("onnxruntime"))
    golden = bundle.read(exported / "golden.json")
    bundle.write(context, [onnx_graph.FILE_NAME], golden, preprocess, card, "feature_template.py")


def preprocessing(student: Mapping[str, Any], export: Mapping[str, Any]) -> dict[str, Any]:
    """As of a classifier, without its softmax."""
    before = bundle.preprocessing(student, export)
    return {
        **before,
        "inside_the_graph": [step for step in before["inside_the_graph"] if step != "softmax"],
        "output": {"name": feature_graph.OUTPUT, "dtype": "float32", "shape": ["batch", export["width"]]},
    }
