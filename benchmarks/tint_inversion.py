"""TINT's inversions and generation: of all images of a class at once, against one image at a time.

    python -m benchmarks.tint_inversion [--checkpoint FOLDER] [--data FOLDER] [--device cuda:0] [--quick]
    python -m benchmarks.tint_inversion --stable-diffusion-size      # CUDA: timing with random weights

"one at a time" is the reference's way, written out below: batch 1 throughout, the image encoded at every step of
textual inversion and the whole embedding table restored after it, null embeddings of one image after the other. Both
ways have the same parameters, start and device; textual inversion draws as many noised images in both, the batched one
in fewer, larger steps, which may stop early. Classes and images are CIFAR-10's `test/`; a seed is a class.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import command, record
from benchmarks.kd_cifar10 import interval, unpacked
from models import generators
from models.arrays import Images
from models.data import images as image_tensors
from models.generators import diffusion
from models.generators.diffusion import Diffusion, blend, psnr
from models.generators.null_text_inversion import GUIDANCE, invert
from models.generators.textual_inversion import learn_tokens
from models.methods.tint import NullTextInversionParams, TextualInversionParams
from models.runtime import generator, resolve_device, use_threads
from models.zoo import architecture, words

NAME = "tint_inversion"
WORD = "object"
TOGETHER, ONE_BY_ONE = "together", "one at a time"
#: Draws of noise on which both ways' tokens are compared.
_COMPARED = 256
T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """`drawn`: noised images of textual inversion; `made`: images generated; `shots`: images of a class."""

    textual: TextualInversionParams
    null_text: NullTextInversionParams
    shots: int
    made: int

    @property
    def drawn(self) -> int:
        return self.textual.steps * self.textual.batch_size


@dataclass(frozen=True)
class Outcome:
    """What a way made of a class: token [1, W], z_T, null embeddings, reconstructed latents, seconds of each part."""

    token: Tensor
    noise: Tensor
    nulls: Tensor
    reconstructed: Tensor
    seconds: dict[str, float]


def together(model: Diffusion, supports: Images, recipe: Recipe, seed: int) -> Outcome:
    """Dram's way."""
    clock = Clock(model.device)
    token = clock.of(
        "textual_inversion",
        lambda: learn_tokens(model, supports, recipe.textual, seed=seed, report=_silent, word=WORD),
    )
    conditions = embedded(model, token, recipe).expand(len(supports), -1, -1)
    found = clock.of(
        "null_text_inversion", lambda: invert(model, supports, conditions, recipe.null_text, report=_silent)
    )
    origin, start = starts(model, found.noise, recipe, seed)
    steps, guidance = recipe.null_text.steps, recipe.null_text.guidance

    def generated() -> Images:
        nulls = found.unconditional[origin].to(model.device)
        prompts = conditions[:1].expand(len(origin), -1, -1)
        return model.decode_all(model.sample(start, prompts, nulls, steps=steps, guidance=guidance))

    clock.of("generation", generated)
    nulls = found.unconditional.to(model.device)
    back = model.sample(found.noise, conditions, nulls, steps=steps, guidance=guidance)
    return Outcome(token, found.noise, found.unconditional, back, clock.seconds)


def one_at_a_time(model: Diffusion, supports: Images, recipe: Recipe, seed: int) -> Outcome:
    """The straightforward way."""
    clock = Clock(model.device)
    token = clock.of("textual_inversion", lambda: plain_token(model, supports, recipe, seed))
    condition = embedded(model, token, recipe)
    found = clock.of(
        "null_text_inversion",
        lambda: [plain_inversion(model, image[None], condition, recipe) for image in supports],
    )
    noise, nulls, back = (torch.cat(each) for each in zip(*found, strict=True))
    origin, start = starts(model, noise.cpu(), recipe, seed)

    def generated() -> None:
        for row, image in zip(origin.tolist(), start, strict=True):
            model.decode(plain_sample(model, image[None], condition, nulls[row], recipe))

    clock.of("generation", generated)
    return Outcome(token, noise, nulls, back, clock.seconds)


