"""Pictures on this machine, packed into the one zip that the service takes."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from app.client.errors import ClientError

#: Where images come from: a folder of class folders, a zip of them, or pairs of "class/file" and content. Images
#: without a label lie in a folder `unlabelled`, which may be the only one. For segmentation the folders are `images`
#: and `masks`, beside a file `classes.txt`.
Source = str | Path | Iterable[tuple[str, Path | bytes]]

#: Packed images up to this size stay in memory.
_IN_MEMORY = 32 * 2**20


@contextmanager
def packed(source: Source) -> Iterator[tuple[str, IO[bytes]]]:
    """A name for the source and its images as an open zip. Raises ClientError for an empty one."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_file():
            with path.open("rb") as archive:
                yield path.stem, archive
            return
        if not path.is_dir():
            raise ClientError(f"'{path}' is neither a folder of class folders nor a zip file")
        members: Iterable[tuple[str, Path | bytes]] = files_below(path)
        name = path.resolve().name
    else:
        members, name = source, "images"
    with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) as archive:
        if not _write(members, archive):
            raise ClientError(
                f"'{source}' holds no files to upload: it needs one folder for each class, with images inside, "
                "or a folder 'unlabelled' with images"
            )
        archive.seek(0)
        yield name, archive


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files under a folder with their names relative to it, sorted; hidden files and folders are left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                path = Path(parent, name)
                yield path.relative_to(folder).as_posix(), path


def _write(members: Iterable[tuple[str, Path | bytes]], target: IO[bytes]) -> int:
    count = 0
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members:
            entry = zipfile.ZipInfo(name)  # a fixed date: the same images make the same zip
            with archive.open(entry, "w") as writer:
                if isinstance(content, bytes):
                    writer.write(content)
                else:
                    with content.open("rb") as reader:
                        shutil.copyfileobj(reader, writer)
            count += 1
    return count
