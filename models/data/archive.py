"""One split of a data set as one file: an uncompressed zip of images with an index. No torch.

Layout: `index.json`, then the image files. The bytes depend only on the content (fixed times and order), so
the file's digest names the split. The gateway writes it once; stages read it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

FILE_NAME = "images.zip"
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class ArchivedImage:
    """`file`: member of the archive; `label`: index into the classes, None if unlabelled; `name`: as uploaded."""

    file: str
    label: int | None
    name: str


@dataclass(frozen=True)
class ArchiveIndex:
    classes: tuple[str, ...]
    images: tuple[ArchivedImage, ...]


def write(path: Path, index: ArchiveIndex, contents: Iterable[bytes]) -> None:
    """Write `contents`, in the order of `index.images`, to a new archive at `path`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        document = {"classes": index.classes, "images": [asdict(image) for image in index.images]}
        archive.writestr(zipfile.ZipInfo("index.json", _EPOCH), json.dumps(document, ensure_ascii=False))
        for image, content in zip(index.images, contents, strict=True):
            archive.writestr(zipfile.ZipInfo(image.file, _EPOCH), content)


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
