"""The same image twice: harmless, a leak, or a contradiction. Images are the same when their pixels are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from app.datasets.members import pointer
from app.datasets.report import Examined, Findings
from app.errors import Finding

_SPLITS = ("support", "test", "unlabelled")


def drop(findings: Findings, images: Sequence[Examined]) -> list[Examined]:
    """The images without repetitions; adds to `findings` what was dropped, or contradicts itself.

    Of equal images the first stays: labelled before test before unlabelled. A test image that the student learns
    from would make the measured accuracy too high, and so would one among the unlabelled images.
    """
    groups: dict[str, list[Examined]] = defaultdict(list)
    for item in sorted(images, key=lambda item: (_SPLITS.index(item.file.split), item.file.name)):
        groups[item.digest].append(item)
    kept = []
    for first, *others in groups.values():
        kept.append(first)
        for other in others:
            if other.file.label not in (None, first.file.label) or _other_mask(first, other):
                findings.faults.append(_contradiction(first, other))
            else:
                findings.counts[other.file.label, "duplicates"] += 1
                findings.warnings.append(_repetition(first, other))
    return kept


def _other_mask(first: Examined, other: Examined) -> bool:
    return first.mask is not None and other.mask is not None and first.mask.digest != other.mask.digest


def _contradiction(first: Examined, other: Examined) -> Finding:
    if other.mask is not None:
        detail = (
            f"{first.file.member.name} and {other.file.member.name} are the same image with two masks that differ. "
            "Remove one of them with its mask."
        )
        return Finding("duplicate_with_other_mask", pointer(other.file.member.name), detail)
    return Finding(
        "duplicate_across_classes",
        pointer(other.file.member.name),
        f"{first.file.member.name} and {other.file.member.name} are the same image in two classes, "
        f"'{first.file.label}' and '{other.file.label}'. Remove it from one of them.",
    )


def _repetition(first: Examined, other: Examined) -> Finding:
    name, again = first.file.member.name, other.file.member.name
    if first.file.split == other.file.split:
        code, why = "duplicate_image", "It was left out."
    elif other.file.split == "test":
        code = "duplicate_across_splits"
        why = "It was left out of the test split, because a student is not examined on what it learned from."
    elif first.file.split == "test":
        code = "duplicate_across_splits"
        why = (
            "It was left out of the unlabelled images, because a student must not learn from its test images."
        )
    else:
        code, why = "duplicate_image", "It was left out of the unlabelled images."
    return Finding(code, pointer(again), f"{again} is the same image as {name}. {why}")
