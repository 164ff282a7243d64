"""A vision transformer that says of each patch which class it shows: a linear layer on the tokens of the patches."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from models.errors import TeacherError
from models.students import shortened_vit, vit_families
from models.students.shortened_vit import Backbone
from models.teachers.transformers_network import PooledBackbone

_DOCUMENT, _HEAD, _TEACHER_HEAD = "student.json", "head.safetensors", "teacher_head.safetensors"


class DenseHead(nn.Module):
    """logits [..., C] = (tokens [..., D] - centre [D]) @ weight [D, C] + bias [C]."""

    def __init__(self, centre: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.centre = nn.Parameter(centre.float())
        self.weight = nn.Parameter(weight.float())
        self.bias = nn.Parameter(bias.float())

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = (tokens - self.centre) @ self.weight + self.bias
        return logits


class DenseNetwork(nn.Module):
    """Normalised images [B, 3, S, S] -> logits [B, C, h, w], one for each patch."""

    def __init__(self, backbone: nn.Module, head: DenseHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return as_grid(self.head(patch_tokens(self.backbone, images)))


def patch_tokens(network: nn.Module, images: Tensor) -> Tensor:
    """The tokens [N, h * w, D] of the patches, row by row, after the network's last norm.

    Of transformers' CLIP before it: there the norm is trained on the class token alone, and only put on that.
    `images`: normalised, [N, 3, S, S]. Raises `TeacherError` for what is no known vision transformer.
    """
    before = vit_families.prefix_tokens(network)
    if isinstance(network, PooledBackbone):
        tokens: Tensor = network.backbone(pixel_values=images, **network.arguments).last_hidden_state
    else:
        tokens = network.forward_features(images)  # type: ignore[operator]
    return tokens[:, before:]


def grid_side(patches: int) -> int:
    """Rows, and columns, of a square grid of patches. Raises `TeacherError` where they are no square."""
    side = math.isqrt(patches)
    if side**2 != patches:
        raise TeacherError(
            f"the teacher cuts a square image into {patches} patches, which are no square grid",
            "Choose another vision transformer.",
        )
    return side


def as_grid(logits: Tensor) -> Tensor:
    """Logits [B, h * w, C] as [B, C, h, w]."""
    side = grid_side(logits.shape[1])
    batch, _, classes = logits.shape
    return logits.transpose(1, 2).reshape(batch, classes, side, side)


def upsampled(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits [B, C, h, w] of patches as those of pixels [B, C, height, width]: bilinear, half-pixel centres."""
    return functional.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class DenseStudent:
    """What a `trained_student` folder of segmentation holds. `teacher_head` fits the teacher's own tokens."""

    backbone: Backbone
    head: DenseHead
    teacher_head: DenseHead
    name: str
    classes: tuple[str, ...]
    trained_with: Mapping[str, Any]

    @property
    def network(self) -> DenseNetwork:
        return DenseNetwork(self.backbone.network, self.head)

    def save(self, folder: Path) -> None:
        self.backbone.save(folder)
        for head, file in ((self.head, _HEAD), (self.teacher_head, _TEACHER_HEAD)):
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()},
                folder / file,
            )
        document = {
            "name": self.name,
            "input_size": self.backbone.input_size,
            "classes": self.classes,
            "mean": self.backbone.mean,
            "std": self.backbone.std,
            "backbone": self.backbone.document(),
            "trained_with": self.trained_with,
        }
        (folder / _DOCUMENT).write_text(json.dumps(document, ensure_ascii=False, indent=1))


def load(folder: Path) -> DenseStudent:
    """A student and its teacher's head, in evaluation mode, on the CPU."""
    document = json.loads((folder / _DOCUMENT).read_text())
    return DenseStudent(
        backbone=shortened_vit.load_backbone(folder),
        head=DenseHead(**load_file(folder / _HEAD)).eval(),
        teacher_head=DenseHead(**load_file(folder / _TEACHER_HEAD)).eval(),
        name=document["name"],
        classes=tuple(document["classes"]),
        trained_with=document["trained_with"],
    )
