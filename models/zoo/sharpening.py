"""A larger VAE for latents that are there: its decoder draws what the small one blurs, its encoder agrees with it.

The first VAE is small and quick, and it is the latents that UNet and text encoder learn. What it loses in detail can be
learnt back without them: errors of pixels alone make soft images, so features of a pretrained network and a
discriminator take part, as in Esser et al., arXiv:2012.09841, section 3.1, and Rombach et al., arXiv:2112.10752, G.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from models import teachers
from models.arrays import Images
from models.data import images as image_tensors
from models.pipeline import Checkpoints, Report
from models.runtime import generator, seed_weights
from models.teachers import TEACHERS
from models.teachers.protocol import Teacher
from models.training.checkpoint import History
from models.training.loop import Schedule, fit
from models.zoo import architecture, autoencoder
from models.zoo.architecture import Budget
from models.zoo.pictures import Pictures, draw

#: The network whose features are compared, the side in pixels at which it sees the images, and its stages.
EYE, SIDE, STAGES = "efficientnet_lite0", 64, 4
#: Weights beside the mean absolute error of pixels and the encoder's error.
_EDGES, _FEATURES, _ADVERSARIAL = 0.5, 0.3, 0.1
#: Share of the steps after which the discriminator has a say.
_ADVERSARIAL_FROM = 0.4
#: Most noise on the latents, as a share of their deviation: samples of a UNet are not quite right either.
_NOISE = 0.1
_WIDTH = 48


class Sharpener(nn.Module):
    """The larger VAE, and a discriminator that is dropped in the end: in one network, for one optimiser."""

    def __init__(self, vae: Any, discriminator: nn.Module) -> None:
        super().__init__()
        self.vae = vae
        self.discriminator = discriminator

    def forward(self, images: Images, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [N, C, 8, 8] of `images` [N, 3, 32, 32] in -1..1, and images of `latents` [N, C, 8, 8]."""
        return self.vae.encode(images).latent_dist.mode(), self.vae.decode(latents).sample

    def judge(self, images: Images, *, learn: bool) -> Tensor:
        """How real each place of `images` looks; the discriminator learns from it only where `learn` is set."""
        if learn:
            judged: Tensor = self.discriminator(images)
            return judged
        state = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        frozen: Tensor = functional_call(self.discriminator, state, (images,))
        return frozen


class Eye:
    """A pretrained convolutional network of the catalogue, frozen."""

    def __init__(self, device: torch.device) -> None:
        self._teacher: Teacher = teachers.load(TEACHERS[EYE], str(device), SIDE)
        self._teacher.network.requires_grad_(False)

    def __call__(self, images: Images) -> list[Tensor]:
        """Features of the first stages of images [N, 3, S, S] in -1..1."""
        seen = functional.interpolate(images, (SIDE, SIDE), mode="bilinear")
        ready = image_tensors.normalise(seen / 2 + 0.5, self._teacher.mean, self._teacher.std)
        network: Any = self._teacher.network
        current = network.bn1(network.conv_stem(ready.contiguous(memory_format=torch.channels_last)))
        found = []
        for stage in network.blocks[:STAGES]:
            current = stage(current)
            found.append(current)
        return found


def train(
    budget: Budget,
    pictures: Pictures,
    latents: Tensor,
    *,
    seed: int,
    device: torch.device,
    report: Report,
    checkpoints: Checkpoints,
) -> tuple[Any, History]:
    """The larger VAE and its training curve, from latents [2, N, C, 8, 8]: of the pictures, and of them mirrored."""
    seed_weights(seed, "weights", "sharp")
    vae = architecture.vae(replace(budget, vae_widths=budget.sharp_widths))
    network = Sharpener(vae, discriminator()).to(device).to(memory_format=torch.channels_last)
    eye = Eye(device)
    pixels = pictures.pixels.to(device)
    size = budget.sharp_batch_size

    def loss_at(step: int) -> Tensor:
        random = generator(seed, "sharp", step)
        _, rows = draw(pictures.counts, size, random)
        mirror = int(torch.randint(2, (1,), generator=random))
        noise = torch.randn(size, *latents.shape[2:], generator=random)
        noise = noise * torch.rand(size, 1, 1, 1, generator=random) * _NOISE
        images = autoencoder.to_input(pixels[rows.to(device)])
        images = images.flip(3) if mirror else images
        wanted = latents[mirror, rows].float()
        adversarial = _ADVERSARIAL * (step >= _ADVERSARIAL_FROM * budget.sharp_steps)
        return loss(network, eye, images, wanted.to(device), (wanted + noise).to(device), adversarial)

    schedule = Schedule(
        budget.sharp_steps, budget.sharp_lr, weight_decay=0.0, ema_decay=0.995, betas=(0.5, 0.99)
    )
    averaged, history = fit(network, loss_at, schedule, report, checkpoints)
    return averaged.vae, history


def loss(
    network: Sharpener, eye: Eye, images: Images, latents: Tensor, noisy: Tensor, adversarial: float
) -> Tensor:
    """Of images [N, 3, 32, 32] in -1..1, their `latents`, and those that they are decoded from, `noisy`.

    The encoder's squared error; the decoder's mean absolute error, that of the differences of neighbours, the
    unexplained share of the features, and the discriminator's opinion; the discriminator's hinge loss (Lim & Ye,
    arXiv:1705.02894).
    """
    encoded, decoded = network(images, noisy)
    error = images - decoded.float()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    with torch.no_grad():
        wanted = eye(images)
    features = torch.stack(
        [
            functional.mse_loss(seen.float(), real.float()) / real.float().var()
            for seen, real in zip(eye(decoded), wanted, strict=True)
        ]
    ).mean()
    whole: Tensor = (
        functional.mse_loss(encoded.float(), latents)
        + error.abs().mean()
        + _EDGES * edges
        + _FEATURES * features
    )
    if adversarial:
        whole = whole - adversarial * network.judge(decoded, learn=False).float().mean()
    real, made = (network.judge(each, learn=True).float() for each in (images, decoded.detach()))
    return whole + functional.relu(1 - real).mean() + functional.relu(1 + made).mean()


def discriminator() -> nn.Module:
    """Judges patches (Isola et al., arXiv:1611.07004, section 3.2.2): [N, 3, 32, 32] -> [N, 1, 8, 8]."""
    sizes = (
        (3, _WIDTH, 3, 1),
        (_WIDTH, _WIDTH, 4, 2),
        (_WIDTH, 2 * _WIDTH, 4, 2),
        (2 * _WIDTH, 2 * _WIDTH, 3, 1),
    )
    layers: list[nn.Module] = []
    for channels, out, kernel, stride in sizes:
        layers += [spectral_norm(nn.Conv2d(channels, out, kernel, stride, padding=1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(2 * _WIDTH, 1, 1)))
