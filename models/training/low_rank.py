"""Low-rank updates of the linear layers of a vision transformer, which fold into its weights.

A weight W [out, in] is trained as W + B A with A [rank, in] and B [out, rank]; W itself is frozen. Query, key and value
have pairs of their own, also where one layer makes all three. A is drawn Kaiming-uniform (a = sqrt 5), B is zero, the
product is not scaled: training starts from the copied weights exactly.

Sources: Hu et al., "LoRA", arXiv:2106.09685, section 4.1; on which layers, Grigore et al. (WeCoLoRA),
arXiv:2404.09326; Liu et al., "DoRA", arXiv:2402.09353, equations 5 and 11.

The update is a parametrisation of the weight, not a branch beside the layer: so a block that reads its layer's weight
without calling the layer (timm's BEiT and EVA do) is trained all the same, and folding is reading the weight once. One
product B A for each batch costs less than a branch for each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.errors import TrainingError
from models.students import vit_families
from models.students.vit_families import Role

#: Which weights learn: all six linear maps (enhanced), q and v only (lora), six with magnitudes (dora), all, none.
Adaptation = Literal["enhanced_lora", "lora", "dora", "full", "none"]

_ALL: tuple[Role, ...] = ("q", "k", "v", "proj", "fc1", "fc2")
ROLES: dict[Adaptation, tuple[Role, ...]] = {"enhanced_lora": _ALL, "dora": _ALL, "lora": ("q", "v")}


class LowRankUpdate(nn.Module):
    """W -> W + B A. The rows of W [out, in] are parts of equal height, one for each of `roles`; those in `adapted`
    have a pair: `a` [rank, in] and `b` [height, rank], by role.
    """

    def __init__(
        self,
        weight: Tensor,
        roles: Sequence[Role],
        adapted: Sequence[Role],
        rank: int,
        random: torch.Generator,
    ) -> None:
        super().__init__()
        self.roles = tuple(roles)
        self.height, width = weight.shape[0] // len(self.roles), weight.shape[1]
        chosen = [role for role in self.roles if role in adapted]
        bound = 1 / math.sqrt(width)  # Kaiming-uniform with a = sqrt 5
        drawn = {role: (2 * torch.rand(rank, width, generator=random) - 1) * bound for role in chosen}
        self.a = nn.ParameterDict({role: nn.Parameter(drawn[role].to(weight.device)) for role in chosen})
        self.b = nn.ParameterDict(
            {role: nn.Parameter(torch.zeros(self.height, rank, device=weight.device)) for role in chosen}
        )

    def forward(self, weight: Tensor) -> Tensor:
        nothing = weight.new_zeros(self.height, weight.shape[1])
        parts = [self.b[role] @ self.a[role] if role in self.a else nothing for role in self.roles]
        return weight + torch.cat(parts)


class Magnitudes(nn.Module):
    """DoRA's second half: each row of the updated weight [out, in] scaled to a learned length, `lengths` [out].

    The length it has is taken as a constant in the gradient, as in section 4.3 of the paper.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.lengths = nn.Parameter(weight.detach().norm(dim=1).clone())

    def forward(self, weight: Tensor) -> Tensor:
        share: Tensor = self.lengths / weight.detach().norm(dim=1).clamp(min=1e-12)
        return share[:, None] * weight


def attach(network: nn.Module, adaptation: Adaptation, rank: int, random: torch.Generator) -> None:
    """Make `network` learn as `adaptation` says; all else is frozen. Raises `TrainingError` for too high a rank."""
    check_rank(network, adaptation, rank)
    network.requires_grad_(adaptation == "full")
    for layer, roles in _adapted(network, adaptation):
        update = LowRankUpdate(layer.weight, roles, ROLES[adaptation], rank, random)
        parametrize.register_parametrization(layer, "weight", update)
        if adaptation == "dora":
            parametrize.register_parametrization(layer, "weight", Magnitudes(layer.weight))


def check_rank(network: nn.Module, adaptation: Adaptation, rank: int) -> None:
    """Raise `TrainingError` where `rank` is more than the smallest side of a weight that learns."""
    sides = [
        min(layer.in_features, layer.out_features // len(roles))
        for layer, roles in _adapted(network, adaptation)
    ]
    if sides and rank > min(sides):
        raise TrainingError(
            f"rank {rank} is more than the teacher's layers have: {min(sides)}",
            f"Choose a rank of at most {min(sides)}; about a sixth of the width is usual.",
        )


def _adapted(network: nn.Module, adaptation: Adaptation) -> list[tuple[nn.Linear, tuple[Role, ...]]]:
    """The layers that get low-rank updates, with what the parts of each do."""
    wanted = set(ROLES.get(adaptation, ()))
    return [(layer, roles) for layer, roles in vit_families.linears_of(network) if wanted & set(roles)]


def fold(network: nn.Module) -> None:
    """Put every update into its weight: what is left are the library's plain linear layers."""
    for module in network.modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def check_all_learn(network: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Raise `TrainingError` where an update gets no gradient from the first `loss()`: it would silently stay zero.

    A's gradient is zero at first, as B is; B's must not be.
    """
    pairs = {
        f"{name}.{role}": matrix
        for name, module in network.named_modules()
        if isinstance(module, LowRankUpdate)
        for role, matrix in module.b.items()
    }
    if not pairs:
        return
    loss().backward()  # type: ignore[no-untyped-call]
    idle = [name for name, matrix in pairs.items() if matrix.grad is None or not bool(matrix.grad.any())]
    network.zero_grad()
    if idle:
        raise TrainingError(
            f"{len(idle)} of {len(pairs)} low-rank updates get no gradient, such as {idle[0]}",
            "This teacher's network does not use those weights as it seems to; adapt all weights (adaptation: full).",
        )


def learning(network: nn.Module) -> int:
    """How many numbers learn."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
