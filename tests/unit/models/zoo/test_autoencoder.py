"""The VAE's loss, and the standard form of its latents."""

from __future__ import annotations

import copy

import torch
from torch.distributions import Normal, kl_divergence

from models.zoo import architecture, autoencoder
from models.zoo.train_generator import BUDGETS


def test_standardised_latents_have_mean_0_and_deviation_1_and_the_images_stay_the_same() -> None:
    torch.manual_seed(0)
    vae = architecture.vae(BUDGETS["toy"]).eval()
    pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    before = copy.deepcopy(vae)
    autoencoder.standardise(vae, pixels)
    latents = autoencoder.encode(vae, pixels)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(6), atol=1e-4, rtol=0)
    with torch.no_grad():
        images = autoencoder.to_input(pixels)
        code, code_before = vae.encode(images).latent_dist, before.encode(images).latent_dist
        decoded, decoded_before = vae.decode(code.mean).sample, before.decode(code_before.mean).sample
        torch.testing.assert_close(decoded, decoded_before, atol=1e-4, rtol=1e-4)
        noise = torch.randn_like(code.mean)
        torch.testing.assert_close(
            vae.decode(code.mean + noise * code.std).sample,
            before.decode(code_before.mean + noise * code_before.std).sample,
            atol=1e-3,
            rtol=1e-3,
        )


def test_the_loss_is_the_errors_of_pixels_and_edges_and_the_divergence_that_torch_computes() -> None:
    torch.manual_seed(0)
    images, decoded = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    mean, log_variance = torch.randn(2, 6, 2, 2), torch.randn(2, 6, 2, 2)
    divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean()
    across = (images[..., 1:] - images[..., :-1]) - (decoded[..., 1:] - decoded[..., :-1])
    down = (images[:, :, 1:] - images[:, :, :-1]) - (decoded[:, :, 1:] - decoded[:, :, :-1])
    expected = (images - decoded).abs().mean() + across.abs().mean() + down.abs().mean() + 3e-3 * divergence
    torch.testing.assert_close(autoencoder.loss(images, decoded, mean, log_variance), expected)


def test_flipped_latents_are_those_of_the_mirrored_images() -> None:
    torch.manual_seed(0)
    vae = architecture.vae(BUDGETS["toy"]).eval()
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(
        autoencoder.encode(vae, pixels, flipped=True), autoencoder.encode(vae, pixels.flip(3))
    )
