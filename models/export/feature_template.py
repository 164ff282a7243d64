"""The features of images, by the student in this folder. Needs onnxruntime and Pillow only (numpy comes with them).

    python predict.py photo.jpg another.png     how alike the images are: the cosine of their features, pair by pair
    python predict.py --out features.npy *.jpg  writes float32 [images, width], in the order of the arguments
    python predict.py --check                   are the features on this machine those of the golden images?

The graph resizes and normalises by itself: give it upright RGB pixels, uint8 [batch, height, width, 3].
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
MODEL = "model.onnx"


def features(session: Any, path: Path) -> Any:
    """float32 [width] of one image."""
    with Image.open(path) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.uint8)[None]
    (found,) = session.run(["features"], {"image": pixels})
    return found[0]


def check(session: Any) -> int:
    """Compare the golden images' features with the expected ones; 0 if all are as expected."""
    golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
    wrong = 0
    for image in golden["images"]:
        expected = np.asarray(image["features"])
        difference = np.linalg.norm(features(session, HERE / image["file"]) - expected)
        share = float(difference / np.linalg.norm(expected))
        right = share <= golden["tolerance"]
        wrong += not right
        print(f"{image['file']}  {'ok' if right else 'DIFFERS'}  by {share:.1e} of the features' length")
    print(f"{len(golden['images']) - wrong} of {len(golden['images'])} golden images as expected")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="The features of images.")
    parser.add_argument("images", nargs="*", type=Path, help="JPEG, PNG or WebP files")
    parser.add_argument("--out", type=Path, help="write the features into this .npy file")
    parser.add_argument("--check", action="store_true", help="check the golden images")
    arguments = parser.parse_args()
    if not (arguments.images or arguments.check):
        parser.error("give images, or --check")
    session = onnxruntime.InferenceSession(HERE / MODEL, providers=["CPUExecutionProvider"])
    if arguments.check and (failed := check(session)):
        return failed
    read, rows = [], []
    for path in arguments.images:
        try:
            rows.append(features(session, path))
            read.append(path)
        except OSError as error:
            print(f"{path}: {error}", file=sys.stderr)
    if arguments.out and rows:
        np.save(arguments.out, np.stack(rows))
        print(f"{arguments.out}\t{len(rows)} images, {len(rows[0])} features each")
    elif rows:
        units = np.stack([row / np.linalg.norm(row) for row in rows])
        for first in range(len(read)):
            for second in range(first + 1, len(read)):
                print(f"{read[first]}\t{read[second]}\t{float(units[first] @ units[second]):.4f}")
    return 1 if len(read) < len(arguments.images) else 0


if __name__ == "__main__":
    sys.exit(main())
