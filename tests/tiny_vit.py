"""Vision transformers with few random weights, as checkpoint folders and as teachers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from models.teachers import TeacherSpec

DEPTH, WIDTH, SIDE, PATCH = 6, 48, 32, 8
MEAN, STD = (0.4, 0.45, 0.5), (0.25, 0.3, 0.2)
ARGUMENTS = {
    "depth": DEPTH,
    "img_size": SIDE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "num_heads": 3,
    "mlp_ratio": 2,
}


def write(folder: Path, depth: int = DEPTH, **changes: Any) -> TeacherSpec:
    """A checkpoint as timm writes it; returns the teacher that it is. Its blocks really change the tokens.

    `changes`: of `ARGUMENTS`.
    """
    torch.manual_seed(0)
    arguments = {**ARGUMENTS, "depth": depth, **changes}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments)
    for name, value in network.named_parameters():
        if name.startswith("blocks") and value.dim() == 2:
            value.data.mul_(4)  # initial weights are so small that a block hardly does anything
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {"mean": list(MEAN), "std": list(STD)}
    document = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(document))
    return TeacherSpec(
        name="tiny_vit",
        title="Tiny ViT, random weights",
        kind="timm",
        source=str(folder.absolute()),
        input_size=SIDE,
        parameters=sum(value.numel() for value in network.parameters()),
        embedding_dim=WIDTH,
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
    )
