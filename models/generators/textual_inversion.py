"""Textual inversion: new words for the text encoder, learned from a few images of a class.

Source: Gal et al., "An image is worth one word", arXiv:2208.01618, equation 2; timesteps as in Landolsi & Kahl,
arXiv:2406.03146: those of little noise carry artefacts of upsampling, not content, and are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from models.arrays import Images
from models.generators.diffusion import Diffusion
from models.pipeline import Checkpoints, Report

if TYPE_CHECKING:
    from models.methods.tint import TextualInversionParams


def learn_tokens(
    diffusion: Diffusion,
    supports: Images,
    params: TextualInversionParams,
    *,
    seed: int,
    report: Report,
    word: str | None = None,
    checkpoints: Checkpoints | None = None,
) -> Tensor:
    """Token embeddings float32 [vectors, width] under which the frozen model makes images like `supports` [K, 3, H, W].

    They start from `word` (None: `params.initial`), see `Diffusion.rows_of`. Reads of `params`: template, vectors,
    initial, steps, batch_size, lr, warmup, first_timestep, patience.
    """
    raise NotImplementedError


def learn_adapter(
    diffusion: Diffusion,
    supports: Images,
    tokens: Tensor,
    params: TextualInversionParams,
    *,
    seed: int,
    report: Report,
    checkpoints: Checkpoints | None = None,
) -> dict[str, Tensor]:
    """The second mode: low-rank changes of the UNet's attention (LoRA), by name, learned under `tokens`.

    Reads of `params` also: lora_rank.
    """
    raise NotImplementedError
