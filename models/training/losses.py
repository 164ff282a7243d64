"""Losses of distillation."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from models.arrays import Logits, Probabilities


def softened(logits: Logits, temperature: float) -> Probabilities:
    """softmax(logits / T): Hinton et al., arXiv:1503.02531, equation 1."""
    return (logits / temperature).softmax(-1)


def distillation(student: Logits, teacher: Probabilities, temperature: float) -> Tensor:
    """T^2 KL(teacher || softmax(student / T)), mean over the batch; `teacher` is softened already.

    T^2 keeps the gradient's size when T changes (Hinton et al., section 2.1).
    """
    log_student = (student / temperature).log_softmax(-1)
    return temperature**2 * functional.kl_div(log_student, teacher, reduction="batchmean")


def cross_entropy(student: Logits, targets: Tensor) -> Tensor:
    """-sum(targets * log softmax(student)) over the rows with a label, per such row.

    `targets` [N, C] are one-hot or mixed; a row of zeros has no label and adds nothing.
    """
    total = -(targets * student.log_softmax(-1)).sum()
    return total / targets.sum().clamp(min=1)
