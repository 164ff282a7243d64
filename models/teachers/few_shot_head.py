"""A classifier on frozen features, fitted in closed form to a few labelled images.

Features are centred and L2-normalised first (SimpleShot's CL2N: Wang et al., arXiv:1911.04623, section 2.2).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from models.arrays import Features, Labels, Logits

if TYPE_CHECKING:
    from models.stages import HeadParams


@dataclass(frozen=True)
class FewShotHead:
    """logits = scale * (normalise(features - centre) @ weight + bias).

    `centre` [D], `weight` [D, C], `bias` [C]. `input_size` is the side of the images that the features were
    made from; `classes` are the names in the order of the logits.
    """

    centre: Tensor
    weight: Tensor
    bias: Tensor
    scale: float
    input_size: int
    classes: tuple[str, ...]
    kind: Literal["ridge", "prototypes"]
    ridge_lambda: float

    def logits(self, features: Features) -> Logits:
        """float32 [..., C] from features [..., D]."""
        unit = functional.normalize(features - self.centre.to(features.device), dim=-1)
        scores: Tensor = unit @ self.weight.to(features.device) + self.bias.to(features.device)
        return self.scale * scores

    def refit(self, features: Features, labels: Labels, centre: Tensor) -> FewShotHead:
        """The same kind of head, fitted to other images."""
        weight, bias = _solve(self.kind, features, labels, centre, len(self.classes), self.ridge_lambda)
        return replace(self, centre=centre, weight=weight, bias=bias)

    def save(self, folder: Path) -> None:
        tensors = {"centre": self.centre, "weight": self.weight, "bias": self.bias}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "head.safetensors"
        )
        document = {
            "kind": self.kind,
            "scale": self.scale,
            "ridge_lambda": self.ridge_lambda,
            "input_size": self.input_size,
            "classes": list(self.classes),
        }
        (folder / "head.json").write_text(json.dumps(document, ensure_ascii=False, indent=1))


def load(folder: Path) -> FewShotHead:
    """The head that LABEL left in a `soft_labels` folder."""
    document = json.loads((folder / "head.json").read_text())
    tensors = load_file(folder / "head.safetensors")
    return FewShotHead(**tensors, **{**document, "classes": tuple(document["classes"])})


def fit(
    features: Features,
    labels: Labels,
    centre: Tensor,
    params: HeadParams,
    classes: tuple[str, ...],
    input_size: int,
) -> FewShotHead:
    """The head for features [N, D] with labels [N], centred at `centre` [D]."""
    weight, bias = _solve(params.head, features, labels, centre, len(classes), params.ridge_lambda)
    return FewShotHead(
        centre, weight, bias, params.logit_scale, input_size, classes, params.head, params.ridge_lambda
    )


def _solve(
    kind: str, features: Features, labels: Labels, centre: Tensor, classes: int, ridge_lambda: float
) -> tuple[Tensor, Tensor]:
    unit = functional.normalize(features - centre, dim=-1).double()
    targets = functional.one_hot(labels, classes).double()
    solved = ridge(unit, targets, ridge_lambda) if kind == "ridge" else prototypes(unit, targets)
    return solved[0].float().contiguous(), solved[1].float().contiguous()


def ridge(features: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight [D, C] and bias [C] of the least squares fit to targets [N, C], the weight's square penalised.

    The bias is free of the penalty. Solved in its dual form, an N x N system, as N is small beside D
    (Saunders et al., "Ridge Regression Learning Algorithm in Dual Variables", ICML 1998, equation 4).
    """
    feature_mean, target_mean = features.mean(0), targets.mean(0)
    centred = features - feature_mean
    gram = centred @ centred.T + penalty * torch.eye(len(features), dtype=features.dtype)
    weight = centred.T @ torch.linalg.solve(gram, targets - target_mean)
    return weight, target_mean - feature_mean @ weight


def prototypes(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest class mean as a linear map: weight [D, C] the means p, bias -|p|^2 / 2.

    2 f.p - |p|^2 orders classes as -|f - p|^2 does (Snell et al., arXiv:1703.05175, equation 8).
    """
    means = (targets.T @ features) / targets.sum(0).clamp(min=1)[:, None]
    return means.T, -0.5 * means.square().sum(1)
