"""The images that the embedded models learn from: folders of class folders, squeezed to one size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.arrays import Labels, Pixels
from models.data import images as image_tensors
from models.data.fewshot import IMAGE_SUFFIXES
from models.errors import DataError

#: Folders that are no classes in a data set's folder; they are not learned from.
_NO_CLASSES = ("test", "unlabelled")


@dataclass(frozen=True)
class Pictures:
    """`pixels` uint8 [N, 3, S, S], class after class; `counts` int64 [K] images of each class; `classes` names [K]."""

    pixels: Pixels
    counts: Tensor
    classes: tuple[str, ...]

    @property
    def labels(self) -> Labels:
        """int64 [N], index of each image's class."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)

    def digest(self) -> str:
        """Names the pixels, in hexadecimal."""
        return hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()

    def table(self) -> str:
        """Images of each class, as rows of a Markdown table."""
        counted = zip(self.classes, self.counts.tolist(), strict=True)
        return "\n".join(f"| {name} | {count:,} |" for name, count in counted)


def named(folders: Sequence[Path]) -> str:
    """The folders as a model card names them: the last two parts of each path."""
    return ", ".join(f"`{path.resolve().parent.name}/{path.name}`" for path in folders)


def read(folders: Sequence[Path], size: int) -> Pictures:
    """All images of the class folders in `folders`; folders of the same name are one class.

    `test/` and `unlabelled/` are left out. Raises `DataError` where there are fewer than two classes, or a class
    has no image.
    """
    found: dict[str, list[Path]] = {}
    for root in folders:
        if not root.is_dir():
            raise DataError(f"there is no folder '{root}'", "Name a folder of class folders with --data.")
        for path in sorted(root.iterdir()):
            if path.is_dir() and path.name not in _NO_CLASSES and not path.name.startswith("."):
                found.setdefault(path.name, []).extend(
                    file for file in sorted(path.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES
                )
    if len(found) < 2:
        raise DataError(
            f"{', '.join(map(str, folders))}: {len(found)} class folders; at least 2 are needed",
            "Put the images of each class into a folder of its name.",
        )
    classes = tuple(sorted(found))
    for name in classes:
        if not found[name]:
            raise DataError(
                f"class '{name}' has no image ({', '.join(IMAGE_SUFFIXES)})", "Add images, or remove it."
            )
    rows = [
        image_tensors.squares(((str(path), path.read_bytes()) for path in found[name]), size)
        for name in classes
    ]
    return Pictures(torch.cat(rows), torch.tensor([len(row) for row in rows]), classes)


def draw(counts: Tensor, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Classes int64 [size] and rows int64 [size] of images: every class is as likely, and every image of a class."""
    classes = torch.randint(len(counts), (size,), generator=random)
    place = torch.rand(size, generator=random, dtype=torch.float64)
    starts = counts.cumsum(0) - counts
    return classes, starts[classes] + (place * counts[classes]).long()
