"""Child process that decodes untrusted images: run by path, imports nothing of this project.

It limits itself before it loads Pillow, then answers one request after the other.

Request on stdin: length, width and height (4 bytes each, big endian), then the file's content. Width and height are 0
for an image; a mask names the size that it is kept at, which is that of its image.
Answer on stdout: length and JSON header, then length and the clean image (empty where there is none).
One frame before the first request says that it is ready.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

#: The longest side that is kept; larger images are scaled down.
MAX_SIDE = 1024
#: Images up to this many pixels are kept without loss.
SMALL_PIXELS = 128 * 128
JPEG_QUALITY = 95

_REQUEST = struct.Struct(">III")
_PR_SET_PDEATHSIG = 1
_ORIENTATION = 0x0112  # EXIF tag
_BIT_DEPTH, _COLOUR_TYPE = 24, 25  # where a PNG's header says these
_GREY = 0  # colour type


class Rejected(Exception):
    """The image cannot be used: a stable code and a sentence."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


def confine(max_pixels: int, parent: int) -> None:
    """Give up what decoding does not need: memory, files, life after the parent."""
    # As in app/processes.py, but here: its parent has many threads, and must run no Python between fork and exec.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    memory = 256 * 2**20 + 20 * max_pixels  # the decoded image, its RGB copy, its resized copy
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        resource.setrlimit(kind, (limit, limit))


def allow_cpu(seconds: float) -> None:
    """The kernel ends this process when it computes for longer from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def clean(content: bytes, max_pixels: int) -> tuple[dict[str, Any], bytes]:
    """Decode, turn upright, drop metadata, scale down, encode anew: (facts, file). Raises `Rejected`."""
    from PIL import Image  # noqa: PLC0415 - after confine()

    with _opened(content, ("JPEG", "PNG", "WEBP"), max_pixels) as image:
        width, height = image.size
        lossless = image.format == "PNG" or b"VP8L" in content[:64]
        turn = _turn(image)
        image.draft("RGB", (2 * MAX_SIDE, 2 * MAX_SIDE))
        image.load()
        upright = _rgb(image)
    upright.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    if turn is not None:
        upright = upright.transpose(turn)
        if turn >= Image.Transpose.ROTATE_90 and turn != Image.Transpose.ROTATE_180:
            width, height = height, width
    upright.info = {}
    encoded = io.BytesIO()
    if lossless or upright.width * upright.height <= SMALL_PIXELS:
        upright.save(encoded, "PNG", compress_level=4)
    else:
        upright.save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    facts = {
        "width": upright.width,
        "height": upright.height,
        "original_width": width,
        "original_height": height,
        "rotated": turn is not None,
    }
    return facts, encoded.getvalue()


def clean_mask(content: bytes, max_pixels: int, size: tuple[int, int]) -> tuple[dict[str, Any], bytes]:
    """A mask as an 8-bit grey PNG of this size (width, height), and the values that it has. Raises `Rejected`.

    Values are those of the file: a palette's colours mean nothing, and 1 of a 1-bit PNG is 1, not white.
    """
    from PIL import Image  # noqa: PLC0415

    with _opened(content, ("PNG",), max_pixels) as image:
        width, height = image.size
        if image.mode not in ("1", "L", "P"):
            what = "16 bits" if image.mode.startswith("I") else f"colours ({image.mode})"
            raise Rejected(
                "mask_format",
                f"its pixels have {what}, and a mask has one channel of 8 bits. Save it as a grey or palette PNG whose "
                "values are the numbers of the classes: 0, 1, ... and 255 where the class is not known.",
            )
        image.load()
        if image.mode == "P":
            mask = Image.frombytes("L", image.size, image.tobytes())
        else:
            mask = image.convert("L")
            if content[_COLOUR_TYPE] == _GREY:  # fewer bits are decoded as greys from 0 to 255
                step = 255 // (2 ** content[_BIT_DEPTH] - 1)
                mask = mask.point(lambda value: value // step)
    if mask.size != size:
        mask = mask.resize(size, Image.Resampling.NEAREST)
    mask.info = {}
    encoded = io.BytesIO()
    mask.save(encoded, "PNG", compress_level=4)
    values = [value for value, pixels in enumerate(mask.histogram()) if pixels]
    facts = {"original_width": width, "original_height": height, "values": values}
    return facts, encoded.getvalue()


@contextlib.contextmanager
def _opened(content: bytes, formats: tuple[str, ...], max_pixels: int) -> Iterator[Any]:
    """A file that is one image of a bearable size. Raises `Rejected` for whatever goes wrong with it."""
    from PIL import Image  # noqa: PLC0415

    try:
        with Image.open(io.BytesIO(content), formats=formats) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise Rejected(
                    "image_too_large",
                    f"it has {width} x {height} pixels; at most {max_pixels:,} are accepted. Scale it down.",
                )
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise Rejected("image_animated", "it is an animation. Export one frame of it.")
            yield image
    except Rejected:
        raise
    except MemoryError:
        raise Rejected("image_too_large", "it needs too much memory to decode. Scale it down.") from None
    except Exception as error:  # whatever a hostile file makes of the decoder
        raise Rejected(
            "image_corrupt", f"it cannot be decoded ({_brief(error)}). Export it again from the original."
        ) from None


def _turn(image: Any) -> Any:
    """What the EXIF orientation asks for, None where nothing or nothing legible."""
    from PIL import Image  # noqa: PLC0415

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(_ORIENTATION))
    except Exception:  # broken metadata does not make a broken image
        return None


def _rgb(image: Any) -> Any:
    """8-bit RGB: transparency over white, 16-bit grey scaled to 8 bits."""
    from PIL import Image  # noqa: PLC0415

    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _brief(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words.split(" <")[0][:120]


def serve(requests: BinaryIO, answers: BinaryIO, max_pixels: int, cpu_seconds: float) -> None:
    _answer(answers, b"ready")
    while request := requests.read(_REQUEST.size):
        length, *size = _REQUEST.unpack(request)
        content = requests.read(length)
        allow_cpu(cpu_seconds)
        try:
            facts, encoded = (
                clean_mask(content, max_pixels, tuple(size)) if any(size) else clean(content, max_pixels)
            )
        except Rejected as rejected:
            facts, encoded = {"code": rejected.code, "detail": rejected.detail}, b""
        _answer(answers, json.dumps(facts).encode(), encoded)


def _answer(answers: BinaryIO, *frames: bytes) -> None:
    for frame in frames:
        answers.write(struct.pack(">I", len(frame)) + frame)
    answers.flush()


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--max-pixels", type=int, required=True)
    arguments.add_argument("--cpu-seconds", type=float, required=True)
    arguments.add_argument("--parent", type=int, required=True)
    options = arguments.parse_args()
    confine(options.max_pixels, options.parent)
    from PIL import (  # noqa: PLC0415 - and before the first request: files cannot be opened later
        Image,
        JpegImagePlugin,
        MpoImagePlugin,
        PngImagePlugin,
        WebPImagePlugin,
    )

    for plugin in (JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin):
        assert plugin
    Image.MAX_IMAGE_PIXELS = None  # clean() compares the header's size itself, and can say it
    os.environ.clear()
    serve(sys.stdin.buffer, sys.stdout.buffer, options.max_pixels, options.cpu_seconds)


if __name__ == "__main__":
    main()
