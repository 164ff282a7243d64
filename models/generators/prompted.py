"""Images of the teacher's classes, made by a text-to-image diffusion model from the classes' names alone.

They come from no real image. A class whose name the model's tokenizer does not know is drawn from a neutral word:
such an image is of anything that the model was trained on, and the teacher says what. So are all images where there
are no classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models import generators, teachers
from models.data import archive, images
from models.generators import Kind, shards
from models.generators.diffusion import NEUTRAL_WORD, Diffusion
from models.generators.shards import Generated
from models.methods.fsbbt import DrawingParams, SynthesisParams
from models.methods.wecolora import GenerationParams
from models.pipeline import StageContext
from models.runtime import resolve_device
from models.teachers import black_box_questions


def run(context: StageContext, params: SynthesisParams) -> None:
    """SYNTHESISE: this shard's images of the classes that a black box knows."""
    introduction = black_box_questions.read(context.folder("black_box"))
    _make(context, introduction.classes, introduction.size, params.made, params.drawing)


def run_for_tokens(context: StageContext, params: GenerationParams) -> None:
    """DRAW: this shard's images of the classes of the labelled images, to learn a network's tokens of."""
    classes: tuple[str, ...] = ()
    if "support" in context.inputs:
        classes = archive.read_index(context.folder("support") / archive.FILE_NAME).classes
    generator = generators.read_spec(context.folder("generator"))
    size = params.size or teachers.read_spec(context.folder("teacher")).input_size
    _make(context, classes, min(generator.resolution, size), params.images, params)


def _make(
    context: StageContext, classes: Sequence[str], size: int, count: int, params: DrawingParams
) -> None:
    """Make this shard's part of `count` images and write `Generated`. A checkpoint holds those that are made."""
    spec = generators.read_spec(context.folder("generator"))
    diffusion = generators.kept(spec, str(resolve_device(context.device)))
    prompts, known = embed(diffusion, classes, params.template)
    places = shards.positions(context.shard, count)
    resumed = context.checkpoints.latest()
    parts = [shards.load(resumed)] if resumed else []
    done = sum(len(part.kind) for part in parts)
    for start in range(places.start + done, places.stop, params.batch_size):
        batch = range(start, min(start + params.batch_size, places.stop))
        parts.append(draw(diffusion, prompts, known, batch, size, params, context.seed))
        done += len(batch)
        context.report(done, len(places))
        if context.checkpoints.due():
            context.checkpoints.save(done, shards.joined(parts).save)
    shards.joined(parts).save(context.output)


def embed(diffusion: Diffusion, classes: Sequence[str], template: str) -> tuple[Tensor, Tensor]:
    """Conditions [C, L, D] of a prompt for each class, and bool [C]: whether the tokenizer knows the class's name.

    Without classes: one prompt of a neutral word, whose class is not known.
    """
    known = [diffusion.knows(name) for name in classes] or [False]
    classes = classes or [NEUTRAL_WORD]
    words = [name if there else NEUTRAL_WORD for name, there in zip(classes, known, strict=True)]
    with torch.no_grad():
        rows = [diffusion.embed_prompts(diffusion.prompt(template.format(word))) for word in words]
    return torch.cat(rows), torch.tensor(known)


def draw(
    diffusion: Diffusion,
    prompts: Tensor,
    known: Tensor,
    index: range,
    size: int,
    params: DrawingParams,
    seed: int,
) -> Generated:
    """The images at positions `index`, of `size` pixels: of the classes in turn, each from a seed of its own."""
    drawn = torch.arange(index.start, index.stop) % len(prompts)
    seeds = [shards.image_seed(seed, "drawing", at) for at in index]
    randoms = [torch.Generator().manual_seed(each) for each in seeds]
    latents = diffusion.sample(
        torch.stack([torch.randn(diffusion.latent_shape, generator=random) for random in randoms]),
        prompts[drawn],
        diffusion.unconditional()[None].expand(len(index), -1, -1, -1),
        steps=params.steps,
        guidance=params.guidance,
        solver=params.sampler,
        batch_size=params.batch_size,
    )
    nobody = torch.full_like(drawn, -1)
    return Generated(
        pixels=images.to_pixels(images.resize(diffusion.decode_all(latents), size)),
        kind=torch.full_like(drawn, Kind.DIFFUSION),
        first=nobody,
        second=nobody.clone(),
        share=torch.zeros(len(drawn)),
        label=torch.where(known[drawn], drawn, -1),
        seed=torch.tensor(seeds),
    )
