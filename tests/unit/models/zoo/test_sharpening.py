"""The larger VAE: it learns to write and to draw latents that another one made."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.runtime import generator
from models.training.loop import NoCheckpoints
from models.zoo import sharpening
from models.zoo.pictures import Pictures
from models.zoo.sharpening import Eye, Sharpener
from models.zoo.train_generator import BUDGETS

BUDGET = replace(BUDGETS["toy"], sharp_steps=100, sharp_batch_size=8, sharp_lr=6e-3)


def mosaics() -> tuple[Pictures, torch.Tensor]:
    """Images of 8 x 8 coloured tiles, and latents that say which: a channel for each of red, green and blue."""
    tiles = torch.randint(0, 256, (32, 3, 8, 8), generator=generator(0, "tiles"))
    pixels = tiles.repeat_interleave(4, 2).repeat_interleave(4, 3).to(torch.uint8)
    latents = torch.zeros(2, 32, BUDGET.latent_channels, 8, 8)
    latents[0, :, :3], latents[1, :, :3] = (each.float() / 127.5 - 1 for each in (tiles, tiles.flip(3)))
    return Pictures(pixels, torch.tensor([32]), ("mosaic",)), latents.half()


def test_encoder_and_decoder_learn_the_latents_that_are_given() -> None:
    pictures, latents = mosaics()
    losses: list[float] = []
    vae, history = sharpening.train(
        BUDGET,
        pictures,
        latents,
        seed=0,
        device=torch.device("cpu"),
        report=lambda step, total, **metrics: losses.append(metrics["loss"]),
        checkpoints=NoCheckpoints(),
    )
    assert vae.config.block_out_channels == BUDGET.sharp_widths
    assert [entry["loss"] for entry in history] == losses
    images = pictures.pixels.float() / 127.5 - 1
    with torch.no_grad():
        encoded, decoded = vae.encode(images).latent_dist.mode(), vae.decode(latents[0].float()).sample
    assert (encoded - latents[0]).square().mean() < 0.5 * latents[0].float().square().mean()
    assert (decoded - images).square().mean() < 0.5 * images.square().mean()


def test_the_decoders_loss_moves_the_discriminator_only_through_its_own_part() -> None:
    """Without hinge losses, a frozen judgement gives the images a gradient and the discriminator none."""
    network = Sharpener(torch.nn.Identity(), sharpening.discriminator())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    network.judge(images, learn=False).mean().backward()
    assert images.grad is not None
    assert bool(images.grad.abs().sum() > 0)
    assert all(value.grad is None for value in network.discriminator.parameters())
    network.judge(images, learn=True).mean().backward()
    assert all(value.grad is not None for value in network.discriminator.parameters())


def test_the_eye_sees_stages_of_falling_size_and_learns_nothing() -> None:
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    eye = Eye(torch.device("cpu"))
    features = eye(images)
    sides = [stage.shape[-1] for stage in features]
    assert len(features) == sharpening.STAGES
    assert sides == sorted(sides, reverse=True)
    features[-1].mean().backward()
    assert images.grad is not None
    assert bool(images.grad.abs().sum() > 0)
    assert all(value.grad is None for value in eye._teacher.network.parameters())
