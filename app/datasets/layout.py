"""From the paths of an upload to splits and classes, by names alone: no file is opened here."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from app.datasets import pairing, paths
from app.datasets.members import Member, class_pointer, pointer
from app.errors import Finding
from models.data.class_names import FILE_NAME as CLASS_NAMES
from models.pipeline import Task

Split = Literal["support", "test", "unlabelled"]

#: Reserved top-level folders, without regard to case.
FOLDERS: dict[str, Split] = {
    "train": "support",
    "test": "test",
    "unlabelled": "unlabelled",
    "unlabeled": "unlabelled",
}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp")
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")


@dataclass(frozen=True)
class Placed:
    """A file with its place. `label`: class name, None if it has none; `name`: path inside the split.

    `mask`: the file with the classes of its pixels.
    """

    member: Member
    split: Split
    label: str | None
    name: str
    mask: Member | None = None


@dataclass(frozen=True)
class Layout:
    files: tuple[Placed, ...]
    classes: tuple[str, ...]  # of the support split, sorted; of the test split, where no image has its label
    labelled: bool  # there are images to learn from with their labels, or masks
    skipped: tuple[str, ...]
    errors: tuple[Finding, ...]  # the upload must not be opened
    faults: tuple[Finding, ...]  # the upload will be refused, with what else is found
    warnings: tuple[Finding, ...]
    task: Task = "classification"
    class_names: Member | None = None  # classes.txt, of images with masks


def arrange(members: Sequence[Member]) -> Layout:
    skipped = tuple(
        member.name for member in members if paths.is_litter(member.name) and not paths.danger(member.name)
    )
    litter = set(skipped)
    kept = [member for member in members if member.name not in litter]
    errors = [finding for member in kept for finding in _refused(member)]
    errors += _repeated(kept)
    if errors:
        return Layout((), (), True, skipped, tuple(errors), (), ())
    wrapped = _wrapper_depth([member.name for member in kept])
    split_up = [_split_of(member.name.split("/")[wrapped:]) for member in kept]
    if _masked(split_up):
        return _with_masks(list(zip(split_up, kept, strict=True)), skipped)
    placed: list[Placed] = []
    faults: list[Finding] = []
    warnings: list[Finding] = []
    folders: dict[str, set[tuple[str, str]]] = defaultdict(set)  # class key -> (split, folder as sent)
    tops = {member.name.split("/")[wrapped].casefold() for member in kept if member.name.count("/") > wrapped}
    for member, (reserved, steps) in zip(kept, split_up, strict=True):
        split = reserved or "support"
        if reserved is None and "train" in tops and len(steps) > 1:
            faults.append(_beside_train(member, steps[0]))
            continue
        if split == "unlabelled":
            placed.append(Placed(member, split, None, _normal("/".join(steps))))
        elif len(steps) > 1:
            folders[paths.class_key(steps[0])].add((split, steps[0]))
            name = "/".join([paths.class_name(steps[0]), *steps[1:]])
            placed.append(Placed(member, split, paths.class_name(steps[0]), _normal(name)))
        else:
            warnings.append(_without_class(member, reserved))
    faults += _collisions(folders)
    faults += _bad_class_names({folder for uses in folders.values() for _, folder in uses})
    splits = {file.split for file in placed}
    labelled = "support" in splits or "unlabelled" not in splits
    named_by = "support" if labelled else "test"
    classes = sorted({file.label for file in placed if file.split == named_by and file.label is not None})
    faults += _unknown_to_support(placed, set(classes))
    return Layout(tuple(placed), tuple(classes), labelled, skipped, (), tuple(faults), tuple(warnings))


def _split_of(steps: Sequence[str]) -> tuple[Split | None, Sequence[str]]:
    """The reserved folder that a path, given in steps, starts with, as a split; the steps below it."""
    reserved = FOLDERS.get(steps[0].casefold()) if len(steps) > 1 else None
    return reserved, steps[1:] if reserved else steps


def _masked(paths_in_splits: Sequence[tuple[Split | None, Sequence[str]]]) -> bool:
    """Whether these are images with masks: what there is to learn from decides, else the test images."""
    folders: dict[Split, set[str]] = defaultdict(set)
    for split, steps in paths_in_splits:
        if len(steps) > 1:
            folders[split or "support"].add(steps[0])
    return pairing.is_masked(folders["support"] or folders["test"])


def _with_masks(
    members: Sequence[tuple[tuple[Split | None, Sequence[str]], Member]], skipped: tuple[str, ...]
) -> Layout:
    """The layout of images/ and masks/, with test/, unlabelled/ and classes.txt as far as there are any."""
    names: Member | None = None
    files: dict[Split, list[tuple[Sequence[str], Member]]] = {"support": []}
    for (split, steps), member in members:
        if split in (None, "support") and list(steps) == [CLASS_NAMES] and names is None:
            names = member
        else:
            files.setdefault(split or "support", []).append((steps, member))
    unlabelled = files.pop("unlabelled", [])
    placed = [Placed(member, "unlabelled", None, _normal("/".join(steps))) for steps, member in unlabelled]
    faults: list[Finding] = []
    warnings: list[Finding] = []
    for place, of_split in files.items():
        pairs = pairing.pair(of_split, "" if place == "support" else f"{place}/")
        faults += pairs.faults
        warnings += pairs.warnings
        placed += [Placed(found.image, place, None, _normal(found.name), found.mask) for found in pairs.found]
    return Layout(tuple(placed), (), True, skipped, (), tuple(faults), tuple(warnings), "segmentation", names)


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _refused(member: Member) -> list[Finding]:
    danger = paths.danger(member.name)
    if danger is None and not paths.legible(member.name):
        danger = ("name_characters", "its name contains control characters. Rename it.")
    if danger is None and member.name.casefold().endswith(_ARCHIVE_SUFFIXES):
        danger = ("zip_nested", "it is an archive inside the upload. Unpack it and send its images.")
    return [Finding(danger[0], pointer(member.name), f"{_shown(member.name)}: {danger[1]}")] if danger else []


def _repeated(members: Sequence[Member]) -> list[Finding]:
    seen: set[str] = set()
    findings = []
    for member in members:
        if member.name in seen:
            detail = f"{_shown(member.name)}: this path occurs twice. Rename one of the files."
            findings.append(Finding("duplicate_name", pointer(member.name), detail))
        seen.add(member.name)
    return findings


def _wrapper_depth(names: Sequence[str]) -> int:
    """How many single top-level folders wrap everything. A folder that holds images itself is a class."""
    depth = 0
    while True:
        tops = {name.split("/")[depth] for name in names if name.count("/") > depth}
        loose = any(name.count("/") == depth and name.casefold().endswith(_IMAGE_SUFFIXES) for name in names)
        if len(tops) != 1 or loose or next(iter(tops)).casefold() in FOLDERS:
            return depth
        inside = [name for name in names if name.count("/") > depth]
        if not any(name.count("/") > depth + 1 for name in inside):
            return depth
        if any(name.count("/") == depth + 1 and name.casefold().endswith(_IMAGE_SUFFIXES) for name in inside):
            return depth
        names = inside
        depth += 1


def _without_class(member: Member, reserved: Split | None) -> Finding:
    if reserved is None:
        detail = "lies in no class folder and was left out. Move it to CLASS/, or to unlabelled/ if it has no label."
    else:
        folder = member.name.split("/")[-2]
        detail = (
            f"lies in {folder}/ but in no class folder, and was left out. Move it to {folder}/CLASS/; "
            f"if '{folder}' is a class itself, put all classes below train/."
        )
    return Finding("file_without_class", pointer(member.name), f"{_shown(member.name)} {detail}")


def _beside_train(member: Member, folder: str) -> Finding:
    return Finding(
        "unknown_split",
        pointer(member.name),
        f"{_shown(member.name)}: '{folder}' lies beside train/ and is neither test/ nor unlabelled/. "
        "Move it into one of the three, or remove it.",
    )


def _collisions(folders: dict[str, set[tuple[str, str]]]) -> list[Finding]:
    findings = []
    for uses in folders.values():
        spellings = sorted({folder for _, folder in uses})
        if len({paths.class_name(folder) for folder in spellings}) == 1 and not _twice_in_a_split(uses):
            continue
        named = " and ".join(repr(spelling) for spelling in spellings)
        findings.append(
            Finding(
                "class_name_collision",
                class_pointer(spellings[-1]),
                f"The class folders {named} differ only in case, spaces or the encoding of accents. "
                "Give them one spelling if they are one class, distinct names if not.",
            )
        )
    return findings


def _twice_in_a_split(uses: set[tuple[str, str]]) -> bool:
    return len({split for split, _ in uses}) < len(uses)


def _bad_class_names(folders: set[str]) -> list[Finding]:
    findings = []
    for folder in sorted(folders):
        name = paths.class_name(folder)
        if not 1 <= len(name) <= paths.MAX_CLASS_NAME:
            detail = f"Class {_shown(folder)!r} has a name of {len(name)} characters; 1 to {paths.MAX_CLASS_NAME} are possible. Rename the folder."  # noqa: E501
            findings.append(Finding("class_name", class_pointer(folder), detail))
    return findings


def _unknown_to_support(files: Sequence[Placed], classes: set[str]) -> list[Finding]:
    unknown = sorted({file.label for file in files if file.label is not None and file.label not in classes})
    return [
        Finding(
            "unknown_test_class",
            class_pointer(name),
            f"Class '{name}' has test images but no images to learn from. Add some to {name}/, or remove test/{name}/.",
        )
        for name in unknown
    ]


def _shown(name: str) -> str:
    visible = "".join(character if character.isprintable() else "?" for character in name)
    return visible if len(visible) <= 160 else visible[:80] + "…" + visible[-79:]
