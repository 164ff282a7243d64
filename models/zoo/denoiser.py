"""The embedded generator's UNet and text encoder, trained together on the latents of the images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from models.pipeline import Checkpoints, Report
from models.runtime import generator, seed_weights
from models.training.checkpoint import History
from models.training.loop import Schedule, fit
from models.zoo import architecture
from models.zoo.architecture import Budget
from models.zoo.pictures import draw
from models.zoo.words import CONTEXT, Prompts

#: Shares of images that are shown without a prompt (Ho & Salimans, arXiv:2207.12598), and with a neutral word.
_EMPTY, _NEUTRAL = 0.1, 0.1
#: Signal-to-noise ratio from which a timestep counts no more (Hang et al., arXiv:2303.09556).
_MOST_SNR = 5.0


class Denoiser(nn.Module):
    """UNet and text encoder as one network, so that one optimiser trains both."""

    def __init__(self, unet: Any, text_encoder: Any) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, latents: Tensor, times: Tensor, ids: Tensor, prompts: Tensor) -> Tensor:
        """The velocity [N, C, 8, 8] at `times` [N]; `ids` [P, L] are different prompts, `prompts` [N] whose each is."""
        conditions = self.text_encoder(ids).last_hidden_state[prompts]
        velocity: Tensor = self.unet(latents, times, conditions).sample
        return velocity


def build(budget: Budget, tokenizer: Any, seed: int) -> Denoiser:
    """A new network, its weights drawn from `seed`."""
    seed_weights(seed, "weights", "denoiser")
    return Denoiser(architecture.unet(budget), architecture.text_encoder(budget, tokenizer))


def train(
    budget: Budget,
    latents: Tensor,
    counts: Tensor,
    classes: tuple[str, ...],
    tokenizer: Any,
    *,
    seed: int,
    device: torch.device,
    report: Report,
    checkpoints: Checkpoints,
) -> tuple[Denoiser, History]:
    """The averaged network and its training curve, from latents [2, N, C, 8, 8]: of the images, and of them mirrored.

    `counts` [K] says how many of the N are of each class, class after class.
    """
    network = build(budget, tokenizer, seed).to(device).to(memory_format=torch.channels_last)
    if device.type == "cpu":  # fused attention's backward pass takes three times as long there on few tokens
        network.unet.set_attn_processor(AttnProcessor())
    forward = torch.compile(network) if device.type == "cuda" else network
    prompts = Prompts.of(classes)
    ids = tokenizer(
        list(prompts.texts), padding="max_length", max_length=CONTEXT, return_tensors="pt"
    ).input_ids.to(device)
    scheduler = architecture.scheduler()
    weights = snr_weights(scheduler.alphas_cumprod).to(device)
    known = latents.to(device)

    def loss_at(step: int) -> Tensor:
        random = generator(seed, "denoiser", step)
        labels, rows = draw(counts, budget.batch_size, random)
        mirrored = torch.randint(2, (budget.batch_size,), generator=random)
        shown = draw_prompts(prompts, labels, random).to(device)
        times = draw_times(budget.batch_size, len(weights), random).to(device)
        noise = torch.randn(budget.batch_size, *known.shape[2:], generator=random).to(device)
        clean = known[mirrored.to(device), rows.to(device)].float()
        noisy = scheduler.add_noise(clean, noise, times).contiguous(memory_format=torch.channels_last)
        error = forward(noisy, times, ids, shown).float() - scheduler.get_velocity(clean, noise, times)
        loss: Tensor = (weights[times] * error.square().mean((1, 2, 3))).mean()
        return loss

    schedule = Schedule(budget.steps, budget.lr, weight_decay=0.01, ema_decay=0.999)
    averaged, history = fit(network, loss_at, schedule, report, checkpoints)
    assert isinstance(averaged, Denoiser)
    return averaged, history


def draw_prompts(prompts: Prompts, labels: Tensor, random: torch.Generator) -> Tensor:
    """For each image [N] of the classes `labels` the place of its prompt in `prompts.texts`.

    Mostly one of its class; sometimes one with a neutral word, which so comes to mean an image of any class; sometimes
    the empty one.
    """
    chance = torch.rand(len(labels), generator=random)
    named = prompts.first_of(0) + labels * prompts.each
    named = named + torch.randint(prompts.each, labels.shape, generator=random)
    neutral = 1 + torch.randint(prompts.neutral, labels.shape, generator=random)
    chosen = torch.where(chance < _EMPTY + _NEUTRAL, neutral, named)
    return torch.where(chance < _EMPTY, 0, chosen)


def draw_times(count: int, timesteps: int, random: torch.Generator) -> Tensor:
    """Timesteps int64 [count], spread evenly from a random start (Kingma et al., arXiv:2107.00630, appendix I.1)."""
    start = torch.rand(1, generator=random, dtype=torch.float64)
    spread = (start + torch.arange(count, dtype=torch.float64) / count) % 1
    return (spread * timesteps).long()


def snr_weights(kept: Tensor) -> Tensor:
    """Weight [T] of the squared error of the velocity at each timestep; `kept` [T] is the product of the alphas.

    min(SNR, 5) / (SNR + 1) (Hang et al., arXiv:2303.09556, section 3.4), SNR = kept / (1 - kept).
    """
    snr = kept / (1 - kept)
    return snr.clamp(max=_MOST_SNR) / (snr + 1)
