"""Graphs that give class maps answer as the network does, for images of any size."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from models.errors import ExportError
from models.export import onnx_graph, parity, segmentation_graph
from models.export.samples import Sample
from models.export.segmentation_graph import Reference
from models.runtime import generator
from models.students.dense_vit import DenseHead, DenseNetwork
from tests.vit_networks import SIDE, a_network

MEAN, STD = (0.4, 0.45, 0.5), (0.25, 0.3, 0.2)
RANDOM = np.random.default_rng(0)
SAMPLES = [
    Sample(f"{height} x {width}", None, RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for height, width in ((32, 32), (48, 40), (21, 3))
]


def a_student(name: str) -> DenseNetwork:
    network = a_network(name)
    random = generator(1)
    width = int(network.num_features) if hasattr(network, "num_features") else 24  # type: ignore[arg-type]
    head = DenseHead(torch.zeros(width), torch.randn(width, 4, generator=random), torch.zeros(4))
    return DenseNetwork(network, head).eval()


@pytest.mark.parametrize("name", ["timm DINOv2, registers", "timm SigLIP", "transformers ViT"])
def test_the_graph_of_a_family_gives_the_networks_class_map(name: str) -> None:
    student = a_student(name)
    content = segmentation_graph.build(student, SIDE, MEAN, STD, {"task": "segmentation"})
    found = parity.check(
        content, Reference(student, SIDE, MEAN, STD), SAMPLES, segmentation_graph.probabilities
    )
    assert found.largest_difference < 1e-4
    runtime = parity.session(content)
    for sample in SAMPLES:
        classes = segmentation_graph.class_map(runtime, sample.pixels)
        assert (classes.dtype, classes.shape) == (np.uint8, sample.pixels.shape[:2])
    assert len(np.unique(segmentation_graph.class_map(runtime, SAMPLES[0].pixels))) > 1


@pytest.fixture(scope="module")
def student() -> DenseNetwork:
    return a_student("timm ViT")


@pytest.fixture(scope="module")
def content(student: DenseNetwork) -> bytes:
    return segmentation_graph.build(student, SIDE, MEAN, STD, {})


def test_another_normalisation_is_seen(student: DenseNetwork, content: bytes) -> None:
    other = Reference(student, SIDE, MEAN, (0.25, 0.3, 0.25))
    with pytest.raises(ExportError, match="differ"):
        parity.check(content, other, SAMPLES, segmentation_graph.probabilities)


def test_a_class_map_of_other_classes_is_seen(student: DenseNetwork, content: bytes) -> None:
    graph = onnx.load_from_string(content)
    for node in graph.graph.node:
        if node.op_type == "ArgMax":
            node.op_type = "ArgMin"
    with pytest.raises(ExportError, match="does not name the classes with the highest logits"):
        parity.check(
            graph.SerializeToString(),
            Reference(student, SIDE, MEAN, STD),
            SAMPLES,
            segmentation_graph.probabilities,
        )


def test_equal_students_give_equal_bytes(student: DenseNetwork, content: bytes) -> None:
    again = segmentation_graph.build(student, SIDE, MEAN, STD, {})
    assert again == content
    assert onnx.load_from_string(content).opset_import[0].version == onnx_graph.OPSET
