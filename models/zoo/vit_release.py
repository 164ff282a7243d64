"""What a trained ViT is published as: the folder that timm loads, and a model card."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from models.data.images import MEAN, STD
from models.teachers import TeacherSpec
from models.zoo import vit_network
from models.zoo.pictures import Pictures, named
from models.zoo.vit_network import PATCH, SIZE, Budget


def write_checkpoint(out: Path, network: Any, budget: Budget, classes: Sequence[str]) -> None:
    """Write timm's `config.json` and `model.safetensors` (float16, with the head) into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "architecture": vit_network.ARCHITECTURE,
        "num_classes": len(classes),
        "num_features": budget.width,
        "model_args": vit_network.model_args(budget),
        "pretrained_cfg": {
            "input_size": [3, SIZE, SIZE],
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": list(MEAN),
            "std": list(STD),
            "label_names": list(classes),
        },
    }
    state = {name: value.detach().half().cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(document, indent=1) + "\n")


def model_card(
    pictures: Pictures,
    sources: Sequence[Path],
    parameters: int,
    teacher: TeacherSpec,
    budget: Budget,
    runs: Sequence[str],
    licence: str,
) -> str:
    """The text of the card: what it is, was trained on and cannot do. `runs`: what was done and measured."""
    images = f"{len(pictures.pixels):,} images in {len(pictures.classes)} classes"
    blocks = f"{budget.depth} blocks of width {budget.width}, {budget.heads} heads"
    folders = named(sources)
    head = textwrap.dedent(f"""\
        ---
        license: {licence}
        library_name: timm
        pipeline_tag: image-feature-extraction
        ---
        # A small vision transformer for {SIZE} x {SIZE} pixels

        Made by `python -m models.zoo.train_vit`. timm's `VisionTransformer`: {blocks},
        patches of {PATCH} pixels, a class token, {parameters:,} parameters with its head. Weights are float16, from the
        running average. `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it.

        It is a teacher for methods that shorten vision transformers, where no large one can be had.

        ## Trained on

        {images}, from {folders}: to name their classes, and to foresee from its tokens
        what {teacher.title} ({teacher.licence}) sees in them. So the images that that network was
        trained on went into this one too, by way of its features.

        | class | images |
        |---|---|
        """)
    tail = textwrap.dedent(f"""\

        ## What it cannot do

        - Know more than its classes well: its features of other things are those of a small network that saw none.
        - Use detail: images are squeezed to {SIZE} pixels. Larger ones go in by interpolated positions, untrained.
        - Be fairer than its images: what is rare among them is known worse.
        - Prove anything about images that it was trained on: test it on others.
        """)
    did = "\n".join(f"- {run}" for run in runs)
    return f"{head}{pictures.table()}\n\n{did}\n{tail}"
