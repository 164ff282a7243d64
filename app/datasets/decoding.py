"""Parent side of the image decoder: feeds the child, watches it, replaces it when an image kills it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

import structlog

log = structlog.get_logger()

PROGRAM = Path(__file__).with_name("decoder.py")
#: A fresh child takes over after so many images, so that nothing piles up in one.
IMAGES_PER_CHILD = 2000
STARTUP_S = 60
#: The child's answers are not trusted either.
MAX_HEADER_BYTES = 1 << 16
MAX_CLEAN_BYTES = 1 << 24

#: What a file is by its first bytes. Only the first three are accepted.
_SIGNATURES = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WebP"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"%!PS", "PostScript"),
    (0, b"%PDF", "PDF"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftyp", "video"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML or SVG"),
    (0, b"PK\x03\x04", "zip archive"),
    (0, b"PK\x05\x06", "zip archive"),
    (0, b"\x1f\x8b", "gzip archive"),
    (0, b"BZh", "bzip2 archive"),
    (0, b"\xfd7zXZ\0", "xz archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (0, b"Rar!\x1a\x07", "rar archive"),
    (257, b"ustar", "tar archive"),
)
ACCEPTED = {"JPEG": (".jpg", ".jpeg", ".jfif"), "PNG": (".png",), "WebP": (".webp",)}


def kind(content: bytes) -> str:
    """The format by the first bytes (262 are enough), '' where unknown."""
    for offset, magic, name in _SIGNATURES:
        if content[offset : offset + len(magic)] == magic and (name != "WebP" or content[:4] == b"RIFF"):
            return name
    return ""


@dataclass(frozen=True)
class CleanImage:
    """An image decoded and encoded anew: upright, RGB, without metadata. `suffix` is .png or .jpg."""

    content: bytes
    suffix: str
    width: int
    height: int
    original_width: int
    original_height: int
    rotated: bool


@dataclass(frozen=True)
class CleanMask:
    """A mask encoded anew: a PNG of its image's kept size, 8-bit grey, with these values. `original`: width, height."""

    content: bytes
    values: frozenset[int]
    original: tuple[int, int]


