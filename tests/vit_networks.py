"""One small random network of each family of vision transformers that can be shortened."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import transformers
from torch import nn

from models.students import vit_families
from models.teachers.transformers_network import PooledBackbone

DEPTH, SIDE = 4, 32


def of_timm(name: str, **arguments: Any) -> nn.Module:
    """Features [N, 24] of images of 32 pixels, patches of 8."""
    sizes = {
        "img_size": SIDE,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": DEPTH,
        "num_heads": 2,
        "num_classes": 0,
    }
    return timm.create_model(name, **{**sizes, **arguments})


def of_transformers(name: str, **arguments: Any) -> nn.Module:
    """The same."""
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": SIDE,
        "patch_size": 8,
    }
    config = getattr(transformers, f"{name}Config")(**{**sizes, **arguments})
    return PooledBackbone(getattr(transformers, f"{name}Model")(config))


#: Networks by name, each with the number of its tokens before the patches.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm ViT": (partial(of_timm, "vit_tiny_patch16_224"), 1),
    "timm DeiT, distilled": (partial(of_timm, "deit_tiny_distilled_patch16_224"), 2),
    "timm DINOv2, registers": (partial(of_timm, "vit_small_patch14_reg4_dinov2"), 5),
    "timm CLIP": (partial(of_timm, "vit_base_patch32_clip_224"), 1),
    "timm SigLIP": (partial(of_timm, "vit_base_patch16_siglip_224"), 0),
    "timm EVA": (partial(of_timm, "eva_giant_patch14_224"), 1),
    "timm EVA-02": (partial(of_timm, "eva02_tiny_patch14_224", num_heads=2, embed_dim=32), 1),
    "timm DINOv3": (partial(of_timm, "vit_small_patch16_dinov3", embed_dim=32), 5),
    "timm BEiT": (partial(of_timm, "beit_base_patch16_224"), 1),
    "timm ViT, mixed rotary embedding": (partial(of_timm, "vit_small_patch16_rope_mixed_224"), 1),
    "transformers ViT": (partial(of_transformers, "ViT"), 1),
    "transformers DeiT": (partial(of_transformers, "DeiT"), 2),
    "transformers DINOv2": (partial(of_transformers, "Dinov2", mlp_ratio=2), 1),
    "transformers DINOv2, gated": (partial(of_transformers, "Dinov2", mlp_ratio=2, use_swiglu_ffn=True), 1),
    "transformers DINOv2, registers": (
        partial(of_transformers, "Dinov2WithRegisters", mlp_ratio=2, num_register_tokens=3),
        4,
    ),
    "transformers DINOv3": (partial(of_transformers, "DINOv3ViT", hidden_size=32, num_register_tokens=2), 3),
    "transformers CLIP": (partial(of_transformers, "CLIPVision"), 1),
    "transformers SigLIP": (partial(of_transformers, "SiglipVision"), 0),
}


def a_network(name: str) -> nn.Module:
    """With blocks that really change the tokens: initial weights and layer scales are so small that they hardly do."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]().eval().requires_grad_(False)
    for block in vit_families.blocks_of(network):
        for path, value in block.named_parameters():
            if value.dim() == 2:
                value.mul_(4)
            elif "gamma" in path or "lambda" in path:
                value.fill_(0.5)
    return network
