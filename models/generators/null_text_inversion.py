"""Null-text inversion: noise and null embeddings from which guided sampling gives an image back.

Source: Mokady et al., "Null-text inversion", arXiv:2211.09794, algorithm 1; the fast option is negative-prompt
inversion, Miyake et al., arXiv:2305.16807.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from models.arrays import Images
from models.generators.diffusion import Diffusion
from models.pipeline import Report

if TYPE_CHECKING:
    from models.methods.tint import NullTextInversionParams


@dataclass(frozen=True)
class Inversions:
    """Of K images: `noise` float32 [K, C, h, w] (z_T), `unconditional` float32 [K, R, L, D] (null embeddings, noisiest
    step first; R = steps, or 1 of negative-prompt inversion), `psnr` and `vae_psnr` float32 [K] in dB: the
    reconstruction and the VAE's own round trip, both against the image at the model's resolution.
    """

    noise: Tensor
    unconditional: Tensor
    psnr: Tensor
    vae_psnr: Tensor


def invert(
    diffusion: Diffusion,
    supports: Images,
    conditions: Tensor,
    params: NullTextInversionParams,
    *,
    report: Report,
) -> Inversions:
    """Invert images [K, 3, H, W], of one class or many, each under its own `conditions` [K, L, D].

    Reads of `params`: mode ("null_text" or "negative_prompt"), steps, guidance, inner_steps, lr, tolerance, batch_size.
    """
    raise NotImplementedError
