"""TEXTUAL_INVERSION, NULL_TEXT_INVERSION and GENERATE: each shard is one class, or a part of its images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import generators
from models.arrays import Images
from models.data import fewshot, images
from models.generators import Kind
from models.generators import null_text_inversion as null_text
from models.generators import textual_inversion as textual
from models.generators.diffusion import Diffusion, blend
from models.generators.shards import Generated, image_seed, joined, load, place_in_class
from models.pipeline import StageContext
from models.runtime import resolve_device

if TYPE_CHECKING:
    from models.methods.tint import GenerationParams, NullTextInversionParams, TextualInversionParams

#: How images are sampled where no inversion says so.
STEPS = 25
#: Longest side of the images kept where none is given: the teachers look at no more.
_LARGEST_SIDE = 224


@dataclass(frozen=True)
class ClassTokens:
    """What was learnt of a class: its prompt's template, the token [V, D] in it, and a LoRA's weights, if any."""

    template: str
    tokens: Tensor
    lora: dict[str, Tensor]

    def conditions(self, diffusion: Diffusion) -> Tensor:
        """The prompt's embedding [1, L, D]."""
        with torch.no_grad():
            prompt = diffusion.prompt(self.template, len(self.tokens))
            return diffusion.embed_prompts(prompt, self.tokens[None])


@dataclass(frozen=True)
class ClassInversions:
    """A class' inverted images: starts [K, c, h, w], null embeddings [K, R, L, D], their positions among the labelled
    images [K]; the steps and guidance that lead back to them.
    """

    noise: Tensor
    unconditional: Tensor
    index: Tensor
    steps: int
    guidance: float


def textual_inversion(context: StageContext, params: TextualInversionParams) -> None:
    """Learn the token of the class with this shard's number. Writes `tokens.safetensors`, `tokens.json`, a LoRA."""
    with _generator(context) as diffusion:
        supports, _, name = _supports(context, diffusion)
        tokens, lora = textual.learn(
            diffusion,
            supports,
            params,
            seed=context.seed,
            report=context.report,
            word=params.initial_word or name,
            checkpoints=context.checkpoints,
        )
    save_file({"tokens": tokens.contiguous()}, context.output / "tokens.safetensors")
    (context.output / "tokens.json").write_text(json.dumps({"template": params.template}))
    if lora:
        save_file(lora, context.output / "lora.safetensors")


def null_text_inversion(context: StageContext, params: NullTextInversionParams) -> None:
    """Invert the labelled images of one class. Writes `inversions.safetensors`, `inversions.json`."""
    learnt = read_tokens(context.inputs["class_tokens"][context.shard])
    guidance = params.guidance or generators.read_spec(context.folder("generator")).guidance
    params = params.model_copy(update={"guidance": guidance})
    with _generator(context, learnt) as diffusion:
        supports, index, _ = _supports(context, diffusion)
        conditions = learnt.conditions(diffusion).expand(len(supports), -1, -1)
        inverted = null_text.invert(
            diffusion,
            supports,
            conditions,
            params,
            report=context.report,
            checkpoints=context.checkpoints,
        )
    tensors = {**vars(inverted), "index": index}
    save_file(
        {name: value.cpu().contiguous() for name, value in tensors.items()},
        context.output / "inversions.safetensors",
    )
    document = {"steps": params.steps, "guidance": guidance}
    (context.output / "inversions.json").write_text(json.dumps(document))


def generate(context: StageContext, params: GenerationParams) -> None:
    """Make this shard's images of its class and write `Generated`."""
    label, places = place_in_class(context.shard, context.shape.classes, params.images_per_class)
    learnt = read_tokens(context.inputs["class_tokens"][label])
    inversions = None
    if "inversions" in context.inputs:
        inversions = read_inversions(context.inputs["inversions"][label])
    elif params.guidance is None:
        guidance = generators.read_spec(context.folder("generator")).guidance
        params = params.model_copy(update={"guidance": guidance})
    resumed = context.checkpoints.latest()
    parts = [load(resumed)] if resumed else []
    done = sum(len(part.kind) for part in parts)
    with _generator(context, learnt) as diffusion:
        for start in range(places.start + done, places.stop, params.batch_size):
            batch = range(start, min(start + params.batch_size, places.stop))
            seeds = [image_seed(context.seed, "image", label, number) for number in batch]
            parts.append(make(diffusion, learnt, inversions, label, seeds, params))
            done += len(batch)
            context.report(done, len(places))
            if context.checkpoints.due():
                context.checkpoints.save(done, joined(parts).save)
    joined(parts).save(context.output)