def plain_token(model: Diffusion, supports: Images, recipe: Recipe, seed: int) -> Tensor:
    """One image and one draw of noise a step; the word's row of the table learns, the others are put back."""
    text_encoder = copy.deepcopy(model.text_encoder)
    table = text_encoder.get_input_embeddings().weight.requires_grad_()
    untouched = table.detach().clone()
    prompt = model.prompt(recipe.textual.template.replace(diffusion.PLACEHOLDER, WORD)).ids
    row = model.tokenizer.convert_tokens_to_ids(model.tokenizer.tokenize(WORD)[0])
    ids = prompt.to(model.device)[None]
    others = torch.arange(len(table), device=model.device) != row
    adamw = torch.optim.AdamW([table], recipe.textual.lr, weight_decay=recipe.textual.weight_decay)
    for step in range(recipe.drawn):
        random = generator(seed, "one at a time", step)
        latents = model.encode(supports[int(torch.randint(len(supports), (1,), generator=random))][None])
        timestep = torch.randint(
            recipe.textual.least_timestep, model.training_timesteps, (1,), generator=random
        ).to(model.device)
        noise = torch.randn(latents.shape, generator=random).to(model.device)
        noisy, wanted = model.noised(latents, noise, timestep)
        conditions = text_encoder(ids).last_hidden_state
        loss = functional.mse_loss(model.predict(noisy, timestep, conditions), wanted)
        adamw.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adamw.step()
        with torch.no_grad():
            table[others] = untouched[others]
    return table[row].detach().float()[None].cpu()


def plain_inversion(
    model: Diffusion, image: Images, condition: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor]:
    """z_T [1, C, h, w], null embeddings [1, T, L, D] and the reconstructed latent of one image (Mokady et al.)."""
    params = recipe.null_text
    up, down = model.ddim_inverse(params.steps), model.ddim(params.steps)
    path = [model.encode(image)]
    with torch.no_grad():
        for timestep in up.timesteps.tolist():
            output = model.predict(path[-1], timestep, condition)
            path.append(up.step(output, timestep, path[-1]).prev_sample)
    current, null, nulls = path[-1], model.unconditional(), []
    for number, timestep in enumerate(down.timesteps.tolist()):
        wanted = path[-2 - number]
        null = null.clone().requires_grad_()
        adam = torch.optim.Adam([null], params.lr)
        with torch.no_grad():
            conditional = model.predict(current, timestep, condition)
        for _ in range(params.inner_steps):
            output = torch.lerp(model.predict(current, timestep, null), conditional, params.guidance)
            loss = functional.mse_loss(down.step(output, timestep, current).prev_sample, wanted)
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            if loss.item() < params.tolerance:
                break
        null = null.detach()
        with torch.no_grad():
            output = torch.lerp(model.predict(current, timestep, null), conditional, params.guidance)
            current = down.step(output, timestep, current).prev_sample
        nulls.append(null)
    return path[-1], torch.stack(nulls, 1), current


def plain_sample(model: Diffusion, start: Tensor, condition: Tensor, nulls: Tensor, recipe: Recipe) -> Tensor:
    """The latent of one image; both predictions in one pass, as in any pipeline."""
    scheduler = model.ddim(recipe.null_text.steps)
    current = start.to(model.device)
    with torch.no_grad():
        for timestep, null in zip(scheduler.timesteps.tolist(), nulls, strict=True):
            without, with_ = model.predict(
                torch.cat([current, current]), timestep, torch.cat([null[None], condition])
            ).chunk(2)
            output = torch.lerp(without, with_, recipe.null_text.guidance)
            current = scheduler.step(output, timestep, current).prev_sample
    return current


def embedded(model: Diffusion, token: Tensor, recipe: Recipe) -> Tensor:
    """Conditions [1, L, D] of the class's prompt."""
    with torch.no_grad():
        return model.embed_prompts(model.prompt(recipe.textual.template, len(token)), token[None])


def starts(model: Diffusion, noise: Tensor, recipe: Recipe, seed: int) -> tuple[Tensor, Tensor]:
    """The support and the blended noise that each image is made from, the same for both ways."""
    random = generator(seed, NAME, "starts")
    origin = torch.randint(len(noise), (recipe.made,), generator=random)
    drawn = torch.randn(recipe.made, *model.latent_shape, generator=random)
    return origin, blend(noise[origin], drawn, torch.rand(recipe.made, generator=random))


