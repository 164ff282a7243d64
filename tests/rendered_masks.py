"""Pictures drawn here, with masks that are right by construction: coloured shapes on grey noise."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("ground", "disc", "square")
COLOURS = np.array([(110, 110, 110), (230, 60, 40), (40, 80, 230)])
IGNORED = 255


def scene(
    random: np.random.Generator, height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels [H, W, 3] and mask [H, W] with one disc and one square; what is at the disc's edge is not known."""
    rows, columns = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    side = int(random.integers(height // 3, height // 2))
    top, left = random.integers(0, height - side), random.integers(0, width - side)
    mask[top : top + side, left : left + side] = 2
    radius = random.uniform(height / 6, height / 4)
    distance = np.hypot(rows - random.uniform(0, height), columns - random.uniform(0, width))
    mask[distance < radius] = 1
    pixels = COLOURS[mask] + random.integers(-40, 41, (height, width, 3))
    mask[np.abs(distance - radius) < 1] = IGNORED
    return pixels.clip(0, 255).astype(np.uint8), mask


def files(seed: int = 0, support: int = 6, test: int = 5, unlabelled: int = 4) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a data set; images are of several sizes, masks grey and palette PNGs in turn."""
    random = np.random.default_rng(seed)
    yield "classes.txt", "\n".join(CLASSES).encode()
    for split, count in (("", support), ("test/", test)):
        for number in range(count):
            pixels, mask = scene(random, 64 + 8 * (number % 3), 64 + 16 * (number % 2))
            yield f"{split}images/{number}.png", png(Image.fromarray(pixels))
            yield f"{split}masks/{number}.png", mask_png(mask, palette=bool(number % 2))
    for number in range(unlabelled):
        yield f"unlabelled/{number}.png", png(Image.fromarray(scene(random, 64, 64)[0]))


def png(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def mask_png(mask: NDArray[np.uint8], *, palette: bool = False) -> bytes:
    image = Image.fromarray(mask)
    if palette:
        image.putpalette(
            COLOURS.flatten().tolist() + 253 * [255, 255, 255]
        )  # of 3 colours, 2 bits would be written
    return png(image)


def grey_png(rows: list[list[int]], bits: int) -> bytes:
    """A PNG of few bits a pixel, which Pillow does not write; each row fills whole bytes."""
    lines = b""
    for row in rows:
        number = int("".join(format(value, f"0{bits}b") for value in row), 2)
        lines += b"\0" + number.to_bytes(len(row) * bits // 8, "big")

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, 0, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(lines)),
            chunk(b"IEND", b""),
        )
    )


def write(folder: Path, **counts: int) -> Path:
    """The data set as a folder."""
    for name, content in files(**counts):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def zipped(members: Iterator[tuple[str, bytes]] | dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, content)
    return packed.getvalue()
