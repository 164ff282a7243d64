"""A tiny latent diffusion model in Stable Diffusion's format: random, or briefly trained on coloured shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

SIDE, CONTEXT, WIDTH = 16, 12, 16
COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.1, 0.2, 0.9)}
WORDS = ("a", "photo", "of", "the", "object", *COLOURS)

Prediction = Literal["epsilon", "v_prediction"]


def write(
    folder: Path,
    *,
    prediction: Prediction = "epsilon",
    vae: Literal["kl", "tiny"] = "kl",
    dtype: torch.dtype = torch.float32,
    steps: int = 0,
    **schedule: Any,
) -> Path:
    """Write the checkpoint into `folder`, trained for `steps` steps of its VAE and as many of its UNet."""
    torch.manual_seed(0)
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        set_alpha_to_one=False,
        steps_offset=1,
        **schedule,
    )
    autoencoder = _autoencoder(vae)
    if steps:
        _train(autoencoder, unet, text_encoder, words, scheduler, steps)
    (folder / "model_index.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    unet.to(dtype).save_pretrained(folder / "unet")
    autoencoder.to(dtype).save_pretrained(folder / "vae")
    text_encoder.to(dtype).save_pretrained(folder / "text_encoder")
    words.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; marks of beginning, end, padding and unknown words."""
    marks = ("<start>", "<end>", "<pad>", "<unknown>")
    vocabulary = {word: index for index, word in enumerate((*marks, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unknown>",
        model_max_length=CONTEXT,
    )


def squares(colour: str, count: int, seed: int = 0, side: int = SIDE) -> Tensor:
    """Images [count, 3, side, side] in 0..1: a square of `colour` somewhere on grey."""
    random = torch.Generator().manual_seed(seed)
    images = torch.full((count, 3, side, side), 0.5)
    images += 0.03 * torch.randn(count, 1, 1, 1, generator=random)
    for image in images:
        left, top = torch.randint(0, side // 2, (2,), generator=random).tolist()
        image[:, top : top + side // 2, left : left + side // 2] = torch.tensor(COLOURS[colour]).view(3, 1, 1)
    return images


def _autoencoder(kind: str) -> Any:
    if kind == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIDE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def _train(vae: Any, unet: Any, text_encoder: Any, words: Any, scheduler: Any, steps: int) -> None:
    """First the auto-encoder on its own error, then UNet and text encoder together on noise prediction."""
    names = list(COLOURS)
    images = torch.cat([squares(name, 64, seed) for seed, name in enumerate(names)])
    prompts = [f"a photo of a {name}" for name in names for _ in range(64)]
    prompts[::8] = [""] * len(prompts[::8])
    ids = words(prompts, padding="max_length", return_tensors="pt").input_ids
    optimiser = torch.optim.Adam(vae.parameters(), 3e-3)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (32,))] * 2 - 1
        code = vae.encode(batch).latent_dist.mode()
        loss = (
            functional.mse_loss(vae.decode(code).sample, batch) + 1e-2 * (code.square().mean() - 1).square()
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        latents = vae.encode(images * 2 - 1).latent_dist.mode()
    optimiser = torch.optim.Adam([*unet.parameters(), *text_encoder.parameters()], 3e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (32,))
        noise, times = torch.randn(32, *latents.shape[1:]), torch.randint(0, 1000, (32,))
        noisy = scheduler.add_noise(latents[rows], noise, times)
        wanted = noise
        if scheduler.config.prediction_type == "v_prediction":
            wanted = scheduler.get_velocity(latents[rows], noise, times)
        conditions = text_encoder(ids[rows]).last_hidden_state
        loss = functional.mse_loss(unet(noisy, times, conditions).sample, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
