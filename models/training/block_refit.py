"""Fit the last layer of each block of a shortened vision transformer in closed form, before anything is trained.

What a block's MLP adds to the tokens is linear in the weights of its last layer. Those that bring the tokens after the
block nearest to wanted ones, in mean squares over many tokens, therefore have a closed form (ridge regression: of what
the tokens lack, on the layer's inputs). Blocks are fitted in order, each to the tokens that the fitted ones before it
give: so it makes up for what they leave.

Beyond WeCoLoRA's paper. Shopkhoev et al., "ReplaceMe", arXiv:2505.02819, section 3, estimate a linear map in the place
of left out blocks of language models, from a few texts, in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from models.arrays import Images
from models.errors import TrainingError
from models.runtime import autocast
from models.students import shortened_vit, vit_families
from models.students.shortened_vit import TokenTap

#: Normalised images [N, 3, S, S], and the tokens [N, blocks, T, D] that are wanted after each block. Asked for once for
#: each block: they must be the same each time.
Batches = Callable[[], Iterator[tuple[Images, Tensor]]]

_PENALTY = 3e-3  # of what is added to the weights, as a share of the mean square of the layer's inputs
_PROBE = 1024.0  # so large that the tokens' rounding does not count
_LEAST_GAIN = 1e-3  # of the median one; what a channel hardly passes on is not fitted


@torch.no_grad()
def refit(network: nn.Module, batches: Batches) -> None:
    """Change the last layers of `network`'s blocks in place.

    Raises `TrainingError` where a block normalises what its MLP gives, and where tokens are no finite numbers.
    """
    image = next(batches())[0][:1]
    for block in range(len(vit_families.blocks_of(network))):
        # it shares its weights with the whole: what changes here changes there
        front = shortened_vit.shorten(network, range(block + 1))
        layer = [linear for linear, roles in vit_families.linears_of(front) if roles == ("fc2",)][block]
        gain = _gain(front, block, layer, image)
        squares, products = _sums(front, block, layer, batches)
        squares.diagonal().add_(_PENALTY * squares.diagonal().mean())
        change = torch.linalg.solve(squares, products)
        if not bool(change.isfinite().all()):
            raise TrainingError(
                f"the tokens after block {block} are no finite numbers: its last layer cannot be fitted",
                "Choose distillation.start 'copied'.",
            )
        passes = gain.abs() > _LEAST_GAIN * gain.abs().median()
        change = torch.where(passes, change / gain.to(change), 0).to(layer.weight)
        layer.weight.add_(change[: layer.in_features].T)
        if layer.bias is not None:
            layer.bias.add_(change[-1])


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

    1, or the learnt scale that some families have behind the MLP. Raises `TrainingError` for a normalisation there.
    """
    after = []
    for value in (0.0, _PROBE):
        handle = layer.register_forward_hook(
            lambda _, __, output, value=value: torch.full_like(output, value)
        )
        with TokenTap(network, [block]) as tap:
            after.append(tap(image)[0][0].float())
        handle.remove()
    gain = ((after[1] - after[0]) / _PROBE).mean(0)
    if not bool(gain.any()):
        raise TrainingError(
            "the teacher's blocks normalise what their MLPs give: their last layers cannot be fitted",
            "Choose distillation.start 'copied'.",
        )
    return gain
