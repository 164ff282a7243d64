"""Say of each pixel what it shows, with the student in this folder. Needs onnxruntime and Pillow only (and numpy).

    python predict.py photo.jpg another.png     writes photo.jpg.classes.png, and prints which classes it shows
    python predict.py --check                   are the class maps on this machine those of the golden images?

A class map is a palette PNG of the image's size; a pixel's value is the number of its class in labels.json.
The graph resizes and normalises by itself: give it upright RGB pixels, uint8 [batch, height, width, 3].
"""

from __future__ import annotations

import argparse
import colorsys
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
MODEL = "model.onnx"


def segment(session: Any, path: Path) -> Any:
    """The class of each pixel, uint8 [height, width]."""
    with Image.open(path) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.uint8)[None]
    (classes,) = session.run(["classes"], {"image": pixels})
    return classes[0]


def check(session: Any) -> int:
    """Compare the golden images' class maps with the expected ones; 0 if all are as expected."""
    golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
    wrong = 0
    for image in golden["images"]:
        with Image.open(HERE / image["classes"]) as expected:
            agreement = float((segment(session, HERE / image["file"]) == np.asarray(expected)).mean())
        right = agreement >= golden["agreement"]
        wrong += not right
        print(f"{image['file']}  {'ok' if right else 'DIFFERS'}  {agreement:.2%} of the pixels as expected")
    print(f"{len(golden['images']) - wrong} of {len(golden['images'])} golden images as expected")
    return 1 if wrong else 0


def save(classes: Any, path: Path) -> None:
    """A PNG with a colour for each class."""
    picture = Image.fromarray(classes)
    hues = [colorsys.hsv_to_rgb((0.618034 * number) % 1, 0.65, 0.95) for number in range(256)]
    picture.putpalette([0, 0, 0] + [round(255 * part) for hue in hues[1:] for part in hue])
    picture.save(path)


def targets(images: list[Path], out: Path | None) -> dict[Path, Path]:
    """Where the class map of each image goes: into `out`, or beside it. ValueError if two would be one file."""
    found: dict[Path, Path] = {}
    for path in images:
        target = (out or path.parent) / f"{path.name}.classes.png"
        if found.setdefault(target, path) != path:
            raise ValueError(
                f"{found[target]} and {path} would both become {target}: do one of them by itself"
            )
    return {path: target for target, path in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Say of each pixel what it shows.")
    parser.add_argument("images", nargs="*", type=Path, help="JPEG, PNG or WebP files")
    parser.add_argument("--out", type=Path, help="folder for the class maps; without it, beside each image")
    parser.add_argument("--check", action="store_true", help="check the golden images")
    arguments = parser.parse_args()
    if not (arguments.images or arguments.check):
        parser.error("give images, or --check")
    try:
        places = targets(arguments.images, arguments.out)
    except ValueError as error:
        parser.error(str(error))
    session = onnxruntime.InferenceSession(HERE / MODEL, providers=["CPUExecutionProvider"])
    if arguments.check and (failed := check(session)):
        return failed
    labels = json.loads((HERE / "labels.json").read_text(encoding="utf-8"))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    unreadable = 0
    for path, target in places.items():
        try:
            classes = segment(session, path)
        except OSError as error:
            print(f"{path}: {error}", file=sys.stderr)
            unreadable += 1
            continue
        save(classes, target)
        numbers, counts = np.unique(classes, return_counts=True)
        order = np.argsort(counts)[::-1]
        shares = ", ".join(f"{labels[numbers[at]]} {counts[at] / classes.size:.1%}" for at in order)
        print(f"{path}\t{target}\t{shares}")
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
