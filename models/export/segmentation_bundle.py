"""BUNDLE of segmentation: the files of `bundle`, for a graph that gives class maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.export import bundle, segmentation_card, segmentation_graph
from models.pipeline import StageContext


def run(context: StageContext) -> None:
    """Write the bundle's files to the artefact's folder and, packed, to `bundle.zip`."""
    bundle.write(context, preprocessing, segmentation_card.render, "segment_template.py")


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
