"""The parts of the embedded generator, untrained, and how large they are for which budget of computing time.

All parts are diffusers' and transformers' own classes: the result is a checkpoint in Stable Diffusion's format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from models.zoo.words import CONTEXT

#: Side in pixels of its images, and of their latents: the VAE halves it twice.
RESOLUTION, LATENT_SIDE = 32, 8
_HEADS = 4


@dataclass(frozen=True)
class Budget:
    """Sizes and lengths of training. `widths` and `attention` go from the 8 x 8 latents down, halving the side.

    `vae_...`: of the VAE that makes the latents; `sharp_...`: of the larger one that is published in its place.
    """

    widths: tuple[int, ...]
    attention: tuple[bool, ...]  # whether a level reads the prompt
    layers: int
    vae_widths: tuple[int, int, int]
    steps: int
    batch_size: int
    vae_steps: int
    vae_batch_size: int
    sharp_widths: tuple[int, int, int]
    sharp_steps: int
    sharp_batch_size: int
    lr: float = 1e-3
    vae_lr: float = 2e-3
    sharp_lr: float = 1.5e-3
    latent_channels: int = 6
    text_width: int = 128
    text_layers: int = 2
    groups: int = 8  # of the normalisation


def vae(budget: Budget) -> Any:
    """diffusers' `AutoencoderKL`: images [N, 3, 32, 32] in -1..1, latents [N, C, 8, 8]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=budget.vae_widths,
        layers_per_block=1,
        latent_channels=budget.latent_channels,
        norm_num_groups=budget.groups,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # `autoencoder.standardise` makes it so
    )


def unet(budget: Budget) -> Any:
    """diffusers' `UNet2DConditionModel`, which reads the prompt by cross-attention where that is cheap."""
    down = ["CrossAttnDownBlock2D" if reads else "DownBlock2D" for reads in budget.attention]
    up = ["CrossAttnUpBlock2D" if reads else "UpBlock2D" for reads in reversed(budget.attention)]
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=budget.latent_channels,
        out_channels=budget.latent_channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=budget.widths,
        layers_per_block=budget.layers,
        norm_num_groups=budget.groups,
        attention_head_dim=_HEADS,  # the number of heads, whatever its name says
        cross_attention_dim=budget.text_width,
    )


def text_encoder(budget: Budget, tokenizer: Any) -> Any:
    """transformers' `CLIPTextModel` over the tokenizer's words."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=budget.text_width,
            intermediate_size=4 * budget.text_width,
            num_hidden_layers=budget.text_layers,
            num_attention_heads=_HEADS,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def scheduler() -> Any:
    """The noise schedule, with the velocity as what the UNet predicts (Salimans & Ho, arXiv:2202.00512).

    Stable Diffusion's square-root-linear betas, up to 0.02 instead of 0.012: at the last timestep 1.6 % of the image is
    left in place of 6.8 %. Samples start there from pure noise and are too grey where much is left (Lin et al.,
    arXiv:2305.08891); nothing left at all would make DDIM inversion divide by zero.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def parameters(*parts: Any) -> int:
    """Learned numbers of all parts."""
    return sum(value.numel() for part in parts for value in part.parameters())
