"""What every teacher network can do: turn images into features, normalising them for itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.arrays import Features, Images
from models.data import images as image_tensors
from models.runtime import autocast


@dataclass(frozen=True)
class Teacher:
    """A frozen network. `network` maps normalised images [N, 3, S, S] to pooled features [N, D].

    `architecture`, a JSON document, is what `build` of `timm_network` or `transformers_network` (its "library") makes
    the network from again, without weights; "own_size" is the side of the images it was trained on, None if not known.
    An EfficientNet-Lite has none.
    """

    network: nn.Module
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    embedding_dim: int
    architecture: Mapping[str, Any] | None = None

    @torch.inference_mode()
    def embed(self, images: Images) -> Features:
        """Features float32 [N, D] of images [N, 3, H, W] in 0..1, squeezed to the teacher's size first."""
        device = next(self.network.parameters()).device
        resized = image_tensors.resize(images.to(device), self.input_size)
        ready = image_tensors.normalise(resized, self.mean, self.std).contiguous(
            memory_format=torch.channels_last
        )
        with autocast(device):
            features: Features = self.network(ready)
        return features.float()


def frozen(network: nn.Module, device: str) -> nn.Module:
    """The network on its device, in evaluation mode, in the memory layout that convolutions like."""
    return network.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
