"""AdamW, its learning rate at each step, and the running average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

_WARM_UP = 0.15  # share of the steps
_FIRST, _LAST = 1 / 25, 1e-4  # of the highest rate


#: torch's own decay rates of AdamW's two running means.
BETAS = (0.9, 0.999)


def adamw(
    network: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = BETAS
) -> Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101); biases and norms do not decay."""
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=lr, betas=betas)


def one_cycle(step: int, steps: int, highest: float) -> float:
    """The learning rate at `step`: cosine up over the first 15 % of the steps, cosine down over the rest.

    A function of the step alone, so that a checkpoint need not hold it (Smith & Topin, arXiv:1708.07120).
    """
    turn = max(1.0, _WARM_UP * steps)
    if step < turn:
        return _cosine(_FIRST * highest, highest, step / turn)
    return _cosine(highest, _LAST * highest, (step - turn) / max(1.0, steps - turn))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def changing(network: nn.Module) -> list[str]:
    """The names, in the network's state, of what training changes: parameters that learn, and buffers."""
    frozen = {name for name, value in network.named_parameters() if not value.requires_grad}
    return [name for name in network.state_dict() if name not in frozen]


class WeightAverage:
    """Exponential running average of parameters and buffers (Tarvainen & Valpola, arXiv:1703.01780, eq. 1).

    Early on it forgets faster, (1 + t) / (10 + t), so that the first weights do not linger. Frozen parameters are
    left as they are.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._names = changing(network)
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        states = (self.network.state_dict(), network.state_dict())
        kept, new = ([state[name] for name in self._names] for state in states)
        pairs = [(a, b) for a, b in zip(kept, new, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)
        for a, b in zip(kept, new, strict=True):
            if not a.is_floating_point():
                a.copy_(b)