def loss_of(model: Diffusion, supports: Images, token: Tensor, recipe: Recipe) -> float:
    """Textual inversion's loss on draws that neither way was trained on."""
    latents, random, errors = model.encode_all(supports), generator(0, NAME, "compared"), []
    condition = embedded(model, token, recipe)
    for _ in range(_COMPARED // 16):
        index = torch.randint(len(latents), (16,), generator=random).to(model.device)
        times = torch.randint(
            recipe.textual.least_timestep, model.training_timesteps, (16,), generator=random
        ).to(model.device)
        noise = torch.randn(16, *model.latent_shape, generator=random).to(model.device)
        noisy, wanted = model.noised(latents[index], noise, times)
        with torch.no_grad():
            predicted = model.predict(noisy, times, condition.expand(16, -1, -1))
        errors.append(float(functional.mse_loss(predicted, wanted)))
    return statistics.fmean(errors)


def measure(model: Diffusion, supports: Images, recipe: Recipe, seed: int) -> list[dict[str, Any]]:
    """A row for each way, and for DDIM inversion alone: guided sampling with the empty prompt."""
    wanted = image_tensors.resize(supports, model.resolution)
    ceiling = float(psnr(model.decode_all(model.encode_all(supports)), wanted).mean())
    rows = []
    for name, way in ((ONE_BY_ONE, one_at_a_time), (TOGETHER, together)):
        made = way(model, supports, recipe, seed)
        reached = float(psnr(model.decode_all(made.reconstructed), wanted).mean())
        seconds = made.seconds
        row = {
            "way": name,
            "seed": seed,
            "textual_inversion_s": seconds["textual_inversion"],
            "null_text_inversion_s": seconds["null_text_inversion"],
            "image_s": seconds["generation"] / recipe.made,
            "loss": loss_of(model, supports, made.token, recipe),
            "psnr": reached,
            "below_vae_db": ceiling - reached,
        }
        rows.append(row)
    conditions = embedded(model, made.token, recipe).expand(len(supports), -1, -1)
    empty = model.unconditional()[None].expand(len(supports), -1, -1, -1)
    params = recipe.null_text
    plain = model.sample(made.noise, conditions, empty, steps=params.steps, guidance=params.guidance)
    reached = float(psnr(model.decode_all(plain), wanted).mean())
    return [*rows, {"way": "DDIM alone", "seed": seed, "psnr": reached, "below_vae_db": ceiling - reached}]


def checks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    def of(way: str, *names: str) -> list[float]:
        return [sum(row[name] for name in names) for row in rows if row["way"] == way]

    def checked(name: str, values: list[float], **target: float) -> dict[str, Any]:
        mean = statistics.fmean(values)
        found = interval(values, 1) if len(values) > 1 else (mean, mean)
        return record.check(name, mean, found, **target)  # type: ignore[arg-type]

    def faster(*names: str) -> list[float]:
        pairs = zip(of(ONE_BY_ONE, *names), of(TOGETHER, *names), strict=True)
        return [slow / quick for slow, quick in pairs]

    def gain(name: str) -> list[float]:
        return [a - b for a, b in zip(of(TOGETHER, name), of(ONE_BY_ONE, name), strict=True)]

    return [
        checked("null-text, dB below the VAE", of(TOGETHER, "below_vae_db"), at_most=1.0),
        checked("DDIM alone, dB below the VAE", of("DDIM alone", "below_vae_db"), at_least=3.0),
        checked(
            "inversion, times faster", faster("textual_inversion_s", "null_text_inversion_s"), at_least=4.0
        ),
        checked("null-text alone, times faster", faster("null_text_inversion_s"), at_least=4.0),
        checked("generation, times faster", faster("image_s"), at_least=3.0),
        checked("PSNR gained, dB", gain("psnr"), at_least=0.0),
        checked("loss of textual inversion, added", gain("loss"), at_most=0.0),
    ]


class Clock:
    """Seconds of named parts of the work, the device's queue emptied before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def of(self, name: str, work: Callable[[], T]) -> T:
        self._wait()
        started = time.perf_counter()
        result = work()
        self._wait()
        self.seconds[name] = time.perf_counter() - started
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def stable_diffusion_size(device: torch.device, compiled: bool) -> Diffusion:
    """Random weights of Stable Diffusion 1.5's sizes: UNet of 860 M parameters, latents 4 x 64 x 64, 77 tokens."""
    tokenizer = words.build_tokenizer(["something"])
    tokenizer.model_max_length = 77
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if compiled:
        unet.compile_repeated_blocks(dynamic=True)
    frozen = [part.requires_grad_(False).eval() for part in (vae, unet, CLIPTextModel(config))]
    return Diffusion(
        vae=frozen[0].to(device, memory_format=torch.channels_last),
        unet=frozen[1].to(device, torch.bfloat16, memory_format=torch.channels_last),
        text_encoder=frozen[2].to(device),
        tokenizer=tokenizer,
        schedule=dict(architecture.scheduler().config),
        device=device,
        dtype=torch.bfloat16,
    )


def quick(recipe: Recipe) -> Recipe:
    """A few steps of the same."""
    return Recipe(
        recipe.textual.model_copy(update={"steps": 3, "batch_size": 4}),
        recipe.null_text.model_copy(update={"steps": 4, "inner_steps": 2}),
        shots=3,
        made=4,
    )


def _silent(step: int, total: int, **metrics: float) -> None:
    return None


def main() -> None:
    parser = command.parser(__doc__, NAME)
    command.add_data(parser)
    parser.add_argument("--checkpoint", type=Path, help="folder in diffusers' layout; else the embedded one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, default=10, help="images of a class")
    parser.add_argument("--made", type=int, default=32, help="images generated")
    parser.add_argument("--steps", type=int, help="steps of textual inversion; else the method's")
    parser.add_argument(
        "--stable-diffusion-size", action="store_true", help="random weights, CUDA; times only"
    )
    parser.add_argument("--compiled", action="store_true", help="compile the UNet's attention blocks")
    args = parser.parse_args()
    use_threads(args.threads)
    device = resolve_device(args.device)
    textual = TextualInversionParams()
    if args.steps is not None:
        textual = textual.model_copy(update={"steps": args.steps})
    recipe = Recipe(
        textual, NullTextInversionParams(mode="null_text", guidance=GUIDANCE), args.shots, args.made
    )
    seeds = list(range(1 if args.quick else args.seeds))
    if args.quick:
        recipe = quick(recipe)
    if args.stable_diffusion_size:
        if device.type != "cuda":
            print("skipped: --stable-diffusion-size needs a CUDA device")
            return
        model = stable_diffusion_size(device, args.compiled)
        rows = []
        for seed in seeds:
            supports = torch.rand(recipe.shots, 3, 512, 512, generator=generator(seed, NAME))
            rows += measure(model, supports, recipe, seed)
        timed = [check for check in checks(rows) if check["name"].endswith("faster")]
        record.write(f"{NAME}_sd15_size", rows=rows, checks=timed, seeds=seeds, quick=args.quick)
        return
    folder = args.checkpoint or generators.GENERATORS[generators.DEFAULT].folder
    if not (folder / "model_index.json").is_file():
        print(f"skipped: there is no checkpoint at {folder}; name one with --checkpoint")
        return
    if not command.has_data(args):
        return
    model = diffusion.load(folder, device, compiled=args.compiled)
    files = unpacked(args.data, args.work)
    rows = []
    for seed in seeds:
        members = (files.test_labels == seed % len(files.classes)).nonzero()[:, 0]
        chosen = members[torch.randperm(len(members), generator=generator(seed, NAME))][: recipe.shots]
        named = ((str(files.test[row]), files.test[row].read_bytes()) for row in chosen.tolist())
        supports = image_tensors.squares(named, model.resolution).float() / 255
        rows += measure(model, supports, recipe, seed)
    record.write(NAME, rows=rows, checks=checks(rows), seeds=seeds, quick=args.quick)


if __name__ == "__main__":
    main()
