"""A classifier on frozen features, fitted in closed form to a few labelled images, refined on unlabelled ones.

Features are centred and L2-normalised first (SimpleShot's CL2N: Wang et al., arXiv:1911.04623, section 2.2).
Unlabelled images refine the fit by self-training with soft labels, which for prototypes is the soft k-means of
Ren et al., arXiv:1803.00676, section 3.1.1. No label but those of the labelled images takes part.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from models.arrays import Features, Labels, Logits

if TYPE_CHECKING:
    from models.stages import HeadParams


@dataclass(frozen=True)
class FewShotHead:
    """logits = scale * (normalise(features - centre) @ weight + bias).

    `centre` [D], `weight` [D, C], `bias` [C]. `input_size` is the side of the images that the features were
    made from; `classes` are the names in the order of the logits. What follows is of `HeadParams`.
    """

    centre: Tensor
    weight: Tensor
    bias: Tensor
    scale: float
    input_size: int
    classes: tuple[str, ...]
    kind: Literal["ridge", "prototypes"]
    ridge_lambda: float
    rounds: int
    unlabelled_weight: float
    intended: float = 0.0

    def logits(self, features: Features) -> Logits:
        """float32 [..., C] from features [..., D]."""
        unit = functional.normalize(features - self.centre.to(features.device), dim=-1)
        scores: Tensor = unit @ self.weight.to(features.device) + self.bias.to(features.device)
        return self.scale * scores

    def refit(self, features: Features, labels: Labels, image: Tensor, centre: Tensor) -> FewShotHead:
        """The same kind of head, fitted to other images; the arguments are those of `fit`."""
        unfitted = replace(self, centre=centre)
        weight, bias = _solve(unfitted, features, labels, image)
        return replace(unfitted, weight=weight, bias=bias)

    def save(self, folder: Path) -> None:
        tensors = {"centre": self.centre, "weight": self.weight, "bias": self.bias}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "head.safetensors"
        )
        document = {
            "kind": self.kind,
            "scale": self.scale,
            "ridge_lambda": self.ridge_lambda,
            "rounds": self.rounds,
            "unlabelled_weight": self.unlabelled_weight,
            "intended": self.intended,
            "input_size": self.input_size,
            "classes": list(self.classes),
        }
        (folder / "head.json").write_text(json.dumps(document, ensure_ascii=False, indent=1))


class HeadedNetwork(nn.Module):
    """Backbone and head in one: normalised images [B, 3, S, S] -> logits [B, C].

    logits = scale * ((features - centre) @ weight + bias), the difference L2-normalised first where `unit`.
    """

    def __init__(
        self, backbone: nn.Module, centre: Tensor, weight: Tensor, bias: Tensor, *, scale: float, unit: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.centre = nn.Parameter(centre.float())
        self.weight = nn.Parameter(weight.float())
        self.bias = nn.Parameter(bias.float())
        self.scale = scale
        self.unit = unit

    @classmethod
    def of(cls, backbone: nn.Module, head: FewShotHead) -> HeadedNetwork:
        return cls(backbone, head.centre, head.weight, head.bias, scale=head.scale, unit=True)

    @classmethod
    def empty(
        cls, backbone: nn.Module, width: int, classes: int, *, scale: float, unit: bool
    ) -> HeadedNetwork:
        """A head of zeros, to load weights into."""
        zeros = (torch.zeros(width), torch.zeros(width, classes), torch.zeros(classes))
        return cls(backbone, *zeros, scale=scale, unit=unit)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.backbone(images))

    def logits(self, features: Features) -> Logits:
        """[B, C] from features [B, D]."""
        moved = features - self.centre
        if self.unit:
            moved = functional.normalize(moved, dim=-1)
        logits: Logits = self.scale * (moved @ self.weight + self.bias)
        return logits


def load(folder: Path) -> FewShotHead:
    """The head that LABEL left in a `soft_labels` folder."""
    document = json.loads((folder / "head.json").read_text())
    tensors = load_file(folder / "head.safetensors")
    return FewShotHead(**tensors, **{**document, "classes": tuple(document["classes"])})


def fit(
    features: Features,
    labels: Labels,
    image: Tensor,
    centre: Tensor,
    params: HeadParams,
    classes: tuple[str, ...],
    input_size: int,
) -> FewShotHead:
    """The head for features [N, D], centred at `centre` [D], with labels [N], -1 where there is none.

    Row i is a view of image `image[i]`; all views of an unlabelled image get one soft label.
    """
    width = features.shape[1]
    head = FewShotHead(
        centre=centre,
        weight=torch.zeros(width, len(classes)),
        bias=torch.zeros(len(classes)),
        scale=params.logit_scale,
        input_size=input_size,
        classes=classes,
        kind=params.head,
        ridge_lambda=params.ridge_lambda,
        rounds=params.rounds,
        unlabelled_weight=params.unlabelled_weight,
        intended=params.intended,
    )
    return head.refit(features, labels, image, centre)


#: From targets [N, C] to the weight [D, C] and bias [C] that fit them.
Solver = Callable[[Tensor], tuple[Tensor, Tensor]]


def _solve(head: FewShotHead, features: Features, labels: Labels, image: Tensor) -> tuple[Tensor, Tensor]:
    unit = functional.normalize(features - head.centre, dim=-1).double()
    known = labels >= 0
    labelled, unlabelled = unit[known], unit[~known]
    truth = functional.one_hot(labels[known], len(head.classes)).double()
    ones = torch.ones(len(labelled), dtype=torch.double)
    weight, bias = _solver(head, labelled, ones)(truth)
    if head.rounds and len(unlabelled):
        share = head.unlabelled_weight * len(labelled) / len(unlabelled)
        again = _solver(
            head,
            torch.cat([labelled, unlabelled]),
            torch.cat([ones, torch.full((len(unlabelled),), share).double()]),
        )
        for _ in range(head.rounds):
            scores = _mean_by_image(unlabelled @ weight + bias, image[~known])
            guessed = (head.scale * scores).softmax(-1)
            weight, bias = again(torch.cat([truth, guessed]))
    return weight.float().contiguous(), bias.float().contiguous()


def _solver(head: FewShotHead, features: Tensor, weights: Tensor) -> Solver:
    if head.kind == "ridge":
        return ridge(features, weights, head.ridge_lambda)
    return partial(prototypes, features, weights)


def _mean_by_image(scores: Tensor, image: Tensor) -> Tensor:
    """Each row of scores [n, C] replaced by the mean over the rows of the same image [n]."""
    size = int(image.max()) + 1
    sums = scores.new_zeros(size, scores.shape[1]).index_add_(0, image, scores)
    means: Tensor = sums / torch.bincount(image, minlength=size).clamp(min=1)[:, None]
    return means[image]


def ridge(features: Tensor, weights: Tensor, penalty: float) -> Solver:
    """Least squares with row weights [N] on features [N, D], the square of the weight [D, C] penalised.

    The bias is free of the penalty. The system is factorised once, for any number of targets: in its dual
    form, N x N, where rows are fewer than columns (Saunders et al., "Ridge Regression Learning Algorithm in
    Dual Variables", ICML 1998, equation 4), else in its primal form, D x D.
    """
    total = weights.sum()
    mean = weights @ features / total
    root = weights.sqrt()[:, None]
    rows = root * (features - mean)
    dual = rows.shape[0] < rows.shape[1]
    gram = rows @ rows.T if dual else rows.T @ rows
    factor = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype))

    def solve(targets: Tensor) -> tuple[Tensor, Tensor]:
        target_mean = weights @ targets / total
        wanted = root * (targets - target_mean)
        if dual:
            weight = rows.T @ torch.cholesky_solve(wanted, factor)
        else:
            weight = torch.cholesky_solve(rows.T @ wanted, factor)
        return weight, target_mean - mean @ weight

    return solve


def prototypes(features: Tensor, weights: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest class mean as a linear map: weight [D, C] the weighted means p, bias -|p|^2 / 2.

    2 f.p - |p|^2 orders classes as -|f - p|^2 does (Snell et al., arXiv:1703.05175, equation 8).
    """
    shares = weights[:, None] * targets
    means = (shares.T @ features) / shares.sum(0).clamp(min=1e-9)[:, None]
    return means.T, -0.5 * means.square().sum(1)
