"""SYNTHESISE: one shard of the images that the teacher is asked about, made from the real ones."""

from __future__ import annotations

from typing import Literal

import torch

from models.arrays import Pixels
from models.generators import Kind, cvae, mixup
from models.generators.mixup import Mix
from models.generators.shards import Synthetic, positions
from models.methods.fsbbt import SynthesisParams
from models.pipeline import StageContext
from models.runtime import resolve_device
from models.teachers import black_box_questions

_BATCH = 512


def run(context: StageContext, params: SynthesisParams) -> None:
    """Make this shard's images and write `Synthetic`. Held-out images take no part."""
    introduction = black_box_questions.read(context.folder("black_box"))
    kept = introduction.kept(context.shape.support + context.shape.unlabelled)
    pixels = black_box_questions.real_pixels(context, introduction.size)[kept]
    generator = None
    if "cvae" in context.inputs:
        generator = cvae.load(context.folder("cvae"), context.seed, resolve_device(context.device))
    places = positions(context.shard, params.made)
    parts = []
    for start in range(places.start, places.stop, _BATCH):
        batch = range(start, min(start + _BATCH, places.stop))
        mixes = [plan(at, len(pixels), introduction.size, params, context.seed) for at in batch]
        parts.append(make(batch, mixes, pixels, kept, generator))
        context.report(batch.stop - places.start, len(places))
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    Synthetic(**joined).save(context.output)


def plan(index: int, count: int, side: int, params: SynthesisParams, seed: int) -> Mix | None:
    """The mix at position `index`, of two of `count` real images; None: the CVAE makes this image."""
    if params.maker == "cvae":
        return None
    if params.maker == "mixup_cvae":
        mix = mixup.draw("mixup", index, count, side, params.beta, seed)
        return None if mix.nearly_one_of_the_two(params.margin) else mix
    maker: Literal["mixup", "cutmix"] = "mixup"
    if params.maker == "cutmix" or (params.maker == "mixup_cutmix" and index % 2):
        maker = "cutmix"
    return mixup.draw_apart(maker, index, count, side, params.beta, seed, params.margin)


def make(
    index: range,
    mixes: list[Mix | None],
    pixels: Pixels,
    kept: torch.Tensor,
    generator: cvae.Generator | None,
) -> Synthetic:
    """The images at positions `index` [m] from their mixes of `pixels`, which stand at `kept` among the real ones."""
    mixed = [place for place, mix in enumerate(mixes) if mix is not None]
    drawn = [place for place, mix in enumerate(mixes) if mix is None]
    made_images = torch.empty(len(mixes), *pixels.shape[1:], dtype=torch.uint8)
    if mixed:
        made_images[mixed] = mixup.blend(pixels, [mix for mix in mixes if mix is not None])
    if drawn and generator is not None:
        made_images[drawn] = generator.images([index[place] for place in drawn])
    rows = [
        (Kind.CUTMIX if mix.box else Kind.MIXUP, int(kept[mix.first]), int(kept[mix.second]), mix.share)
        if mix is not None
        else (Kind.CVAE, generator.label_at(at) if generator else -1, -1, 0.0)
        for at, mix in zip(index, mixes, strict=True)
    ]
    kind, first, second, share = zip(*rows, strict=True)
    return Synthetic(
        made_images, torch.tensor(kind), torch.tensor(first), torch.tensor(second), torch.tensor(share)
    )
