"""From encoded bytes to tensors: the one place that says how an image becomes a network's input.

An image is decoded to RGB and squeezed to a square of S x S pixels: bilinear with antialiasing, half-pixel
centres, no crop. ONNX calls this Resize(mode=linear, antialias=1, coordinate_transformation_mode=half_pixel).
Networks get float RGB in 0..1 and are normalised after this, each with its own mean and deviation.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn import functional

from models.arrays import Images, Pixels
from models.errors import DataError

#: ImageNet's mean and deviation, with which students normalise their input.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def decode(content: bytes, name: str = "image") -> Pixels:
    """uint8 RGB [3, H, W] of an encoded image, upright. Raises `DataError` when it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            return torch.from_numpy(np.array(upright, dtype=np.uint8)).permute(2, 0, 1).contiguous()
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DataError(f"{name} cannot be decoded as an image: {error}", "Remove or replace it.") from error


def resize(images: torch.Tensor, size: int) -> Images:
    """float [N, 3, size, size] in 0..1 from images [N, 3, H, W], uint8 or float in 0..1."""
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images
    if scaled.shape[-2:] == (size, size):
        return scaled
    return functional.interpolate(scaled, (size, size), mode="bilinear", align_corners=False, antialias=True)


def to_pixels(images: Images) -> Pixels:
    """uint8 from float in 0..1, rounded; a quarter of the memory."""
    return (images * 255).round_().clamp_(0, 255).to(torch.uint8)


def squares(contents: Iterable[tuple[str, bytes]], size: int) -> Pixels:
    """uint8 [N, 3, size, size] of named encoded images."""
    rows = [to_pixels(resize(decode(content, name)[None], size))[0] for name, content in contents]
    return torch.stack(rows) if rows else torch.empty(0, 3, size, size, dtype=torch.uint8)


def normalise(images: Images, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> torch.Tensor:
    """(images - mean) / std for each colour."""
    shift = torch.tensor(mean, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    scale = torch.tensor(std, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    return (images - shift) / scale
