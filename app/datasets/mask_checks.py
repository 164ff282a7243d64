"""Whether masks and their classes make a data set: what their values mean, and that each class can be learnt."""

from __future__ import annotations

from collections.abc import Sequence

from app.datasets.members import Member, class_pointer, pointer
from app.datasets.report import Examined, ExaminedMask, Findings, fewest_shots, too_few
from app.errors import Finding
from app.settings import Settings
from models.data import class_names
from models.data.archive import IGNORED
from models.errors import DataError

_MOST_LISTED = 10


def names_of(findings: Findings, file: Member | None, images: Sequence[Examined]) -> tuple[str, ...]:
    """The classes that `classes.txt` names, else those of the values 0 to the highest in the masks."""
    if file is None:
        if any(item.mask_fault for item in images):
            return ()  # values of masks that cannot be read would look like gaps
        values = sorted({value for item in images if item.mask for value in item.mask.values} - {IGNORED})
        if values != list(range(len(values))):
            findings.faults.append(_gaps(values))
            return ()
        return class_names.of_values(len(values) - 1)
    if file.size > class_names.MAX_BYTES:
        detail = (
            f"{file.name}: it has {file.size:,} bytes, and names of classes have {class_names.MAX_BYTES:,} at most. "
            "Write one name a line."
        )
        findings.faults.append(Finding("class_names", pointer(file.name), detail))
        return ()
    try:
        return class_names.read(file.read())
    except DataError as error:
        detail = f"{error.detail}. {error.hint}"
        findings.faults.append(Finding("class_names", pointer(file.name), detail))
    except ValueError as error:
        detail = f"{file.name}: the zip holds it damaged: {error}. Zip it again."
        findings.faults.append(Finding("class_names", pointer(file.name), detail))
    return ()


def check(findings: Findings, classes: Sequence[str], kept: Sequence[Examined], settings: Settings) -> None:
    """Add what refuses the data set; count for each class the images whose masks show it."""
    if (not classes and findings.faults) or any(item.mask_fault for item in kept):
        return  # what is wrong has been said, and what would be counted is not there
    shown: dict[str, list[frozenset[int]]] = {"support": [], "test": [], "unlabelled": []}
    for item in kept:
        if item.mask is not None:
            findings.faults += _unknown_values(item, item.mask, len(classes))
            shown[item.file.split].append(item.mask.values)
    for number, name in enumerate(classes):
        for split, what in (("support", "shots"), ("test", "test_images")):
            findings.counts[name, what] = sum(number in values for values in shown[split])
        if not findings.counts[name, "shots"]:
            findings.faults.append(_not_shown(number, name))
        elif shown["test"] and not findings.counts[name, "test_images"]:
            detail = f"Class '{name}' is in no mask of test/masks/, so that how well it is found will not be known."
            findings.warnings.append(Finding("class_without_test_images", class_pointer(name), detail))
    if shown["test"] and not any(values - {IGNORED} for values in shown["test"]):
        detail = f"The masks in test/masks/ show no class: all pixels are {IGNORED}. Correct them, or remove test/."
        findings.faults.append(Finding("test_masks_without_class", "/files", detail))
    findings.faults += _shots_out_of_bounds(
        len(shown["support"]), len(classes), bool(shown["test"]), settings
    )
    if len(classes) < 2:
        findings.faults.append(_too_few_classes(classes, shown["support"]))
    if len(classes) > settings.max_classes:
        detail = (
            f"The masks have {len(classes)} classes; at most {settings.max_classes} are possible. Merge some."
        )
        findings.faults.append(Finding("too_many_classes", "/classes", detail))


def _shots_out_of_bounds(shots: int, classes: int, tested: bool, settings: Settings) -> list[Finding]:
    """Too few or too many images with masks. A mask shows several classes: as many are possible as in class folders."""
    most = settings.max_shots * classes
    if shots < fewest_shots(settings, tested):
        images = "1 usable image with a mask" if shots == 1 else f"{shots} usable images with masks"
        detail = f"The upload has {images}; {too_few(settings, tested)}. Add some to images/ and masks/."
        return [Finding("too_few_shots", "/files", detail)]
    if shots > most and classes > 1:
        detail = (
            f"The upload has {shots:,} usable images with masks to learn from; at most {most:,} are possible, "
            f"{settings.max_shots} for each of {classes} classes. Keep the best in images/ and masks/ and move the "
            "other images to unlabelled/, where they help too."
        )
        return [Finding("too_many_shots", "/files", detail)]
    return []


def _unknown_values(item: Examined, mask: ExaminedMask, classes: int) -> list[Finding]:
    """Of a mask with values that are no class."""
    unknown = sorted(mask.values - set(range(classes)) - {IGNORED})
    if not unknown or item.file.mask is None:
        return []
    name = item.file.mask.name
    what = "value" if len(unknown) == 1 else "values"
    detail = (
        f"{name}: it has the {what} {_listed(unknown)}, and {class_names.FILE_NAME} names {classes} classes, which are "
        f"0 to {classes - 1}; {IGNORED} is for pixels whose class is not known. Correct the mask, or name the class."
    )
    return [Finding("mask_value", pointer(name), detail)]


def _gaps(values: Sequence[int]) -> Finding:
    detail = (
        f"The masks have the values {_listed(values)}. Without {class_names.FILE_NAME}, values are the numbers of the "
        f"classes, 0, 1, 2, ... without gaps, and {IGNORED} where the class is not known. Renumber them, or name the "
        f"class of each value, one a line, in {class_names.FILE_NAME}."
    )
    return Finding("mask_values_gap", "/files", detail)


def _not_shown(number: int, name: str) -> Finding:
    detail = (
        f"Class '{name}' (value {number}) is in no mask to learn from. Add images that show it to images/ and masks/, "
        "or leave the class out."
    )
    return Finding("class_without_pixels", class_pointer(name), detail)


def _too_few_classes(classes: Sequence[str], shown: Sequence[frozenset[int]]) -> Finding:
    detail = f"The masks show {'only one class' if classes else 'no class'}; at least 2 are needed."
    if any(IGNORED in values for values in shown):
        detail += f" {IGNORED} stands for pixels whose class is not known: where it means an object, write 1 instead."
    return Finding("too_few_classes", "/classes", detail)


def _listed(values: Sequence[int]) -> str:
    more = len(values) - _MOST_LISTED
    return ", ".join(map(str, values[:_MOST_LISTED])) + (f" and {more} more" if more > 0 else "")
