"""Images and their masks, by names alone: images/NAME.jpg belongs to masks/NAME.png of the same split."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from app.datasets.members import Member, pointer
from app.errors import Finding

IMAGES, MASKS = "images", "masks"


@dataclass(frozen=True)
class Pair:
    """`name`: the image's path below its split."""

    name: str
    image: Member
    mask: Member


@dataclass
class Pairs:
    """`faults`: what has no counterpart, or too many; `warnings`: what was left out."""

    found: list[Pair] = field(default_factory=list)
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)


def is_masked(folders: Iterable[str]) -> bool:
    """Whether the folders of a split are those of images with masks, and not of classes."""
    named = {folder.casefold() for folder in folders}
    return {IMAGES, MASKS} <= named or (bool(named) and named <= {IMAGES, MASKS})


def pair(members: Sequence[tuple[Sequence[str], Member]], below: str) -> Pairs:
    """Pair a split's files, each given with the steps of its path below the split.

    `below`: the split's folder as users should write it, "" or "test/".
    """
    pairs = Pairs()
    sides: dict[str, dict[str, Member]] = {IMAGES: {}, MASKS: {}}
    names: dict[str, str] = {}
    for steps, member in members:
        folder = steps[0].casefold()
        if len(steps) < 2 or folder not in sides:
            pairs.warnings.append(_elsewhere(member))
            continue
        name = unicodedata.normalize("NFC", "/".join(steps[1:]))
        stem = name.rpartition(".")[0] or name
        if folder == IMAGES:
            names[stem] = "/".join(steps)
        if stem in sides[folder]:
            pairs.faults.append(_twice(member, sides[folder][stem]))
        sides[folder][stem] = member
    if not sides[MASKS]:
        pairs.faults.append(_empty(MASKS, below))
    elif not sides[IMAGES]:
        pairs.faults.append(_empty(IMAGES, below))
    else:
        for stem in sorted(sides[IMAGES].keys() ^ sides[MASKS].keys()):
            pairs.faults.append(_alone(stem, sides, below))
        pairs.found = [
            Pair(names[stem], sides[IMAGES][stem], sides[MASKS][stem])
            for stem in sorted(sides[IMAGES].keys() & sides[MASKS].keys())
        ]
    return pairs


def _elsewhere(member: Member) -> Finding:
    detail = (
        f"{member.name} lies beside images/ and masks/, where only classes.txt, test/ and unlabelled/ belong, and was "
        "left out."
    )
    return Finding("file_beside_masks", pointer(member.name), detail)


def _twice(member: Member, first: Member) -> Finding:
    detail = (
        f"{member.name} and {first.name} have the same name but for the suffix, so that a mask could be of either. "
        "Rename one of them, and its counterpart."
    )
    return Finding("mask_ambiguous", pointer(member.name), detail)


def _empty(folder: str, below: str) -> Finding:
    if folder == IMAGES:
        detail = (
            f"Nothing lies in {below}images/. Add the images that the masks belong to, under the same names."
        )
    else:
        detail = (
            f"Nothing lies in {below}masks/. To say what the pixels of images show, add {below}masks/NAME.png for each "
            f"{below}images/NAME.jpg; to say what whole images show, put those of each class in a folder of its own."
        )
    return Finding(f"{folder}_missing", "/files", detail)


def _alone(stem: str, sides: dict[str, dict[str, Member]], below: str) -> Finding:
    member = sides[IMAGES].get(stem)
    if member is not None:
        detail = f"{member.name} has no mask. Add {below}masks/{stem}.png, or move the image to unlabelled/."
        return Finding("mask_missing", pointer(member.name), detail)
    member = sides[MASKS][stem]
    detail = (
        f"{member.name} is the mask of no image. Add {below}images/{stem}.jpg (or .png, .webp), or remove it."
    )
    return Finding("image_missing", pointer(member.name), detail)
