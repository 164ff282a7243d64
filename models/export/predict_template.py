"""Classify images with the student in this folder. Needs onnxruntime and Pillow only (numpy comes with them).

    python predict.py photo.jpg another.png     the best labels of each image, with their scores
    python predict.py --check                   are the scores on this machine those of the golden images?
    python predict.py --model model.int8.onnx photo.jpg

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


def read_pixels(path: Path) -> Any:
    """uint8 [1, height, width, 3], upright RGB."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.uint8)[None]


def classify(session: Any, path: Path) -> Any:
    """Scores float [classes], summing to 1."""
    (scores,) = session.run(["probabilities"], {"image": read_pixels(path)})
    return scores[0]


def check(session: Any, model: str) -> int:
    """Compare the golden images' scores with the expected ones; 0 if all are as expected."""
    golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
    if model not in golden["tolerance"]:
        print(f"golden.json has no expected scores of {model}", file=sys.stderr)
        return 2
    tolerance = golden["tolerance"][model]
    wrong = 0
    for image in golden["images"]:
        expected = np.asarray(image["scores"][model])
        difference = np.abs(classify(session, HERE / image["file"]) - expected)
        right = bool((difference <= tolerance["atol"] + tolerance["rtol"] * np.abs(expected)).all())
        wrong += not right
        print(f"{image['file']}  {'ok' if right else 'DIFFERS'}  largest difference {difference.max():.1e}")
    print(f"{len(golden['images']) - wrong} of {len(golden['images'])} golden images as expected")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Classify images with the student in this folder.")
    parser.add_argument("images", nargs="*", type=Path, help="JPEG, PNG or WebP files")
    parser.add_argument(
        "--model", default="model.onnx", help="model.onnx or, where there is one, model.int8.onnx"
    )
    parser.add_argument("--top", type=int, default=1, help="how many labels to print for each image")
    parser.add_argument("--check", action="store_true", help="check the golden images")
    arguments = parser.parse_args()
    if not (arguments.images or arguments.check):
        parser.error("give images, or --check")
    if not (HERE / arguments.model).is_file():
        parser.error(f"there is no {arguments.model} in this folder")

    session = onnxruntime.InferenceSession(HERE / arguments.model, providers=["CPUExecutionProvider"])
    if arguments.check and (failed := check(session, arguments.model)):
        return failed
    labels = json.loads((HERE / "labels.json").read_text(encoding="utf-8"))
    unreadable = 0
    for path in arguments.images:
        try:
            scores = classify(session, path)
        except OSError as error:
            print(f"{path}: {error}", file=sys.stderr)
            unreadable += 1
            continue
        for index in scores.argsort()[::-1][: arguments.top]:
            print(f"{path}\t{labels[index]}\t{scores[index]:.4f}")
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
