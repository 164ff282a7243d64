"""What a data set's owner is told: a count for every class, and every single thing found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.datasets.decoding import ACCEPTED, CleanImage
from app.datasets.layout import Placed
from app.datasets.members import class_pointer, pointer
from app.errors import MOST_FINDINGS, Finding, Invalid
from app.settings import Settings

#: Images with a shorter side are reported: the smallest students see 32 pixels.
TINY_SIDE = 32
#: Fewest images of a data set in which none has a label.
MIN_UNLABELLED = 10
_DAMAGED = {"image_corrupt", "image_empty"}


@dataclass(frozen=True)
class ExaminedMask:
    """A mask after decoding, with the values that it has; `digest`, `offset` and `size` as of its image."""

    values: frozenset[int]
    digest: str
    offset: int
    size: int


@dataclass(frozen=True)
class Examined:
    """A file after decoding: the clean image, or why there is none; its mask, or why the data set is refused."""

    file: Placed
    image: CleanImage | None  # without its bytes
    found: str  # its format as uploaded
    digest: str  # of the clean image's bytes; equal pixels have equal digests
    offset: int  # in the file of clean images
    size: int
    fault: Finding | None
    mask: ExaminedMask | None = None
    mask_fault: Finding | None = None


@dataclass
class Findings:
    """`faults` refuse the data set; `warnings` tell what was left out or changed; `counts`: (class, what)."""

    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    counts: Counter[tuple[str | None, str]] = field(default_factory=Counter)

    def refuse(self) -> None:
        """Raise `Invalid` if there is a fault, with every finding: what refuses first."""
        if not self.faults:
            return
        codes = {fault.code for fault in self.faults}
        more = len(self.faults) - 1
        raise Invalid(
            self.faults[0].detail + (f" There are {more} more reasons, see errors." if more else ""),
            code=codes.pop() if len(codes) == 1 else "dataset_invalid",
            findings=capped([*self.faults, *self.warnings]),
        )


def capped(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    if len(findings) <= MOST_FINDINGS:
        return tuple(findings)
    rest = len(findings) - MOST_FINDINGS
    last = Finding("more_findings", "", f"{rest} more findings are not listed.")
    return (*findings[:MOST_FINDINGS], last)


def note_image(findings: Findings, examined: Examined) -> None:
    """Count one decoded file and report what is odd about it."""
    file, image = examined.file, examined.image
    if examined.fault is not None:
        findings.warnings.append(examined.fault)
        what = "corrupt" if examined.fault.code in _DAMAGED else "refused"
        findings.counts[file.label, what] += 1
        return
    assert image is not None
    if image.rotated:
        findings.counts[file.label, "rotated"] += 1
    if min(image.original_width, image.original_height) < TINY_SIDE:
        findings.counts[file.label, "tiny"] += 1
        size = f"{image.original_width} x {image.original_height}"
        findings.warnings.append(
            _about(file, "image_tiny", f"it has only {size} pixels; kept, but it shows little.")
        )


def note_extension(findings: Findings, file: Placed, found: str) -> None:
    suffix = "." + file.name.rpartition(".")[2].casefold()
    if suffix not in ACCEPTED[found]:
        findings.warnings.append(
            _about(
                file, "image_extension", f"its name does not say so, but it is a {found} image; kept as one."
            )
        )


def check_counts(
    findings: Findings, classes: Sequence[str], kept: Iterable[Examined], settings: Settings
) -> None:
    """Every class needs enough images and must not have too many."""
    shots, tests = _counts(findings, classes, kept)
    tested = any(tests[name] for name in classes)
    if len(classes) < 2:
        names = f"only the class '{classes[0]}'" if classes else "no class"
        findings.faults.append(
            Finding(
                "too_few_classes",
                "/classes",
                f"The upload has {names}; at least 2 are needed. Put the images of each class in a folder of its own. "
                f"Images without labels go to unlabelled/; {MIN_UNLABELLED} of them alone are a data set, too.",
            )
        )
    for name in classes:
        if shots[name] < fewest_shots(settings, tested):
            images = "1 usable image" if shots[name] == 1 else f"{shots[name]} usable images"
            detail = f"Class '{name}' has {images}; {too_few(settings, tested)}. Add some, or remove {name}/."
            findings.faults.append(Finding("too_few_shots", class_pointer(name), detail))
        elif shots[name] > settings.max_shots:
            detail = (
                f"Class '{name}' has {shots[name]} labelled images; at most {settings.max_shots} are used. "
                f"Keep the {settings.max_shots} best in {name}/ and move the rest to unlabelled/, where they help too."
            )
            findings.faults.append(Finding("too_many_shots", class_pointer(name), detail))
        if tests and not tests[name]:
            detail = f"Class '{name}' has no test image, so its accuracy will not be known. Add some to test/{name}/."
            findings.warnings.append(Finding("class_without_test_images", class_pointer(name), detail))


def fewest_shots(settings: Settings, tested: bool) -> int:
    """Labelled images that a class needs. Without test images accuracy comes from cross-validation, which takes two."""
    return settings.min_shots if tested else max(settings.min_shots, 2)


def too_few(settings: Settings, tested: bool) -> str:
    """How many are needed, and whether test images would do instead."""
    fewest = fewest_shots(settings, tested)
    return f"at least {fewest} are needed" + ("" if fewest == settings.min_shots else " without test images")


def check_unlabelled(findings: Findings, classes: Sequence[str], kept: Sequence[Examined]) -> None:
    """Where no image has a label, the unlabelled ones must be enough. `classes`: those of the test split."""
    _counts(findings, classes, kept)
    images = sum(item.file.split == "unlabelled" for item in kept)
    if images < MIN_UNLABELLED:
        detail = (
            f"No image has a label, and unlabelled/ has {images} usable images; at least {MIN_UNLABELLED} are needed. "
            "Add some, or put labelled images in one folder for each class."
        )
        findings.faults.append(Finding("too_few_unlabelled", "/files", detail))
    detail = (
        "No image has a label. Such a data set fits methods that learn from the teacher's answers alone, which is "
        "'fsbbt'; others need labelled images, in one folder for each class."
    )
    findings.warnings.append(Finding("no_labelled_images", "/classes", detail))


def _counts(
    findings: Findings, classes: Sequence[str], kept: Iterable[Examined]
) -> tuple[Counter[str], Counter[str]]:
    """Images to learn from and test images by class, which also go into the report."""
    shots: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for item in kept:
        if item.file.label is not None:
            (shots if item.file.split == "support" else tests)[item.file.label] += 1
    for name in classes:
        findings.counts[name, "shots"] = shots[name]
        findings.counts[name, "test_images"] = tests[name]
    return shots, tests


def document(
    findings: Findings, classes: Sequence[str], unlabelled: int, skipped: Sequence[str]
) -> dict[str, Any]:
    """The report as it is stored and answered."""

    def counts(label: str | None, *kinds: str) -> dict[str, int]:
        return {kind: findings.counts[label, kind] for kind in kinds}

    found = ("corrupt", "refused", "duplicates", "tiny", "rotated")
    return {
        "verdict": "ok_with_warnings" if findings.warnings else "ok",
        "classes": [{"name": name, **counts(name, "shots", "test_images", *found)} for name in classes],
        "unlabelled": {"images": unlabelled, **counts(None, *found)},
        "skipped": list(skipped[:MOST_FINDINGS]),
        "skipped_count": len(skipped),
        "warnings": [vars(finding) for finding in capped(findings.warnings)],
    }


def _about(file: Placed, code: str, detail: str) -> Finding:
    return Finding(code, pointer(file.member.name), f"{file.member.name}: {detail}")
