"""Which blocks of a vision transformer a shorter one keeps.

Source: Grigore et al., "Weight Copy and Low-Rank Adaptation for Few-Shot Distillation of Vision Transformers",
arXiv:2404.09326, section 3; its text and its code disagree on the place in a group, so that both are here.
"""

from __future__ import annotations

from collections.abc import Callable

from models.errors import TrainingError

Kept = tuple[int, ...]


def first_of_group(depth: int, r: int) -> Kept:
    """0, r, 2r, ...: the first block of every group of r."""
    return tuple(range(0, depth, checked(depth, r)))


def last_of_group(depth: int, r: int) -> Kept:
    """r - 1, 2r - 1, ...: the last block of every group; the network's last is always kept."""
    groups = depth // checked(depth, r)
    return tuple((group + 1) * depth // groups - 1 for group in range(groups))


def least_change(depth: int, r: int, change: Callable[[Kept], float]) -> tuple[Kept, list[float]]:
    """Leave out blocks one by one, each time the one that is missed least, until depth // r are left.

    `change(kept)` says how far the tokens of a network of those blocks are from those of the whole. Returns the kept
    blocks and the change after each step.
    """
    kept = tuple(range(depth))
    changes = []
    while len(kept) > depth // checked(depth, r):
        without = [tuple(block for block in kept if block != left_out) for left_out in kept]
        measured = [change(rest) for rest in without]
        changes.append(min(measured))
        kept = without[measured.index(changes[-1])]
    return kept, changes


def count(rule: str, depth: int, r: int) -> int:
    """How many blocks a rule keeps of `depth`."""
    return -(-depth // r) if rule == "first_of_group" else depth // r


def smallest_r(rule: str, depth: int, stem: int, block: int, budget: int) -> int:
    """The smallest r whose student has at most `budget` parameters: those of `stem` and of each `block` kept."""
    for r in range(checked(depth, 2), depth + 1):
        if stem + block * count(rule, depth, r) <= budget:
            return r
    raise TrainingError(
        f"no student of this teacher has at most {budget:,} parameters: with one block it has {stem + block:,}",
        "Allow more parameters, or choose a narrower teacher.",
    )


def checked(depth: int, r: int) -> int:
    """`r`. Raises `TrainingError` where one of every r blocks of `depth` cannot be kept."""
    if depth < 2:
        raise TrainingError(
            f"the teacher has {depth} block: none can be left out", "Choose a deeper teacher for this method."
        )
    if not 2 <= r <= depth:
        raise TrainingError(
            f"the teacher has {depth} blocks: one of every {r} cannot be kept",
            f"Choose r from 2 to {depth}.",
        )
    return r
