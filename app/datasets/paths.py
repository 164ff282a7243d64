"""Names that came with an upload: which are refused, which are skipped, and which are the same."""

from __future__ import annotations

import re
import unicodedata

MAX_PATH = 512
MAX_CLASS_NAME = 100

_DRIVE = re.compile(r"[A-Za-z]:")
_LITTER = {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "icon\r"}


def danger(path: str) -> tuple[str, str] | None:
    """Code and sentence where a path must not be used; None where it stays inside its folder and is legible."""
    steps = path.removesuffix("/").split("/")
    if "\0" in path:
        return "zip_path", "its name contains a NUL byte. Rename it."
    if path.startswith("/") or _DRIVE.match(path):
        return "zip_path", "its path is absolute. Use paths relative to the data set, such as class/file.jpg."
    if "\\" in path:
        return "zip_path", "its path contains a backslash. Write folders with '/': class/file.jpg."
    if ".." in steps:
        return (
            "zip_path",
            "its path leads out of the data set ('..'). Use plain paths such as class/file.jpg.",
        )
    if "" in steps or "." in steps:
        return "zip_path", "its path has an empty or '.' step. Use plain paths such as class/file.jpg."
    if len(path) > MAX_PATH or any(len(step.encode()) > 255 for step in steps):
        return (
            "name_too_long",
            f"its path is longer than {MAX_PATH} characters, or a step of it than 255 bytes. Rename it.",
        )
    return None


def legible(path: str) -> bool:
    """False for control characters, line separators and half surrogates."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in path)


def is_litter(path: str) -> bool:
    """Files that systems leave behind: hidden ones, __MACOSX, Thumbs.db."""
    return any(step.startswith(".") or step.casefold() in _LITTER for step in path.split("/"))


def class_name(folder: str) -> str:
    """As it is kept: NFC, single spaces."""
    return " ".join(unicodedata.normalize("NFC", folder).split())


def class_key(folder: str) -> str:
    """Classes with equal keys would be mistaken for each other."""
    return unicodedata.normalize("NFC", class_name(folder).casefold())