class ImageRejected(Exception):
    """This one image cannot be used; `detail` continues the sentence 'FILE: …'."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class _Killed(ImageRejected):
    """The child was killed, and not for taking too long."""


T = TypeVar("T")
#: From the child's facts and file to what they mean. Raises `ValueError`, `KeyError` or `TypeError` where they lie.
Check = Callable[[dict[str, Any], bytes], T]


class Decoder:
    """One child process at a time; not for several threads at once.

    A child that crashes or exceeds `timeout_s` costs that image only.
    """

    def __init__(self, *, max_pixels: int, timeout_s: float, program: Path = PROGRAM) -> None:
        self._command = [
            sys.executable, "-I", str(program), "--max-pixels", str(max_pixels), "--cpu-seconds", str(timeout_s),
            "--parent", str(os.getpid()),
        ]  # fmt: skip
        self._timeout_s = timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._fed = 0
        self._deadline: float | None = None
        self._timed_out = False
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._kill_late_child, name="decoder-watch", daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._watch.join()
        self._stop()

    def clean(self, content: bytes) -> CleanImage:
        """Raises `ImageRejected`."""
        return self._asked(content, (0, 0), _checked)

    def clean_mask(self, content: bytes, width: int, height: int) -> CleanMask:
        """A PNG as a mask of an image that is kept at this size. Raises `ImageRejected`."""
        return self._asked(content, (width, height), _checked_mask)

    def _asked(self, content: bytes, size: tuple[int, int], checked: Check[T]) -> T:
        """A child that was killed from outside is no fault of the image, which gets a second one: the child dies with
        the thread that started it, and that may end while the child is at work.
        """
        try:
            return self._ask(content, size, checked)
        except _Killed:
            return self._ask(content, size, checked)

    def _ask(self, content: bytes, size: tuple[int, int], checked: Check[T]) -> T:
        ended = self._child is not None and self._child.poll() is not None  # with the thread that started it
        if self._child is None or ended or self._fed >= IMAGES_PER_CHILD:
            self._start()
        requests, answers = _pipes(self._child)
        self._fed += 1
        self._set_deadline(self._timeout_s)
        try:
            requests.write(struct.pack(">III", len(content), *size) + content)
            requests.flush()
            facts = json.loads(_frame(answers, MAX_HEADER_BYTES))
            encoded = _frame(answers, MAX_CLEAN_BYTES)
            if "code" in facts:
                raise ImageRejected(str(facts["code"]), str(facts["detail"]))
            return checked(facts, encoded)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise self._lost(error) from None
        finally:
            self._set_deadline(None)

    def _lost(self, error: Exception) -> ImageRejected:
        code = self._stop()
        log.warning("decoder_lost", exit_code=code, timed_out=self._timed_out, error=str(error))
        if self._timed_out or code == -signal.SIGXCPU:
            return ImageRejected(
                "image_corrupt",
                f"decoding it took longer than {self._timeout_s:g} s. Export it again, smaller.",
            )
        lost = _Killed if code == -signal.SIGKILL else ImageRejected
        return lost("image_corrupt", "it made the decoder crash. Export it again from the original.")

    def _start(self) -> None:
        """Not on the first image's time."""
        self._stop()
        self._child = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            env={"LANG": "C.UTF-8"},
        )
        self._fed = 0
        self._set_deadline(STARTUP_S)
        try:
            _frame(_pipes(self._child)[1], MAX_HEADER_BYTES)
        except (EOFError, ValueError):
            raise RuntimeError(f"the image decoder does not start (exit status {self._stop()})") from None
        finally:
            self._set_deadline(None)

    def _stop(self) -> int | None:
        with self._lock:
            child, self._child = self._child, None
        if child is None:
            return None
        if child.poll() is None:
            _kill_group(child)
        for pipe in _pipes(child):
            with contextlib.suppress(OSError):  # what it did not read any more
                pipe.close()
        return child.wait()

    def _set_deadline(self, seconds: float | None) -> None:
        with self._lock:
            self._timed_out = self._timed_out and seconds is None
            self._deadline = None if seconds is None else time.monotonic() + seconds

    def _kill_late_child(self) -> None:
        while not self._closed.wait(0.05):
            with self._lock:
                late = self._deadline is not None and time.monotonic() > self._deadline
                if late and self._child is not None:
                    self._timed_out = True
                    self._deadline = None
                    _kill_group(self._child)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _pipes(child: subprocess.Popen[bytes] | None) -> tuple[IO[bytes], IO[bytes]]:
    """Where requests go in and answers come out."""
    assert child is not None
    assert child.stdin is not None
    assert child.stdout is not None
    return child.stdin, child.stdout


def _frame(stream: IO[bytes], limit: int) -> bytes:
    size = struct.unpack(">I", _exactly(stream, 4))[0]
    if size > limit:
        raise ValueError(f"the decoder answered with {size} bytes")
    return _exactly(stream, size)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError("the decoder ended")
    return content


def _checked(facts: dict[str, Any], encoded: bytes) -> CleanImage:
    suffix = {"PNG": ".png", "JPEG": ".jpg"}[kind(encoded)]
    width, height, original_width, original_height = (
        int(str(facts[name])) for name in ("width", "height", "original_width", "original_height")
    )
    if min(width, height, original_width, original_height) < 1:
        raise ValueError("the decoder answered with an empty image")
    return CleanImage(encoded, suffix, width, height, original_width, original_height, bool(facts["rotated"]))


def _checked_mask(facts: dict[str, Any], encoded: bytes) -> CleanMask:
    values = frozenset(int(value) for value in facts["values"])
    width, height = int(facts["original_width"]), int(facts["original_height"])
    if kind(encoded) != "PNG" or min(width, height) < 1 or not values <= set(range(256)):
        raise ValueError("the decoder answered with no mask")
    return CleanMask(encoded, values, (width, height))
