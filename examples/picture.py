"""Draw docs/demo.png: the labelled tiles of each class, and the unseen ones with what the student said of them.

python examples/picture.py BUNDLE     (a folder: an unpacked bundle.zip of `make demo`'s student)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
SIDE, GAP, LEFT = 56, 4, 110


def main() -> None:
    bundle = Path(sys.argv[1])
    session = onnxruntime.InferenceSession(bundle / "model.onnx")
    labels = json.loads((bundle / "labels.json").read_text())
    names = labels["labels"] if isinstance(labels, dict) else labels
    classes = sorted(
        folder for folder in (HERE / "earth").iterdir() if (folder / f"{folder.name}-00.jpg").exists()
    )
    width, rows = LEFT + 10 * (SIDE + GAP) + 220, len(classes)
    picture = Image.new("RGB", (width, rows * (SIDE + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for row, folder in enumerate(classes):
        top = GAP + row * (SIDE + GAP)
        draw.text((8, top + 18), folder.name, "black", font)
        for column, path in enumerate(sorted(folder.iterdir())[:10]):
            tile = Image.open(path).resize((SIDE, SIDE))
            picture.paste(tile, (LEFT + column * (SIDE + GAP), top))
    for number, path in enumerate(sorted((HERE / "unseen").iterdir())):
        image = Image.open(path).convert("RGB")
        scores = session.run(["probabilities"], {"image": np.asarray(image)[None]})[0][0]
        best = int(scores.argmax())
        left, top = LEFT + 10 * (SIDE + GAP) + 30, GAP + number * 2 * (SIDE + GAP)
        picture.paste(image.resize((96, 96)), (left, top))
        draw.text((left + 106, top + 28), f"{names[best]}\n{100 * scores[best]:.1f} %", "black", font)
    target = HERE.parent / "docs" / "demo.png"
    picture.save(target, optimize=True)
    print(target)


if __name__ == "__main__":
    main()
