"""Small students that timm builds, with random weights."""

from __future__ import annotations

import timm
from torch import nn


def build(architecture: str, classes: int) -> nn.Module:
    """[N, 3, S, S] normalised -> logits [N, classes]; any S of at least 32."""
    network: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=classes)
    return network
