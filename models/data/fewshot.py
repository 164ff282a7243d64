"""The few-shot set: support images with labels, unlabelled images, test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models.arrays import Labels, Pixels
from models.data import archive, images, masks
from models.errors import DataError
from models.pipeline import JobShape
from models.runtime import generator

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Split:
    """`pixels` uint8 [N, 3, S, S]; `labels` int64 [N], -1 where there is none; class names in order."""

    pixels: Pixels
    labels: Labels
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def load(folder: Path, size: int) -> Split:
    """The split in `folder`, squeezed to squares of `size` pixels."""
    path = folder / archive.FILE_NAME
    pixels = images.squares(((image.name, content) for image, content in archive.contents(path)), size)
    return Split(pixels, read_labels(folder), archive.read_index(path).classes)


def read_labels(folder: Path) -> Labels:
    """The labels of a split without decoding its images."""
    index = archive.read_index(folder / archive.FILE_NAME)
    return torch.tensor([-1 if image.label is None else image.label for image in index.images]).long()


def shape_of(support: Path | None, unlabelled: Path | None = None, test: Path | None = None) -> JobShape:
    """The counts that a method plans with. Without labelled images the classes are the teacher's: 0 here.

    Of images with masks `smallest_class` counts those that show the class.
    """
    index = archive.read_index(support / archive.FILE_NAME) if support else archive.ArchiveIndex((), ())
    classes = len(index.classes)
    if support and index.masked:
        counts = masks.images_showing(masks.stream(support), classes)
    else:
        counts = torch.bincount(
            torch.tensor([image.label for image in index.images]).long(), minlength=classes
        )
    return JobShape(
        classes=classes,
        support=len(index.images),
        smallest_class=int(counts.min()) if support else 0,
        unlabelled=len(read_labels(unlabelled)) if unlabelled else 0,
        test=len(read_labels(test)) if test else 0,
    )


def draw_support(labels: Labels, shots: int, seed: int) -> torch.Tensor:
    """Positions int64 [classes * shots] of `shots` images drawn from each class, in order of the classes."""
    order = torch.randperm(len(labels), generator=generator(seed, "support"))
    drawn = []
    for label in range(int(labels.max()) + 1):
        members = order[labels[order] == label]
        if len(members) < shots:
            raise DataError(f"class {label} has {len(members)} images; {shots} are to be drawn")
        drawn.append(members[:shots])
    return torch.cat(drawn)


def stratified_folds(labels: Labels, folds: int, seed: int) -> torch.Tensor:
    """The fold int64 [N] of each image: every class is spread evenly over the folds.

    Classes start at different folds, so that folds are of equal size to within one image.
    Raises `DataError` for a class with fewer than 2 images: held back, it would have none to learn from.
    """
    order = torch.randperm(len(labels), generator=generator(seed, "folds"))
    assigned = torch.empty_like(labels)
    start = 0
    for label in torch.unique(labels).tolist():
        members = order[labels[order] == label]
        if len(members) < 2:
            raise DataError(
                f"class {label} has {len(members)} labelled image; cross-validation needs 2 of each class",
                "Add images to the class, or add a test split.",
            )
        assigned[members] = (torch.arange(len(members)) + start) % folds
        start += len(members)
    return assigned


def pack(folder: Path, classes: Sequence[str], files: Sequence[Path], labels: Sequence[int | None]) -> Path:
    """Write images from `files` as the split `folder`; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = tuple(
        archive.ArchivedImage(f"{number:06d}{path.suffix.lower()}", label, f"{path.parent.name}/{path.name}")
        for number, (path, label) in enumerate(zip(files, labels, strict=True))
    )
    index = archive.ArchiveIndex(tuple(classes), entries)
    archive.write(folder / archive.FILE_NAME, index, (path.read_bytes() for path in files))
    return folder


def pack_folder(root: Path, out: Path) -> dict[str, Path]:
    """Splits from a folder of class folders, with optional `test/` (class folders) and `unlabelled/`.

    With `unlabelled/` there may be no class folder; the classes are then those of `test/`, if there is one.
    Returns the folders written under `out`: `support`, `test` and `unlabelled`, where there are any.
    """
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = [name for name in names if name not in ("test", "unlabelled")]
    files = image_files(root / "unlabelled") if "unlabelled" in names else []
    if len(classes) == 1 or not (classes or files):
        raise DataError(
            f"{root.name} has {len(classes)} class folders; at least 2 are needed",
            "Images without labels belong into unlabelled/.",
        )
    written = {"support": _pack_classes(out / "support", classes, root)} if classes else {}
    if "test" in names:
        named = classes or sorted(path.name for path in (root / "test").iterdir() if path.is_dir())
        if named:
            written["test"] = _pack_classes(out / "test", named, root / "test")
    if "unlabelled" in names:
        written["unlabelled"] = pack(out / "unlabelled", classes, files, [None] * len(files))
    return written


def _pack_classes(out: Path, classes: Sequence[str], root: Path) -> Path:
    files, labels = [], []
    for label, name in enumerate(classes):
        found = image_files(root / name) if (root / name).is_dir() else []
        files += found
        labels += [label] * len(found)
    return pack(out, classes, files, labels)


def image_files(folder: Path) -> list[Path]:
    """The images below `folder`, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
