"""Blobs by sha-256 digest, on a local folder or any fsspec file system such as S3.

A blob is written under a temporary name, synced and renamed, so a digest names whole content or nothing.
Local blobs are read-only files that other processes may hard-link.

A blob is stored before the row that names it is written. So whoever stores or keeps one makes it young, and
retention forgets no young blob.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import fsspec

from app import locks

#: So long after it was stored or kept, a blob without a row may still get one.
YOUNG_S = 24 * 3600.0
_CHUNK = 1 << 20


class BlobStore(Protocol):
    """Where blobs are kept. Digests are lower-case hex sha-256."""

    def __hash__(self) -> int: ...  # what is read of a blob may be cached by store and digest

    def put(self, path: Path) -> str:
        """Store a file's content; return its digest. Content that is there already is kept."""

    def keep(self, digest: str) -> bool:
        """Whether the blob is there, and then make it young. Where False, `put` its content."""

    def fetch(self, digest: str, path: Path) -> None:
        """Make the blob available as the file `path` (read-only). Raises FileNotFoundError."""

    def open(self, digest: str) -> BinaryIO:
        """A seekable reader. Raises FileNotFoundError."""

    def exists(self, digest: str) -> bool: ...

    def size(self, digest: str) -> int: ...

    def delete(self, digest: str) -> None: ...

    def older_than(self, seconds: float) -> Iterator[str]:
        """Digests of the blobs that were stored and last kept longer ago."""

    def forget(self, digest: str, older_than: float) -> bool:
        """Delete the blob, unless somebody has stored or kept it within so many seconds; whether it went."""

    def tidy(self) -> None:
        """Remove what interrupted writes left behind a day ago or longer."""

    def check(self) -> None:
        """Raise OSError where the store cannot be written."""


def connect(url: str, options: dict[str, str] | None = None) -> BlobStore:
    """The store at a file:// or other fsspec URL."""
    if url.startswith("file://"):
        return LocalStore(Path(url.removeprefix("file://")))
    return RemoteStore(url, options or {})


class LocalStore:
    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "tmp").mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self.root / digest[:2] / digest

    def put(self, path: Path) -> str:
        with self._temporary() as temporary:
            name = _copy_hashing(path, temporary)
            if not self.keep(name):
                target = self.path(name)
                target.parent.mkdir(exist_ok=True)
                temporary.chmod(0o444)
                temporary.replace(target)
                _sync_folder(target.parent)
        return name

    def keep(self, digest: str) -> bool:
        with locks.holding(self.root, shared=True):
            try:
                os.utime(self.path(digest))
            except (FileNotFoundError, PermissionError):  # another user's file: our own copy can replace it
                return False
        return True

    def fetch(self, digest: str, path: Path) -> None:
        try:
            os.link(self.path(digest), path)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without hard links
            with _partial(path) as partial:
                shutil.copyfile(self.path(digest), partial)

    def open(self, digest: str) -> BinaryIO:
        return self.path(digest).open("rb")

    def exists(self, digest: str) -> bool:
        return self.path(digest).exists()

    def size(self, digest: str) -> int:
        return self.path(digest).stat().st_size

    def delete(self, digest: str) -> None:
        self.path(digest).unlink(missing_ok=True)

    def older_than(self, seconds: float) -> Iterator[str]:
        until = time.time() - seconds
        for path in self.root.glob("[0-9a-f][0-9a-f]/*"):
            if _written(path) < until:
                yield path.name

    def forget(self, digest: str, older_than: float) -> bool:
        with locks.holding(self.root):  # nobody makes it young between the look and the deletion
            old = _written(self.path(digest)) < time.time() - older_than
            if old:
                self.delete(digest)
        return old

    def tidy(self) -> None:
        until = time.time() - YOUNG_S
        for path in (self.root / "tmp").iterdir():
            if _written(path) < until:
                path.unlink(missing_ok=True)

    def check(self) -> None:
        with self._temporary() as temporary:
            temporary.write_bytes(b"ok")

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        handle, name = tempfile.mkstemp(dir=self.root / "tmp")
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)


class RemoteStore:
    """Objects are atomic on the remote side; the digest is checked when a blob is fetched.

    An object's time is set by writing it, so `keep` refuses one that is no longer quite young and `put` writes it anew.
    """

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        # Without fsspec's cache of listings: other processes store and delete here too.
        self.files, root = fsspec.core.url_to_fs(url, **{"use_listings_cache": False, **options})
        self.root = root.rstrip("/")

    def path(self, digest: str) -> str:
        return f"{self.root}/{digest[:2]}/{digest}"

    def put(self, path: Path) -> str:
        digest = digest_of(path)
        if not self.keep(digest):
            self.files.put_file(str(path), self.path(digest))
        return digest

    def keep(self, digest: str) -> bool:
        return self._age(digest) < YOUNG_S / 2

    def fetch(self, digest: str, path: Path) -> None:
        with _partial(path) as partial:
            self.files.get_file(self.path(digest), str(partial))
            if digest_of(partial) != digest:
                raise OSError(f"blob {digest} is damaged in the store: its content has another digest")

    def open(self, digest: str) -> BinaryIO:
        return cast(BinaryIO, self.files.open(self.path(digest), "rb"))

    def exists(self, digest: str) -> bool:
        return bool(self.files.exists(self.path(digest)))

    def size(self, digest: str) -> int:
        return int(self.files.size(self.path(digest)))

    def delete(self, digest: str) -> None:
        with suppress(FileNotFoundError):
            self.files.rm_file(self.path(digest))

    def older_than(self, seconds: float) -> Iterator[str]:
        for path in self.files.find(self.root):
            name = path.rsplit("/", 1)[-1]
            if len(name) == 64 and seconds < self._age(name) < math.inf:
                yield name

    def forget(self, digest: str, older_than: float) -> bool:
        old = older_than < self._age(digest) < math.inf
        if old:
            self.delete(digest)
        return old

    def tidy(self) -> None:
        """Objects are atomic: there is nothing to remove."""

    def check(self) -> None:
        self.files.pipe_file(f"{self.root}/.check", b"ok")

    def _age(self, digest: str) -> float:
        """Seconds since the object was written, infinite where there is none."""
        try:
            written: datetime = self.files.modified(self.path(digest))
        except FileNotFoundError:
            return math.inf
        return (datetime.now(UTC) - written).total_seconds()


def digest_of(path: Path) -> str:
    """sha-256 of a file's content."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _copy_hashing(source: Path, target: Path) -> str:
    name = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK):
            name.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return name.hexdigest()


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A file beside `path` that becomes it, read-only, at the end of the block, or is removed."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.chmod(0o444)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _written(path: Path) -> float:
    """When a file was written or last kept; never where another process has just removed it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
