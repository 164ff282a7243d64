"""The embedded ViT, untrained: its sizes, its first weights, and the tokens that it makes of images.

The network is timm's own `VisionTransformer`: the result is a folder that timm loads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor

from models.data.augment import Augmentation
from models.runtime import seed_weights

#: Sides in pixels of its images and of a patch, and in patches of an image.
SIZE, PATCH = 32, 4
GRID = SIZE // PATCH
ARCHITECTURE = "vit_tiny_patch16_224"  # timm's name; `model_args` says what differs


@dataclass(frozen=True)
class Budget:
    """Sizes of the network and the length and strength of its training."""

    width: int
    depth: int
    heads: int
    teacher: str  # a teacher of the catalogue, of kind efficientnet_lite
    steps: int
    batch_size: int
    lr: float = 1e-3
    weight_decay: float = 0.05
    ema_decay: float = 0.998
    map_channels: int = 64  # principal components of the teacher's feature maps
    kept: float = 0.5  # share of patches that is shown at first (PatchDropout: Liu et al., arXiv:2208.07220)
    whole_from: float = 0.7  # share of the steps after which all are shown
    augmentation: Augmentation = field(default_factory=Augmentation)
    cutmix: float = 0.0  # share of batches


def model_args(budget: Budget) -> dict[str, Any]:
    """How the network differs from timm's `ARCHITECTURE`."""
    return {
        "img_size": SIZE,
        "patch_size": PATCH,
        "embed_dim": budget.width,
        "depth": budget.depth,
        "num_heads": budget.heads,
    }


def build(budget: Budget, classes: int, seed: int) -> Any:
    """A new network with a head for `classes`, its weights drawn from `seed`."""
    seed_weights(seed, "weights", "vit")
    network = timm.create_model(ARCHITECTURE, num_classes=classes, **model_args(budget))
    with torch.no_grad():
        network.pos_embed[0, 1:] = positions(budget.width)
        for block in network.blocks:
            start_attention(block.attn)
    return network


def tokens(network: Any, images: Tensor, kept: Tensor | None = None) -> Tensor:
    """The class token and patch tokens [N, 1 + k, D] after the last norm, of normalised images [N, 3, 32, 32].

    `kept` int64 [N, k] chooses patches of each image; None: all.
    """
    embedded = network._pos_embed(network.patch_embed(images))
    if kept is not None:
        patches = embedded[:, 1:].gather(1, kept[..., None].expand(-1, -1, embedded.shape[2]))
        embedded = torch.cat([embedded[:, :1], patches], 1)
    final: Tensor = network.norm(network.blocks(embedded))
    return final


def start_attention(attention: Any) -> None:
    """Mimetic first weights of an attention layer: tokens look at those like them, and subtract what they see.

    W_q W_k^T = 0.7 Z + 0.7 I for each head, to its rank, and W_v W_proj = 0.4 Z - 0.4 I, Z normal with variance 1 / D
    (Trockman & Kolter, arXiv:2305.09828, section 3). With sinusoidal positions, like tokens are near ones.
    """
    width, heads = attention.proj.in_features, attention.num_heads
    rank = width // heads
    queries, keys, values = attention.qkv.weight.view(3, width, width)
    for head in range(heads):
        rows = slice(head * rank, (head + 1) * rank)
        left, right = _factors(0.7, 0.7, width)
        queries[rows], keys[rows] = left[:, :rank].T, right[:rank]
    left, right = _factors(0.4, -0.4, width)
    values.copy_(left.T)
    attention.proj.weight.copy_(right.T)


def _factors(noise: float, identity: float, width: int) -> tuple[Tensor, Tensor]:
    """L and R [D, D], of falling importance, whose product is noise * Z + identity * I."""
    u, s, v = torch.linalg.svd(
        noise * torch.randn(width, width) / math.sqrt(width) + identity * torch.eye(width)
    )
    return u * s.sqrt(), s.sqrt()[:, None] * v


def positions(width: int) -> Tensor:
    """Sines and cosines [64, D] of the row and the column (Vaswani et al., arXiv:1706.03762, section 3.5)."""
    rates = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * rates
    along = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = along.repeat_interleave(GRID, 0), along.repeat(GRID, 1)
    return torch.cat([rows, columns], 1)
