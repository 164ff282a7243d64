"""BUNDLE of a feature extractor: the files of `bundle`, for a graph that gives features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.export import bundle, feature_card, feature_graph
from models.pipeline import StageContext


def run(context: StageContext) -> None:
    """Write the bundle's files to the artefact's folder and, packed, to `bundle.zip`."""
    bundle.write(context, preprocessing, feature_card.render, "feature_template.py")


def preprocessing(student: Mapping[str, Any], export: Mapping[str, Any]) -> dict[str, Any]:
    """As of a classifier, without its softmax."""
    before = bundle.preprocessing(student, export)
    return {
        **before,
        "inside_the_graph": [step for step in before["inside_the_graph"] if step != "softmax"],
        "output": {"name": feature_graph.OUTPUT, "dtype": "float32", "shape": ["batch", export["width"]]},
    }
