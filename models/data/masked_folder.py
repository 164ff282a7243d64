"""A folder of images with masks as splits, for use without the service, which has checks of its own.

images/NAME.jpg        masks/NAME.png         to learn from
test/images/NAME.jpg   test/masks/NAME.png    to be examined on (optional)
unlabelled/NAME.jpg                           (optional)
classes.txt                                   names, one a line, the first for value 0 (optional)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from models.arrays import Mask
from models.data import archive, class_names, fewshot, images, masks
from models.data.archive import IGNORED, ArchivedImage, ArchiveIndex
from models.errors import DataError


def is_one(root: Path) -> bool:
    """Whether `root` holds images with masks rather than class folders."""
    return (root / "images").is_dir() and (root / "masks").is_dir()


def pack(root: Path, out: Path) -> dict[str, Path]:
    """Write the splits `support`, `test` and `unlabelled`, as far as there are any, under `out`; their folders.

    Raises `DataError` for an image without mask and the reverse, a mask of another size, a value that is no class.
    """
    pairs = {"support": _pairs(root)}
    if (root / "test").is_dir():
        pairs["test"] = _pairs(root / "test")
    found = {split: [_mask_of(*pair) for pair in of_split] for split, of_split in pairs.items()}
    names = _class_names(root, [mask for of_split in found.values() for mask in of_split])
    _check_values(names, pairs, found)
    written = {}
    for split, of_split in pairs.items():
        written[split] = _write(out / split, names, of_split, found[split])
    if (root / "unlabelled").is_dir():
        files = fewshot.image_files(root / "unlabelled")
        written["unlabelled"] = fewshot.pack(out / "unlabelled", names, files, [None] * len(files))
    return written


def _pairs(root: Path) -> list[tuple[Path, Path]]:
    """Images and their masks, which have the same name but for the suffix."""
    pictures = _by_stem(fewshot.image_files(root / "images"))
    found = _by_stem(path for path in fewshot.image_files(root / "masks") if path.suffix.lower() == ".png")
    for name in sorted(pictures.keys() ^ found.keys()):
        lone, where = (pictures[name], "masks") if name in pictures else (found[name], "images")
        raise DataError(
            f"{lone.parent.name}/{lone.name} has no counterpart in {where}/", "Add it, or remove this one."
        )
    if not pictures:
        raise DataError(f"{root.name}/images/ holds no image", "Add some, and their masks to masks/.")
    return [(pictures[name], found[name]) for name in sorted(pictures)]


def _by_stem(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by their name without suffix. Raises `DataError` for two of one name: they would share a mask."""
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            first, second = (f"{each.parent.name}/{each.name}" for each in (found[path.stem], path))
            raise DataError(
                f"{first} and {second} have the same name but for folder and suffix",
                "Rename one of them, and its mask.",
            )
        found[path.stem] = path
    return found


def _mask_of(picture: Path, mask: Path) -> Mask:
    values = masks.decode(mask.read_bytes(), f"masks/{mask.name}")
    height, width = images.decode(picture.read_bytes(), picture.name).shape[1:]
    if values.shape != (height, width):
        raise DataError(
            f"masks/{mask.name} has {values.shape[1]} x {values.shape[0]} pixels, its image {width} x {height}",
            "Make the mask of the image's size.",
        )
    return values


def _class_names(root: Path, found: list[Mask]) -> tuple[str, ...]:
    """The names in `classes.txt`, else "class 0" and so on up to the highest value."""
    if (root / class_names.FILE_NAME).is_file():
        return class_names.read((root / class_names.FILE_NAME).read_bytes())
    known = [mask[mask != IGNORED] for mask in found]
    return class_names.of_values(max((int(values.max()) for values in known if len(values)), default=-1))


def _check_values(
    names: tuple[str, ...], pairs: dict[str, list[tuple[Path, Path]]], found: dict[str, list[Mask]]
) -> None:
    for split, of_split in pairs.items():
        for (_, path), mask in zip(of_split, found[split], strict=True):
            strange = mask[(mask >= len(names)) & (mask != IGNORED)]
            if len(strange):
                raise DataError(
                    f"masks/{path.name} has the value {int(strange[0])}, which is none of the {len(names)} classes",
                    f"Values are 0 to {len(names) - 1}, and {IGNORED} where the class is not known.",
                )
    shown = masks.images_showing(found["support"], len(names))
    missing = [name for name, count in zip(names, shown.tolist(), strict=True) if count == 0]
    if missing or len(names) < 2:
        what = f"no mask shows '{missing[0]}'" if missing else f"masks show {len(names)} classes"
        raise DataError(f"{what}; at least 2 classes must be learnt", "Add images with masks that show it.")


def _write(folder: Path, names: tuple[str, ...], pairs: list[tuple[Path, Path]], found: list[Mask]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entries = tuple(
        ArchivedImage(
            f"{number:06d}{path.suffix.lower()}", None, f"images/{path.name}", f"{number:06d}.mask.png"
        )
        for number, (path, _) in enumerate(pairs)
    )
    contents = (
        content
        for (path, _), mask in zip(pairs, found, strict=True)
        for content in (path.read_bytes(), masks.encode(mask))
    )
    archive.write(folder / archive.FILE_NAME, ArchiveIndex(names, entries), contents)
    return folder
