"""Masks: the class of each pixel of an image, from encoded bytes to tensors and to what patches show.

A mask has one value a pixel: the index of its class, or `archive.IGNORED` where the class is not known.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from models.arrays import Mask
from models.data import archive
from models.data.archive import IGNORED
from models.errors import DataError

_BIT_DEPTH, _COLOUR_TYPE = 24, 25  # where a PNG's header says these
_GREY = 0  # colour type


def decode(content: bytes, name: str = "mask") -> Mask:
    """uint8 [H, W] of a grey or palette PNG with at most 8 bits a pixel. Raises `DataError` for anything else.

    Values are those of the file: a palette's colours mean nothing, and 1 of a 1-bit PNG is 1, not white.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            mode, values = image.mode, np.array(image.convert("L") if image.mode == "1" else image)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DataError(
            f"{name} cannot be decoded as a PNG: {error}", "Save it as an 8-bit PNG again."
        ) from error
    if mode not in ("1", "L", "P"):
        raise DataError(
            f"{name} is no mask: its pixels are of the kind {mode}, not of one channel with 8 bits",
            "Save it as a grey or palette PNG whose values are the classes: 0, 1, … and 255 where not known.",
        )
    if content[_COLOUR_TYPE] == _GREY:  # fewer bits are decoded as greys from 0 to 255
        values = values // (255 // (2 ** content[_BIT_DEPTH] - 1))
    return torch.from_numpy(values)


def encode(mask: Mask) -> bytes:
    """An 8-bit grey PNG."""
    encoded = io.BytesIO()
    Image.fromarray(mask.numpy()).save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


@dataclass(frozen=True)
class Stored:
    """What `stream` gives, anew each time it is gone through: no mask stays in memory."""

    folder: Path

    def __iter__(self) -> Iterator[Mask]:
        return stream(self.folder)


def stream(folder: Path) -> Iterator[Mask]:
    """The masks of a split in the order of its images, each uint8 [H, W] of its image's own size, one by one.

    Raises `DataError` where the images have none.
    """
    path = folder / archive.FILE_NAME
    if not archive.read_index(path).masked:
        raise DataError("these images have no masks", "Upload images/ and masks/ with files of equal names.")
    for image, content in archive.masks(path):
        yield decode(content, f"the mask of {image.name}")


def images_showing(masks: Iterable[Mask], classes: int) -> Tensor:
    """int64 [C]: in how many of the masks each class has a pixel."""
    shown = torch.zeros(classes, dtype=torch.long)
    for mask in masks:
        shown += torch.bincount(mask.flatten().long(), minlength=IGNORED + 1)[:classes] > 0
    return shown


def cell_shares(mask: Mask, side: int, classes: int) -> Tensor:
    """float [side * side, C]: the share of each class in the cells of a grid over the mask, row by row.

    A row sums to the share of the cell's pixels whose class is known. In an image smaller than the grid, cells
    without a pixel are rows of zeros.
    """
    height, width = mask.shape
    row = torch.arange(height) * side // height
    column = torch.arange(width) * side // width
    cell = (row[:, None] * side + column[None, :]).flatten()
    value = mask.flatten().long()
    known = value != IGNORED
    counts = torch.bincount(cell[known] * classes + value[known], minlength=side * side * classes)
    pixels = torch.bincount(cell, minlength=side * side).clamp(min=1)
    return counts.view(-1, classes) / pixels[:, None]
