"""Shortened vision transformers of several families as ONNX graphs that give features."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from models.errors import ExportError
from models.export import feature_graph, parity
from models.export.feature_graph import Reference, Scaled
from models.export.samples import Sample
from models.runtime import generator
from models.students import shortened_vit
from models.training import low_rank
from tests.vit_networks import SIDE, a_network, of_transformers

MEAN, STD = (0.4, 0.45, 0.5), (0.25, 0.3, 0.2)
RANDOM = np.random.default_rng(0)
SAMPLES = [
    Sample(f"{height} x {width}", None, RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for height, width in ((32, 32), (48, 40), (20, 31))
]
#: The graphs of the other families are built of the same parts.
FAMILIES = (
    "timm DeiT, distilled",
    "timm DINOv2, registers",
    "timm CLIP",
    "timm SigLIP",
    "timm EVA-02",
    "transformers ViT",
    "transformers DINOv3",
    "transformers CLIP",
    "transformers SigLIP",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_graph_of_a_family_gives_the_networks_features(name: str) -> None:
    """Of two of four blocks, after low-rank updates that changed them and were folded."""
    student = copy.deepcopy(shortened_vit.shorten(a_network(name), (1, 3)))
    low_rank.attach(student, "enhanced_lora", 2, generator(1))
    for module in student.modules():
        if isinstance(module, low_rank.LowRankUpdate):
            for matrix in module.b.values():
                torch.nn.init.normal_(matrix, std=0.1)
    low_rank.fold(student)
    student.requires_grad_(False)
    content = feature_graph.build(student, SIDE, MEAN, STD, {})
    reference = Reference(student, SIDE, MEAN, STD)
    scaled = Scaled.on(reference, SAMPLES[0])
    assert parity.check(content, scaled, SAMPLES, scaled.of_graph).largest_difference < 1e-4
    (features,) = reference.features(SAMPLES[0].pixels[None])
    assert features.std() > 0.05 * features.abs().mean()  # no constant, which any graph gives


def test_a_dinov2_of_another_size_than_its_own_is_written_with_its_interpolated_positions() -> None:
    """As every DINOv2 of the catalogue is: of 518 pixels, run at 224."""
    torch.manual_seed(0)
    own, size = 70, 42
    network = of_transformers("Dinov2", mlp_ratio=2, image_size=own, patch_size=14)
    network.eval().requires_grad_(False)
    positions = network.backbone.embeddings.position_embeddings
    torch.nn.init.normal_(positions)  # as large as the patches' tokens
    student = copy.deepcopy(shortened_vit.shorten(network, (1, 3)))
    content = feature_graph.build(student, size, MEAN, STD, {})
    scaled = Scaled.on(Reference(student, size, MEAN, STD), SAMPLES[0])
    assert parity.check(content, scaled, SAMPLES, scaled.of_graph).largest_difference < 1e-4
    student.backbone.embeddings.position_embeddings[:, 1:] = positions[:, 1:].flip(1)
    with pytest.raises(ExportError, match="differ"):
        parity.check(content, scaled, SAMPLES, scaled.of_graph)


def test_another_normalisation_is_seen() -> None:
    student = copy.deepcopy(shortened_vit.shorten(a_network("timm ViT"), (1, 3)))
    content = feature_graph.build(student, SIDE, MEAN, STD, {})
    scaled = Scaled.on(Reference(student, SIDE, MEAN, (0.25, 0.3, 0.21)), SAMPLES[0])
    with pytest.raises(ExportError, match="differ"):
        parity.check(content, scaled, SAMPLES, scaled.of_graph)
