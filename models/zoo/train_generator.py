"""Train the embedded generator: a small text-to-image latent diffusion model in Stable Diffusion's format.

    python -m models.zoo.train_generator --data cifar10/train --out models/zoo/generator --work .dram/generator

`--data` is a folder of class folders whose names are the words of the prompts; it may be given several times. First a
small VAE is trained, which makes the latents; then a larger one that draws them sharply and is published in its place;
then UNet and text encoder together. The state lies in `--work`: a run that was stopped goes on from
there when the same command is given again. `--minutes` stops by itself, with a checkpoint and exit status 75.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import runtime
from models.generators import diffusion
from models.pipeline import digest
from models.zoo import architecture, autoencoder, command, denoiser, pictures, release, sharpening
from models.zoo.architecture import Budget
from models.zoo.command import Pausing
from models.zoo.pictures import Pictures
from models.zoo.words import build_tokenizer

BUDGETS = {
    # Two CPU cores for an hour and a quarter; most of the computing at 4 x 4. What comes with Dram is of this budget.
    "cpu": Budget(
        widths=(64, 192),
        attention=(False, True),
        layers=1,
        vae_widths=(16, 32, 64),
        steps=7_500,
        batch_size=64,
        vae_steps=3_000,
        vae_batch_size=64,
        sharp_widths=(32, 64, 96),
        sharp_steps=1_600,
        sharp_batch_size=48,
    ),
    # One large GPU for half an hour; as many parameters as 40 MB hold.
    "gpu": Budget(
        widths=(96, 224),
        attention=(False, True),
        layers=2,
        vae_widths=(32, 64, 96),
        steps=20_000,
        batch_size=1024,
        vae_steps=8_000,
        vae_batch_size=256,
        sharp_widths=(64, 96, 128),
        sharp_steps=8_000,
        sharp_batch_size=256,
    ),
    # Seconds, to try the command; its images show nothing.
    "toy": Budget(
        widths=(16, 32),
        attention=(False, True),
        layers=1,
        vae_widths=(16, 16, 16),
        steps=20,
        batch_size=16,
        vae_steps=20,
        vae_batch_size=16,
        sharp_widths=(16, 16, 16),
        sharp_steps=10,
        sharp_batch_size=8,
        text_width=32,
        text_layers=1,
        lr=4e-3,
        vae_lr=6e-3,
        sharp_lr=6e-3,
    ),
}
_LICENCE = "apache-2.0"
_SAMPLES_EACH = 10
_PSNR_IMAGES = 1000


def train(
    data: Sequence[Path],
    out: Path,
    work: Path,
    budget: Budget,
    *,
    seed: int = 0,
    device: str = "auto",
    deadline: float = float("inf"),
    say: Callable[[str], None] = print,
) -> None:
    """Train all parts and write them to `out`, with `samples.png` and the model card `README.md`.

    `work` holds checkpoints, and VAEs that are ready, by what they depend on: another length of the second training
    takes the VAEs that are there. Raises `command.PausedError` at `deadline` (monotonic seconds), `DataError` where the
    images cannot be used.
    """
    place = runtime.resolve_device(device)
    shown = pictures.read(data, architecture.RESOLUTION)
    tokenizer = build_tokenizer(shown.classes)
    vae_run = _vae_run(shown, budget, seed)
    sharp_run = digest({"vae": vae_run, **_settings(budget, "sharp_")})
    others = {name: value for name, value in asdict(budget).items() if not name.startswith("sharp_")}
    run = digest(
        {
            "vae": vae_run,
            "budget": others,
            "classes": dict(zip(shown.classes, shown.counts.tolist(), strict=True)),
        }
    )
    say(f"{len(shown.pixels):,} images in {len(shown.classes)} classes, on {place}")
    latents = _latents(shown, work / f"vae-{digest(vae_run)[:16]}", budget, seed, place, deadline, say)
    vae, _ = sharpening.train(
        budget,
        shown,
        latents,
        seed=seed,
        device=place,
        report=command.reporter("larger VAE", say),
        checkpoints=Pausing(work / f"sharp-{sharp_run[:16]}", deadline=deadline),
    )
    network, history = denoiser.train(
        budget,
        latents,
        shown.counts,
        shown.classes,
        tokenizer,
        seed=seed,
        device=place,
        report=command.reporter("UNet and text encoder", say),
        checkpoints=Pausing(work / f"denoiser-{run[:16]}", deadline=deadline),
    )
    parts = {"vae": vae, "unet": network.unet, "text_encoder": network.text_encoder}
    quality = autoencoder.round_trip_psnr(vae, _some(shown.pixels, _PSNR_IMAGES, seed))
    training = {
        "latents": f"{budget.vae_steps:,} steps of {budget.vae_batch_size} images, by a small VAE that is dropped",
        "VAE": f"{budget.sharp_steps:,} steps of {budget.sharp_batch_size} images on those latents, with features of "
        f"{sharpening.EYE} and a discriminator; {quality:.1f} dB PSNR on images it was trained on",
        "UNet and text encoder": f"{budget.steps:,} steps of {budget.batch_size} images; "
        f"weighted squared error {command.recent_loss(history):.4f} at the end",
    }
    sizes = {name: architecture.parameters(part) for name, part in parts.items()}
    release.write_checkpoint(out, vae, network.unet, network.text_encoder, tokenizer)
    (out / "README.md").write_text(release.model_card(shown, data, sizes, training, _LICENCE))
    loaded = diffusion.load(out, place)  # what everyone will use: the samples are of the written weights
    release.sample_page(loaded, shown.classes, _SAMPLES_EACH, seed).save(out / "samples.png", optimize=True)
    say(f"written to {out}")


def _latents(
    shown: Pictures,
    folder: Path,
    budget: Budget,
    seed: int,
    device: torch.device,
    deadline: float,
    say: Callable[[str], None],
) -> Tensor:
    """The small VAE's latents float16 [2, N, C, 8, 8] of all images and of them mirrored."""
    ready = folder / "ready.safetensors"
    if ready.is_file():
        found: Tensor = load_file(ready)["latents"]
        return found
    vae, _ = autoencoder.train(
        budget,
        shown,
        seed=seed,
        device=device,
        report=command.reporter("small VAE", say),
        checkpoints=Pausing(folder / "checkpoints", deadline=deadline),
    )
    latents = torch.stack([autoencoder.encode(vae, shown.pixels, flipped=mirror) for mirror in (False, True)])
    latents = latents.half().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents}, ready.with_suffix(".writing"))
    ready.with_suffix(".writing").rename(ready)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return latents


def _vae_run(shown: Pictures, budget: Budget, seed: int) -> dict[str, Any]:
    """All that the small VAE's weights depend on."""
    settings = _settings(budget, "vae_")
    settings |= {"latent_channels": budget.latent_channels, "groups": budget.groups, "seed": seed}
    return settings | {"pixels": shown.digest()}


def _settings(budget: Budget, prefix: str) -> dict[str, Any]:
    return {name: value for name, value in asdict(budget).items() if name.startswith(prefix)}


def _some(pixels: Tensor, count: int, seed: int) -> Tensor:
    return pixels[torch.randperm(len(pixels), generator=runtime.generator(seed, "some"))[:count]]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = command.parser(__doc__, BUDGETS, "UNet and text encoder")
    parser.add_argument("--vae-steps", type=int, help="of the small VAE, in place of the budget's")
    parser.add_argument("--sharp-steps", type=int, help="of the larger VAE, in place of the budget's")
    given = parser.parse_args(arguments)
    return command.run(
        given,
        BUDGETS,
        lambda budget, work, deadline: train(
            given.data,
            given.out,
            work,
            budget,
            seed=given.seed,
            device=given.device,
            deadline=deadline,
            say=command.say,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
