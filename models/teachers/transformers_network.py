"""Teachers that Hugging Face transformers builds, from the hub or a folder. No code of a checkpoint runs."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.utils import cached_file

from models.data import images as image_tensors
from models.errors import TeacherError
from models.teachers import TeacherSpec
from models.teachers.checkpoint import refuse_misfits
from models.teachers.protocol import Teacher, frozen

_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")
#: Image towers that were trained together with a text tower, through a pooling of their own.
_TOWERS = tuple(
    f"{name}_vision_model" for name in ("clip", "chinese_clip", "altclip", "metaclip_2", "siglip")
)


class PooledBackbone(nn.Module):
    """A transformers image model that answers with one vector an image.

    Image towers of CLIP and SigLIP pool as they were trained: the class token through the last norm, or attention.
    Of other networks feature maps [N, D, h, w] are averaged over space; token sequences [N, T, D] give their class
    token, or their mean where the network has none. Their checkpoints' poolers are left out: many were never trained.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.has_class_token = any(name.endswith(_CLASS_TOKENS) for name, _ in backbone.named_parameters())
        config: Any = backbone.config
        self.pools_itself = config.model_type in _TOWERS and getattr(config, "vision_use_head", True)
        forward = inspect.signature(backbone.forward).parameters
        self.arguments = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in forward else {}

    def forward(self, images: Tensor) -> Tensor:
        output = self.backbone(pixel_values=images, **self.arguments)
        if self.pools_itself:
            pooled: Tensor = output.pooler_output
            return pooled
        states: Tensor = output.last_hidden_state
        if states.dim() == 4:
            return states.mean((2, 3))
        return states[:, 0] if self.has_class_token else states.mean(1)


def load(spec: TeacherSpec, device: str, input_size: int) -> Teacher:
    """The pooled-feature network of a teacher of kind `transformers`. Raises `TeacherError`."""
    try:
        config = AutoConfig.from_pretrained(spec.source, revision=spec.revision, trust_remote_code=False)
        model, loading = AutoModel.from_pretrained(
            spec.source,
            config=config,
            revision=spec.revision,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused by name below
            output_loading_info=True,
            dtype=torch.float32,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise TeacherError(
            f"teacher '{spec.name}' cannot be loaded: {str(error).splitlines()[0]}",
            "It must be an image model with safetensors weights that transformers knows.",
        ) from error
    backbone = getattr(model, "vision_model", model)
    prefix = re.compile(rf"^({model.base_model_prefix}\.)?(vision_model\.)?")
    refuse_misfits(
        spec.name,
        backbone,
        missing=[name for name in loading["missing_keys"] if "pooler" not in name],
        left_over=[prefix.sub("", name) for name in loading["unexpected_keys"]],
        misshapen={name: (own, found) for name, found, own in loading["mismatched_keys"]},
        heads=("pooler",),
    )
    network = PooledBackbone(backbone)
    own: Any = network.backbone.config
    mean, std = _normalisation(spec)
    return Teacher(
        frozen(network, device),
        input_size,
        mean,
        std,
        spec.embedding_dim,
        {
            "library": "transformers",
            "config": own.to_dict(),
            "own_size": _side(getattr(own, "image_size", None)),
        },
    )


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """The network of a `Teacher.architecture`, with random weights, for images of any size that fits its patches."""
    model = AutoModel.from_config(AutoConfig.for_model(**architecture["config"]), dtype=torch.float32)
    return PooledBackbone(getattr(model, "vision_model", model))


def _side(image_size: Any) -> int | None:
    """The first side where a configuration gives both."""
    side: int | None = image_size[0] if isinstance(image_size, list | tuple) else image_size
    return side


def _normalisation(spec: TeacherSpec) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation from the checkpoint's `preprocessor_config.json`; ImageNet's where it has none."""
    path = _preprocessor_file(spec)
    settings = json.loads(path.read_text()) if path else {}
    mean = settings.get("image_mean") or image_tensors.MEAN
    std = settings.get("image_std") or image_tensors.STD
    return tuple(mean), tuple(std)


def _preprocessor_file(spec: TeacherSpec) -> Path | None:
    if spec.is_local:
        path = Path(spec.source, "preprocessor_config.json")
        return path if path.is_file() else None
    found = cached_file(
        spec.source,
        "preprocessor_config.json",
        revision=spec.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None
