"""What an upload is made of, before anything in it is believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Member:
    """A file of an upload: its path as sent, its size as declared, and how to read it (at most `size` bytes)."""

    name: str
    size: int
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Part:
    """A received file: `size` bytes from `offset` on in the upload's one file. `name`: UTF-8, or not.

    `field`: of the form that it came in.
    """

    name: bytes
    content_type: str
    offset: int
    size: int
    field: str = ""


@dataclass(frozen=True)
class Upload:
    """A received body: the content of its files one after the other in `path`, and its text fields."""

    path: Path
    parts: tuple[Part, ...]
    fields: dict[str, str]
    folder: Path  # a temporary folder for what is made of it

    def content(self, part: Part, size: int | None = None) -> bytes:
        """The part's content, or its first `size` bytes."""
        wanted = part.size if size is None else min(size, part.size)
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), wanted, part.offset)


def pointer(name: str) -> str:
    """JSON pointer of a file of the upload."""
    return "/files/" + escaped(name)


def class_pointer(name: str) -> str:
    return "/classes/" + escaped(name)


def escaped(name: str) -> str:
    """RFC 6901; control characters, which no finding should carry to a terminal, become '?'."""
    visible = "".join(character if character.isprintable() else "?" for character in name[:512])
    return visible.replace("~", "~0").replace("/", "~1")
