"""The sizes of the embedded generator, and its noise schedule."""

from __future__ import annotations

import pytest
import torch

from models.zoo import architecture
from models.zoo.train_generator import BUDGETS
from models.zoo.words import build_tokenizer

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_weights_of_a_real_budget_fit_into_40_mb_as_float16(name: str) -> None:
    budget, tokenizer = BUDGETS[name], build_tokenizer(CIFAR10)
    with torch.device("meta"):
        unet = architecture.unet(budget)
        rest = architecture.vae(budget), architecture.text_encoder(budget, tokenizer)
    assert 5e6 <= architecture.parameters(unet) <= 20e6
    assert 2 * architecture.parameters(unet, *rest) < 39.8e6  # some room for names, words and settings


def test_almost_nothing_of_an_image_is_left_at_the_last_timestep_but_not_nothing() -> None:
    last = architecture.scheduler().alphas_cumprod[-1].sqrt()
    assert 0.001 < last < 0.02


def test_the_prompt_reaches_the_denoiser_only_through_cross_attention() -> None:
    budget = BUDGETS["toy"]
    torch.manual_seed(0)
    unet = architecture.unet(budget).eval()
    latents, times = torch.randn(2, budget.latent_channels, 8, 8), torch.tensor([500, 500])
    one, other = torch.randn(2, 2, 16, budget.text_width).unbind(0)
    with torch.no_grad():
        assert not torch.allclose(unet(latents, times, one).sample, unet(latents, times, other).sample)
        assert unet(latents, times, one).sample.shape == latents.shape
