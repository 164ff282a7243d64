"""Fit the last layer of each block of a shortened vision transformer in closed form, before anything is trained.

What a block's MLP adds to the tokens is linear in the weights of its last layer. Those that bring the tokens after the
block nearest to wanted ones, in mean squares over many tokens, therefore have a closed form (ridge regression towards
the weights that the layer has). Blocks are fitted in order, each to the tokens that the fitted ones before it give:
so it makes up for what they leave.

Beyond WeCoLoRA's paper. Shopkhoev et al., "ReplaceMe", arXiv:2505.02819, section 3, estimate a linear map in the place
of left out blocks of language models, from a few texts, in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from models.arrays import Images
from models.runtime import autocast
from models.students import shortened_vit, vit_families
from models.students.shortened_vit import TokenTap

#: Normalised images [N, 3, S, S], and the tokens [N, blocks, T, D] that are wanted after each block. Asked for once for
#: each block: they must be the same each time.
Batches = Callable[[], Iterator[tuple[Images, Tensor]]]

_PENALTY = 3e-3  # of changed weights, as a share of the mean square of the layer's inputs
_NO_GAIN = 1e-8


@torch.no_grad()
def refit(network: nn.Module, batches: Batches, fitted: Callable[[int], None]) -> None:
    """Change the last layers of `network`'s blocks in place; `fitted` is told how many are done."""
    for block in range(len(vit_families.blocks_of(network))):
        front = shortened_vit.shorten(
            network, range(block + 1)
        )  # the same weights: what changes here changes there
        layer = [linear for linear, roles in vit_families.linears_of(front) if roles == ("fc2",)][block]
        inputs, missing = _sums(front, block, layer, batches)
        penalty = _PENALTY * inputs.diagonal().mean() * torch.eye(len(inputs), dtype=inputs.dtype)
        change = torch.linalg.solve(inputs + penalty.to(inputs.device), missing)
        one_image = next(batches())[0][:1]
        gain = _gain(front, block, layer, one_image).to(change)
        change = torch.where(gain.abs() > _NO_GAIN, change / gain, 0).to(layer.weight)
        layer.weight.add_(change[: layer.in_features].T)
        if layer.bias is not None:
            layer.bias.add_(change[-1])
        fitted(block + 1)


def _sums(network: nn.Module, block: int, layer: nn.Linear, batches: Batches) -> tuple[Tensor, Tensor]:
    """Over all tokens: products of the layer's inputs [F, F], and with what the tokens lack [F, D]; float64.

    F counts a constant input, too, where the layer has a bias.
    """
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    squares, products = torch.zeros(()), torch.zeros(())
    with TokenTap(network, [block]) as tap:
        for images, wanted in batches():
            with autocast(images.device):
                (tokens,) = tap(images)
            inputs = seen.pop().flatten(0, -2).float()
            if layer.bias is not None:
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            lacking = (wanted[:, block].float() - tokens.float()).flatten(0, -2)
            squares = squares.to(inputs.device) + (inputs.T @ inputs).double()
            products = products.to(inputs.device) + (inputs.T @ lacking).double()
    handle.remove()
    return squares, products


def _gain(network: nn.Module, block: int, layer: nn.Linear, image: Images) -> Tensor:
    """By how much each channel [D] of the tokens after a block grows where the layer's output grows by one.

    1, or the learnt scale that some families have behind the MLP.
    """
    after = []
    for value in (0.0, 1.0):
        handle = layer.register_forward_hook(
            lambda _, __, output, value=value: torch.full_like(output, value)
        )
        with TokenTap(network, [block]) as tap:
            after.append(tap(image)[0][0, 0])
        handle.remove()
    return after[1] - after[0]
