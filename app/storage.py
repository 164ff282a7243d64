"""Blobs by sha-256 digest, on a local folder or any fsspec file system such as S3.

A blob is written under a temporary name, synced and renamed, so a digest names whole content or nothing.
Local blobs are read-only files that other processes may hard-link.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import fsspec

_CHUNK = 1 << 20


class BlobStore(Protocol):
    """Where blobs are kept. Digests are lower-case hex sha-256."""

    def put(self, path: Path) -> str:
        """Store a file's content; return its digest. Storing the same content again is cheap and harmless."""

    def fetch(self, digest: str, path: Path) -> None:
        """Make the blob available as the file `path` (read-only). Raises FileNotFoundError."""

    def open(self, digest: str) -> BinaryIO:
        """A seekable reader. Raises FileNotFoundError."""

    def exists(self, digest: str) -> bool: ...

    def size(self, digest: str) -> int: ...

    def delete(self, digest: str) -> None: ...

    def older_than(self, seconds: float) -> Iterator[str]:
        """Digests of the blobs that were written longer ago."""

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
            target = self.path(name)
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                temporary.chmod(0o444)
                temporary.replace(target)
                _sync_folder(target.parent)
        return name

    def fetch(self, digest: str, path: Path) -> None:
        try:
            os.link(self.path(digest), path)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(self.path(digest), path)

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
            if path.stat().st_mtime < until:
                yield path.name

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
    """Objects are atomic on the remote side; the digest is checked when a blob is fetched."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.files, root = fsspec.core.url_to_fs(url, **options)
        self.root = root.rstrip("/")

    def path(self, digest: str) -> str:
        return f"{self.root}/{digest[:2]}/{digest}"

    def put(self, path: Path) -> str:
        digest = digest_of(path)
        if not self.exists(digest):
            self.files.put_file(str(path), self.path(digest))
        return digest

    def fetch(self, digest: str, path: Path) -> None:
        partial = path.with_name(path.name + ".partial")
        self.files.get_file(self.path(digest), str(partial))
        if digest_of(partial) != digest:
            partial.unlink()
            raise OSError(f"blob {digest} is damaged in the store: its content has another digest")
        partial.replace(path)

    def open(self, digest: str) -> BinaryIO:
        return cast(BinaryIO, self.files.open(self.path(digest), "rb"))

    def exists(self, digest: str) -> bool:
        return bool(self.files.exists(self.path(digest)))

    def size(self, digest: str) -> int:
        return int(self.files.size(self.path(digest)))

    def delete(self, digest: str) -> None:
        if self.exists(digest):
            self.files.rm_file(self.path(digest))

    def older_than(self, seconds: float) -> Iterator[str]:
        until = datetime.now(UTC) - timedelta(seconds=seconds)
        for path in self.files.find(self.root):
            name = path.rsplit("/", 1)[-1]
            if len(name) == 64 and self.files.modified(path) < until:
                yield name

    def check(self) -> None:
        self.files.pipe_file(f"{self.root}/.check", b"ok")


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


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
