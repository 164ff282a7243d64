"""The embedded generator's VAE: trained on its own, before anything else (Rombach et al., arXiv:2112.10752, 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.arrays import Images, Pixels
from models.generators.diffusion import psnr
from models.pipeline import Checkpoints, Report
from models.runtime import generator, seed_weights, training_autocast
from models.training.checkpoint import History
from models.training.loop import Schedule, fit
from models.zoo import architecture
from models.zoo.architecture import Budget
from models.zoo.pictures import Pictures, draw

#: Weight of the divergence, a mean over latents, beside errors that are means over pixels: enough that noise of a few
#: per cent of a latent's deviation pays, so that latents are smooth and no detail is lost.
_DIVERGENCE = 3e-3
_EDGES = 1.0
_BATCH = 512


def train(
    budget: Budget,
    pictures: Pictures,
    *,
    seed: int,
    device: torch.device,
    report: Report,
    checkpoints: Checkpoints,
) -> tuple[Any, History]:
    """A trained VAE whose latents have mean 0 and deviation 1 in each channel, and its training curve."""
    seed_weights(seed, "weights", "vae")
    vae = architecture.vae(budget).to(device, memory_format=torch.channels_last)
    pixels = pictures.pixels.to(device)
    whole = _Reconstruction(vae)
    forward = torch.compile(whole) if device.type == "cuda" else whole

    def loss_at(step: int) -> Tensor:
        random = generator(seed, "vae", step)
        _, rows = draw(pictures.counts, budget.vae_batch_size, random)
        flips = torch.rand(budget.vae_batch_size, generator=random) < 0.5
        noise = torch.randn(
            budget.vae_batch_size, budget.latent_channels, *[architecture.LATENT_SIDE] * 2, generator=random
        )
        images = to_input(pixels[rows.to(device)])
        images = torch.where(flips.to(device).view(-1, 1, 1, 1), images.flip(3), images)
        decoded, mean, log_variance = forward(images, noise.to(device))
        return loss(images, decoded.float(), mean.float(), log_variance.float())

    schedule = Schedule(budget.vae_steps, budget.vae_lr, weight_decay=0.0, ema_decay=0.999)
    averaged, history = fit(whole, loss_at, schedule, report, checkpoints)
    trained: Any = averaged.vae
    standardise(trained, pixels)
    return trained, history


class _Reconstruction(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded images, and mean and log-variance of the code, of images [N, 3, S, S] in -1..1."""
        code = self.vae.encode(images).latent_dist
        latents = code.mean + noise * code.std
        return self.vae.decode(latents).sample, code.mean, code.logvar


def loss(images: Tensor, decoded: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Mean absolute error of pixels and of the differences of neighbours, and the divergence from N(0, I).

    Neighbours: Mathieu et al., arXiv:1511.05440, equation 6 without the inner absolute values; it keeps edges sharp.
    Divergence: Kingma & Welling, arXiv:1312.6114, appendix B, as a mean over latents.
    """
    error = images - decoded
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error.abs().mean() + _EDGES * edges + _DIVERGENCE * divergence


@torch.no_grad()
def standardise(vae: Any, pixels: Pixels) -> None:
    """Give each channel of the latents of `pixels` mean 0 and deviation 1, images unchanged.

    The shift and the scale go into the 1 x 1 convolutions on both sides of the code; no scaling factor is needed.
    """
    latents = encode(vae, pixels)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    before, after = vae.quant_conv, vae.post_quant_conv
    after.bias += after.weight.flatten(1) @ mean
    after.weight *= deviation.view(1, -1, 1, 1)
    before.weight[:channels] /= deviation.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / deviation
    before.bias[channels:] -= 2 * deviation.log()


@torch.no_grad()
def encode(vae: Any, pixels: Pixels, *, flipped: bool = False) -> Tensor:
    """Latents float32 [N, C, 8, 8], the mode of the code, of uint8 [N, 3, 32, 32] on the VAE's device."""
    parts = []
    for some in torch.split(pixels, _BATCH):
        images = to_input(some.to(vae.device))
        with training_autocast(vae.device):
            parts.append(vae.encode(images.flip(3) if flipped else images).latent_dist.mode().float())
    return torch.cat(parts)


@torch.no_grad()
def round_trip_psnr(vae: Any, pixels: Pixels) -> float:
    """Mean PSNR in dB of images [N, 3, 32, 32] after encoding and decoding."""
    values = []
    for some in torch.split(pixels, _BATCH):
        decoded: Images = vae.decode(encode(vae, some)).sample / 2 + 0.5
        values.append(psnr(decoded.clamp(0, 1), some.to(vae.device).float() / 255))
    return float(torch.cat(values).mean())


def to_input(pixels: Pixels) -> Tensor:
    """float32 in -1..1 from uint8 [N, 3, S, S]."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
