"""One split of a data set as one file: an uncompressed zip of images with an index. No torch.

Layout: `index.json`, then the image files, each with its mask behind it where it has one. The bytes depend only on
the content (fixed times and order), so the file's digest names the split. The gateway writes it once; stages read it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

FILE_NAME = "images.zip"
#: The value of a mask's pixels whose class is not known: they are neither learnt from nor judged.
IGNORED = 255
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class ArchivedImage:
    """`file`: member of the archive; `label`: index into the classes, None if unlabelled; `name`: as uploaded.

    `mask`: the member that has the class of each pixel, an 8-bit grey PNG of the image's size whose values are indices
    into the classes, or IGNORED. None where the image has none.
    """

    file: str
    label: int | None
    name: str
    mask: str | None = None


@dataclass(frozen=True)
class ArchiveIndex:
    classes: tuple[str, ...]
    images: tuple[ArchivedImage, ...]

    @property
    def masked(self) -> bool:
        """Whether every image has a mask; False without images."""
        return bool(self.images) and all(image.mask for image in self.images)

    @property
    def members(self) -> tuple[str, ...]:
        """The files in their order: each image, then its mask."""
        return tuple(file for image in self.images for file in (image.file, image.mask) if file)


def write(path: Path, index: ArchiveIndex, contents: Iterable[bytes]) -> None:
    """Write `contents`, in the order of `index.members`, to a new archive at `path`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        images = [_without_none(asdict(image), "mask") for image in index.images]
        document = {"classes": index.classes, "images": images}
        archive.writestr(zipfile.ZipInfo("index.json", _EPOCH), json.dumps(document, ensure_ascii=False))
        for file, content in zip(index.members, contents, strict=True):
            archive.writestr(zipfile.ZipInfo(file, _EPOCH), content)


def read_index(path: Path | BinaryIO) -> ArchiveIndex:
    """The index of an archive: a file, or one that is open already."""
    with zipfile.ZipFile(path) as archive:
        document = json.loads(archive.read("index.json"))
    images = tuple(ArchivedImage(**image) for image in document["images"])
    return ArchiveIndex(tuple(document["classes"]), images)


def contents(path: Path) -> Iterator[tuple[ArchivedImage, bytes]]:
    """The images of an archive in index order, with their encoded bytes."""
    index = read_index(path)
    with zipfile.ZipFile(path) as archive:
        for image in index.images:
            yield image, archive.read(image.file)


def masks(path: Path) -> Iterator[tuple[ArchivedImage, bytes]]:
    """The images that have a mask, in index order, with the encoded mask."""
    index = read_index(path)
    with zipfile.ZipFile(path) as archive:
        for image in index.images:
            if image.mask is not None:
                yield image, archive.read(image.mask)


def _without_none(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """`fields` without `name` where that is None: archives without masks have the bytes that they always had."""
    return {key: value for key, value in fields.items() if key != name or value is not None}
