"""Reads a checkpoint in Stable Diffusion's layout: a folder with `unet/`, `vae/`, `text_encoder/`, `tokenizer/`,
`scheduler/`. Says what is wrong with one that is none, before anything large is loaded.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from models.errors import GeneratorError

_WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
_VAES = ("AutoencoderKL", "AutoencoderTiny")
_PREDICTIONS = ("epsilon", "v_prediction")
_FLOATS = {"F16", "BF16", "F32", "F64"}
_HINT = "Name a checkpoint in Stable Diffusion 1's or 2's format, as diffusers' save_pretrained writes it."


def check(folder: Path) -> None:
    """Raises `GeneratorError` where `folder` lacks a part, holds another kind of model, or no floating weights."""
    configs = {part: _config(folder, part) for part in _CONFIGS}
    unet, vae, text, scheduler = (configs[part] for part in ("unet", "vae", "text_encoder", "scheduler"))
    _expect("unet", "class", unet.get("_class_name"), ("UNet2DConditionModel",))
    _expect("vae", "class", vae.get("_class_name"), _VAES)
    architecture = (text.get("architectures") or [None])[0]
    _expect("text_encoder", "architecture", architecture, ("CLIPTextModel", "CLIPTextModelWithProjection"))
    _expect("scheduler", "prediction_type", scheduler.get("prediction_type", "epsilon"), _PREDICTIONS)
    _expect("unet", "addition_embed_type", unet.get("addition_embed_type"), (None,))
    _expect("unet", "in_channels", unet.get("in_channels"), (vae.get("latent_channels"),))
    _expect("unet", "cross_attention_dim", unet.get("cross_attention_dim"), (text.get("hidden_size"),))
    if not isinstance(unet.get("sample_size"), int):
        raise GeneratorError(f"unet: sample_size is {unet.get('sample_size')!r}; one number is needed", _HINT)
    for part in _WEIGHTS:
        _check_dtypes(part, _weights(folder, part))


def unet(folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' `UNet2DConditionModel`."""
    return _load(folder, "unet", dtype, diffusers.UNet2DConditionModel.from_pretrained)


def vae(folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' `AutoencoderKL` or `AutoencoderTiny`."""
    family = getattr(diffusers, _config(folder, "vae")["_class_name"])
    return _load(folder, "vae", dtype, family.from_pretrained)


def text_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' `CLIPTextModel`, with a projection where the checkpoint has one."""
    family = getattr(transformers, _config(folder, "text_encoder")["architectures"][0])
    return _load(folder, "text_encoder", dtype, family.from_pretrained)


def tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer; it must have a token for the beginning, the end and padding."""
    found = _read("tokenizer", lambda: transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(found, name) is None:
            raise GeneratorError(f"tokenizer: it has no {name}; a CLIP-style tokenizer is needed", _HINT)
    return found


def schedule(folder: Path) -> dict[str, Any]:
    """The configuration of the scheduler, from which any of diffusers' schedulers can be made."""
    return _config(folder, "scheduler")


def _config(folder: Path, part: str) -> dict[str, Any]:
    path = folder / part / _CONFIGS[part]
    if not path.is_file():
        raise GeneratorError(f"checkpoint '{folder}' has no {part}/{_CONFIGS[part]}", _HINT)
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise GeneratorError(f"{path} is no JSON: {error}", _HINT) from error
    if not isinstance(document, dict):
        raise GeneratorError(f"{path} is no JSON object", _HINT)
    return document


def _expect(part: str, what: str, found: object, wanted: tuple[object, ...]) -> None:
    if found not in wanted:
        choices = " or ".join(repr(value) for value in wanted)
        raise GeneratorError(f"{part}: {what} is {found!r}; {choices} is needed", _HINT)


def _weights(folder: Path, part: str) -> Path:
    """The part's safetensors file; full precision before half."""
    for suffix in (".safetensors", ".fp16.safetensors"):
        path = folder / part / f"{_WEIGHTS[part]}{suffix}"
        if path.is_file():
            return path
    raise GeneratorError(
        f"checkpoint '{folder}' has no {part}/{_WEIGHTS[part]}.safetensors",
        "Save its weights as safetensors; pickled weights are not read.",
    )


def _check_dtypes(part: str, path: Path) -> None:
    """Reads the header only: 8 bytes of length, then JSON (the safetensors format)."""
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        except (struct.error, ValueError) as error:
            raise GeneratorError(f"{path} is no safetensors file: {error}", "Copy it again.") from error
    for name, entry in header.items():
        if name != "__metadata__" and not name.endswith("position_ids") and entry["dtype"] not in _FLOATS:
            raise GeneratorError(
                f"{part}: tensor '{name}' is {entry['dtype']}; 16, 32 or 64 bit floating point is needed",
                "Name the checkpoint as it was before it was quantised.",
            )


def _load(folder: Path, part: str, dtype: torch.dtype, from_pretrained: Callable[..., Any]) -> Any:
    variant = "fp16" if _weights(folder, part).name.endswith(".fp16.safetensors") else None
    network, info = _read(
        part,
        lambda: from_pretrained(
            folder / part, torch_dtype=dtype, use_safetensors=True, variant=variant, output_loading_info=True
        ),
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise GeneratorError(
            f"{part} cannot be loaded: its weights lack {len(missing)} tensors, '{missing[0]}' first", _HINT
        )
    return network


def _read(part: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise GeneratorError(f"{part} cannot be loaded: {error}", _HINT) from error