def make(
    diffusion: Diffusion,
    learnt: ClassTokens,
    inversions: ClassInversions | None,
    label: int,
    seeds: list[int],
    params: GenerationParams,
) -> Generated:
    """An image of class `label` for each of `seeds`, which decide on its origin, alpha and noise."""
    origin, alpha, noise = draw(seeds, inversions, diffusion.latent_shape, params.alpha)
    conditions = learnt.conditions(diffusion).expand(len(seeds), -1, -1)
    steps, guidance = params.steps or STEPS, params.guidance or null_text.GUIDANCE
    if inversions is None:
        first, start = torch.full_like(origin, -1), noise
        unconditional = diffusion.unconditional()[None].expand(len(seeds), -1, -1, -1)
    else:
        steps, guidance = params.steps or inversions.steps, params.guidance or inversions.guidance
        first, start = inversions.index[origin], blend(inversions.noise[origin], noise, alpha)
        unconditional = inversions.unconditional[origin]
    latents = diffusion.sample(
        start,
        conditions,
        unconditional,
        steps=steps,
        guidance=guidance,
        solver=params.sampler,
        batch_size=params.batch_size,
    )
    size = params.size or min(diffusion.resolution, _LARGEST_SIDE)
    return Generated(
        pixels=images.to_pixels(images.resize(diffusion.decode_all(latents), size)),
        kind=torch.full_like(origin, Kind.DIFFUSION),
        first=first,
        second=torch.full_like(origin, -1),
        share=1 - alpha,
        label=torch.full_like(origin, label),
        seed=torch.tensor(seeds),
    )


def draw(
    seeds: list[int], inversions: ClassInversions | None, shape: tuple[int, int, int], alpha: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each seed which inversion [n] an image starts from, its alpha [n] and noise [n, c, h, w].

    `alpha` None: even from 0 to 1. Without inversions all is new noise: alpha is 1.
    """
    count = 1 if inversions is None else len(inversions.index)
    origins, alphas, noises = [], [], []
    for seed in seeds:
        random = torch.Generator().manual_seed(seed)
        origins.append(int(torch.randint(count, (1,), generator=random)))
        drawn = float(torch.rand(1, generator=random))
        alphas.append(1.0 if inversions is None else drawn if alpha is None else alpha)
        noises.append(torch.randn(shape, generator=random))
    return torch.tensor(origins), torch.tensor(alphas), torch.stack(noises)


def read_tokens(folder: Path) -> ClassTokens:
    """What TEXTUAL_INVERSION left of one class."""
    lora = folder / "lora.safetensors"
    return ClassTokens(
        template=json.loads((folder / "tokens.json").read_text())["template"],
        tokens=load_file(folder / "tokens.safetensors")["tokens"],
        lora=load_file(lora) if lora.exists() else {},
    )


def read_inversions(folder: Path) -> ClassInversions:
    """What NULL_TEXT_INVERSION left of one class."""
    tensors = load_file(folder / "inversions.safetensors")
    document = json.loads((folder / "inversions.json").read_text())
    return ClassInversions(
        tensors["noise"],
        tensors["unconditional"],
        tensors["index"],
        document["steps"],
        document["guidance"],
    )


@contextmanager
def _generator(context: StageContext, learnt: ClassTokens | None = None) -> Iterator[Diffusion]:
    """The generator, with what a class' LoRA changes in it. The next shard finds it loaded, and as it was."""
    spec = generators.read_spec(context.folder("generator"))
    diffusion = generators.kept(spec, str(resolve_device(context.device)))
    with textual.adapted(diffusion, learnt.lora if learnt else {}):
        yield diffusion


def _supports(context: StageContext, diffusion: Diffusion) -> tuple[Images, Tensor, str]:
    """The labelled images [K, 3, S, S] of this shard's class, their positions [K], and the class' name."""
    split = fewshot.load(context.folder("support"), diffusion.resolution)
    index = (split.labels == context.shard).nonzero()[:, 0]
    return split.pixels[index].float() / 255, index, split.classes[context.shard]
