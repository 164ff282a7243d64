"""Parts of safetensors files that lie in the blob store, read without torch and without reading the rest.

The format: 8 bytes with the length of the header (little-endian), the header as JSON, then the tensors' bytes;
offsets count from the header's end (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from app.storage import BlobStore

_DTYPES = {"F32": "<f4", "I64": "<i8", "U8": "u1"}


@dataclass(frozen=True)
class Layout:
    """Where a file has which tensor. `start`: of the first one's bytes."""

    start: int
    tensors: dict[str, Any]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name]["shape"])


@dataclass(frozen=True)
class TensorFile:
    """One open file."""

    file: BinaryIO
    layout: Layout

    def __contains__(self, name: str) -> bool:
        return name in self.layout.tensors

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows `start` to `stop` (None: the last) of a tensor's first dimension."""
        entry = self.layout.tensors[name]
        count, *rest = entry["shape"]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        stop = count if stop is None else min(stop, count)
        size = dtype.itemsize * int(np.prod(rest, dtype=np.int64))
        self.file.seek(self.layout.start + entry["data_offsets"][0] + start * size)
        content = self.file.read(max(0, stop - start) * size)
        return np.frombuffer(content, dtype).reshape(-1, *rest)


@contextmanager
def opened(blobs: BlobStore, digest: str) -> Iterator[TensorFile]:
    """The file with this digest. Raises FileNotFoundError."""
    with blobs.open(digest) as file:
        yield TensorFile(file, layout(blobs, digest))


@lru_cache(maxsize=4096)
def layout(blobs: BlobStore, digest: str) -> Layout:
    """A file's layout; read once, for a digest names always the same content."""
    with blobs.open(digest) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return Layout(8 + length, header)
