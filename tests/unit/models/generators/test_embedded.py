"""The weights that come with Dram: that they are there, whole, small, and draw what a prompt names."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models import generators
from models.generators.diffusion import Diffusion
from models.zoo import architecture, release

SPEC = generators.GENERATORS[generators.DEFAULT]
LARGEST = 40e6  # bytes


@pytest.fixture(scope="module")
def embedded() -> Diffusion:
    return generators.load(SPEC)


def test_its_specification_is_true(embedded: Diffusion) -> None:
    parts = embedded.vae, embedded.unet, embedded.text_encoder
    assert architecture.parameters(*parts) == SPEC.parameters
    assert embedded.resolution == SPEC.resolution
    assert generators.availability(SPEC).available


def test_its_weights_are_half_precision_and_small() -> None:
    assert SPEC.folder is not None
    files = sorted(SPEC.folder.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118
    assert sum(file.stat().st_size for file in SPEC.folder.rglob("*") if file.is_file()) < LARGEST


def test_a_prompt_decides_what_is_drawn(embedded: Diffusion) -> None:
    """Ships lie on water, frogs on leaves and earth."""

    def blueness(name: str) -> Tensor:
        pixels = release.sample(embedded, f"a photo of a {name}", 6, seed=0).float()
        return pixels[:, 2].mean() - pixels[:, 0].mean()

    assert blueness("ship") > blueness("frog") + 30
