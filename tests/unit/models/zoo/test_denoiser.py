"""What the UNet and the text encoder are shown."""

from __future__ import annotations

import torch
from diffusers.training_utils import compute_snr

from models.zoo import architecture, denoiser
from models.zoo.words import Prompts

CLASSES = ("cat", "dog", "fire_truck")


def test_most_prompts_name_the_class_a_tenth_a_neutral_word_and_a_tenth_nothing() -> None:
    prompts = Prompts.of(CLASSES)
    labels = torch.arange(3).repeat(4000)
    shown = denoiser.draw_prompts(prompts, labels, torch.Generator().manual_seed(0))
    texts = [prompts.texts[place] for place in shown]
    names = ["cat", "dog", "fire truck"]
    named = sum(text.endswith(names[label]) for text, label in zip(texts, labels.tolist(), strict=True))
    empty = texts.count("")
    assert abs(empty / len(texts) - 0.1) < 0.01
    assert abs(named / len(texts) - 0.8) < 0.015
    assert set(texts) == set(prompts.texts)
    others = len(texts) - empty - named
    assert abs(others / len(texts) - 0.1) < 0.01  # none names another class: all the rest are neutral
    assert (
        sum(text.split()[-1] in ("object", "thing", "something", "item") for text in texts if text) == others
    )


def test_the_timesteps_of_a_batch_are_spread_evenly_over_all() -> None:
    times = denoiser.draw_times(100, 1000, torch.Generator().manual_seed(3))
    assert sorted((times // 10).tolist()) == list(range(100))
    again = denoiser.draw_times(100, 1000, torch.Generator().manual_seed(4))
    assert not torch.equal(times, again)


def test_the_weights_are_min_snr_as_diffusers_computes_it() -> None:
    scheduler = architecture.scheduler()
    snr = compute_snr(scheduler, torch.arange(1000))
    expected = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
    torch.testing.assert_close(denoiser.snr_weights(scheduler.alphas_cumprod), expected, rtol=1e-3, atol=1e-6)
