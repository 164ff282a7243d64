"""What a trained generator is published as: the checkpoint's folder, a page of samples, a model card."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from models.data import images as image_tensors
from models.generators.diffusion import Diffusion
from models.runtime import generator
from models.zoo import architecture
from models.zoo.pictures import Pictures, named
from models.zoo.words import NEUTRAL, words_of

_ZOOM = 2
_NAME_WIDTH = 110  # pixels beside the images
_STEPS, _GUIDANCE = 25, 3.0


def write_checkpoint(out: Path, vae: Any, unet: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Write Stable Diffusion's layout into `out`, weights as float16 safetensors. The networks are float16 then."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=architecture.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out)


def sample_page(diffusion: Diffusion, classes: Sequence[str], each: int, seed: int) -> Image.Image:
    """A row of `each` samples for every class, and for the first neutral word, with the prompt's word beside it."""
    names = [*(" ".join(words_of(name)) for name in classes), NEUTRAL[0]]
    side = diffusion.resolution * _ZOOM
    page = Image.new("RGB", (_NAME_WIDTH + each * (side + 2), len(names) * (side + 2)), "white")
    pen = ImageDraw.Draw(page)
    for row, name in enumerate(names):
        top = row * (side + 2)
        pen.text((4, top + side // 2 - 5), name, fill="black")
        for column, pixels in enumerate(sample(diffusion, f"a photo of a {name}", each, seed)):
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            page.paste(
                image.resize((side, side), Image.Resampling.NEAREST), (_NAME_WIDTH + column * (side + 2), top)
            )
    return page


@torch.no_grad()
def sample(diffusion: Diffusion, text: str, count: int, seed: int) -> torch.Tensor:
    """uint8 [count, 3, S, S] of a prompt."""
    noise = torch.randn(count, *diffusion.latent_shape, generator=generator(seed, "sample", text))
    conditions = diffusion.embed_prompts(diffusion.prompt(text)).expand(count, -1, -1)
    empty = diffusion.unconditional().expand(count, -1, -1)[:, None]
    latents = diffusion.sample(noise, conditions, empty, steps=_STEPS, guidance=_GUIDANCE)
    return image_tensors.to_pixels(diffusion.decode(latents)).cpu()


def model_card(
    pictures: Pictures,
    sources: Sequence[Path],
    sizes: dict[str, int],
    training: dict[str, str],
    licence: str,
) -> str:
    """The text of the card: what it is, was trained on and cannot do. `sizes`: learned numbers of each part."""
    counts = pictures.counts.tolist()
    total = f"{sum(sizes.values()):,} parameters"
    parts = ", ".join(f"{part} {size:,}" for part, size in sizes.items())
    runs = "\n".join(f"- {what}: {how}" for what, how in training.items())
    pixels, side = architecture.RESOLUTION, architecture.LATENT_SIDE
    folders = named(sources)
    head = textwrap.dedent(f"""\
        ---
        license: {licence}
        library_name: diffusers
        pipeline_tag: text-to-image
        ---
        # A small text-to-image latent diffusion model

        Made by `python -m models.zoo.train_generator`. {pixels} x {pixels} pixels, latents of {side} x {side}, velocity
        prediction, {total}: {parts}. Weights are
        float16, from the running average. Loads with diffusers' `StableDiffusionPipeline`.

        It is a base for textual and null-text inversion where no large model can be had. Its prompts are
        "a photo of a <class>" and the like; the neutral words ({", ".join(NEUTRAL)}) mean an image of any class.

        ## Trained on

        {sum(counts):,} images in {len(counts)} classes, from {folders}, with nothing but the names
        of the classes as text. No weights of another model went into it; features of EfficientNet-Lite0, trained on
        ImageNet-1k, told its decoder what looks alike.

        | class | images |
        |---|---|
        """)
    tail = textwrap.dedent("""\

        ## What it cannot do

        - Draw what is in none of these classes, or combine words: of a prompt's words only the class counts.
        - Read a word that is not in its vocabulary; words named `spare0` and so on are in it, untrained.
        - Give more detail than its few pixels have, or faces, text and counts that are right.
        - Be fairer than its images: what is rare among them is rarer among its samples.
        - Prove anything about images that it was trained on: test it on others.
        """)
    return f"{head}{pictures.table()}\n\n{runs}\n{tail}"
