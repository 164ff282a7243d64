"""A linear layer on standardised features: batch normalisation without affine part, then weight and bias.

The probe of He et al. (MAE), arXiv:2111.06377, appendix A.1, and of WeCoLoRA. They train it with LARS on many images;
of few the same model is fitted to its optimum, which depends on no schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from models.arrays import Features, Labels

_EPSILON = 1e-6
_ITERATIONS = 200


def fit(features: Features, labels: Labels, classes: int, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """Centre [D], weight [D, C] and bias [C] with logits = (features - centre) @ weight + bias.

    Minimises the mean cross-entropy plus `penalty` / 2 times the squared weight of standardised features [N, D].
    """
    known = labels >= 0
    return fit_shares(features[known], functional.one_hot(labels[known], classes), penalty)


def fit_shares(features: Features, shares: Tensor, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `fit`, to rows that show several classes: `shares` [N, C], not negative, say how much of each.

    A row counts as much as its shares sum to; one of zeros counts for nothing.
    """
    seen = shares.sum(1) > 0
    chosen, truth = features[seen].double(), shares[seen].double()
    classes, total = truth.shape[1], truth.sum()
    centre = chosen.mean(0)
    deviation = (chosen.var(0, correction=0) + _EPSILON).sqrt()
    standard = (chosen - centre) / deviation
    weight = torch.zeros(standard.shape[1], classes, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.double, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = standard @ weight + bias
        value = -(truth * logits.log_softmax(1)).sum() / total + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    folded = (weight / deviation[:, None]).detach()
    return centre.float(), folded.float().contiguous(), bias.detach().float()
