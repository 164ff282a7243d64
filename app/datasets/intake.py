"""From a hostile upload to verified images: checks names, decodes in child processes, writes a split's archive."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from app.datasets import archive_reader, duplicates, layout, mask_checks, report
from app.datasets.decoding import ACCEPTED, CleanImage, Decoder, ImageRejected, kind
from app.datasets.layout import Placed, Split
from app.datasets.members import Member, Part, Upload, pointer
from app.datasets.receive import too_many_files
from app.datasets.report import Examined, ExaminedMask, Findings
from app.errors import Finding, Invalid
from app.settings import Settings
from models.data import archive
from models.pipeline import Task

#: Decoders that work on one upload at a time.
DECODERS = min(2, os.cpu_count() or 1)
_SPLITS: tuple[Split, ...] = ("support", "test", "unlabelled")


@dataclass(frozen=True)
class StoredImage:
    """An image of a split's archive: its member, its label's class, its name, its size in pixels, its mask's member."""

    file: str
    label: str | None
    name: str
    width: int
    height: int
    mask: str | None = None


@dataclass(frozen=True)
class VerifiedSplit:
    path: Path
    images: tuple[StoredImage, ...]


@dataclass(frozen=True)
class Verified:
    """A checked data set, as files in the upload's folder."""

    task: Task
    classes: tuple[str, ...]
    splits: dict[Split, VerifiedSplit]
    smallest_class: int
    report: dict[str, Any]


def verify(upload: Upload, settings: Settings) -> Verified:
    """Check everything. Raises `Invalid` with every finding, or `UnsupportedMedia`; blocks for a while."""
    with _members(upload, settings) as members:
        placed = layout.arrange(members)
        findings = Findings(faults=list(placed.errors), warnings=list(placed.warnings))
        _check_numbers(findings, placed, members, settings)
        findings.refuse()
        findings.faults += placed.faults
        clean = upload.folder / "clean"
        examined = _examine(placed.files, clean, findings, settings)
        if placed.task == "segmentation":
            placed = replace(placed, classes=mask_checks.names_of(findings, placed.class_names, examined))
    kept = duplicates.drop(findings, [item for item in examined if item.image is not None])
    if placed.task == "segmentation":
        mask_checks.check(findings, placed.classes, kept, settings)
    elif placed.labelled:
        report.check_counts(findings, placed.classes, kept, settings)
    else:
        report.check_unlabelled(findings, placed.classes, kept)
    findings.refuse()
    splits = {split: _write(upload.folder, split, _named(split, placed), kept, clean) for split in _SPLITS}
    document = report.document(findings, placed.classes, len(splits["unlabelled"].images), placed.skipped)
    return Verified(
        placed.task,
        placed.classes,
        {split: verified for split, verified in splits.items() if verified.images},
        min((entry["shots"] for entry in document["classes"]), default=0),
        document,
    )


def _named(split: Split, placed: layout.Layout) -> tuple[str, ...]:
    """The classes in a split's index: unlabelled images know none where only test images have labels."""
    return placed.classes if placed.labelled or split == "test" else ()


@contextmanager
def _members(upload: Upload, settings: Settings) -> Iterator[list[Member]]:
    parts = [part for part in upload.parts if part.name or part.size]
    if _is_archive(upload, parts):
        limits = {"max_files": settings.max_images, "max_file_bytes": settings.max_image_bytes}
        with archive_reader.members(
            upload.path, max_total_bytes=2 * settings.max_upload_bytes, **limits
        ) as members:
            yield members
    else:
        yield _named_files(upload, parts)


def _is_archive(upload: Upload, parts: Sequence[Part]) -> bool:
    """One file that is not an image of a class folder. It starts at 0, since nothing else was received."""
    return len(parts) == 1 and (
        b"/" not in parts[0].name or kind(upload.content(parts[0], 262)) == "zip archive"
    )


def _named_files(upload: Upload, parts: Sequence[Part]) -> list[Member]:
    findings = []
    members = []
    for part in parts:
        try:
            name = part.name.decode()
        except UnicodeDecodeError:
            shown = part.name.decode("utf-8", "replace")
            detail = f"{shown}: its name is not UTF-8. Rename it."
            findings.append(Finding("name_encoding", pointer(shown), detail))
        else:
            name = name.removeprefix("./")
            members.append(Member(name, part.size, lambda part=part: upload.content(part)))  # type: ignore[misc]
    Findings(faults=findings).refuse()
    return members


def _check_numbers(
    findings: Findings, placed: layout.Layout, members: Sequence[Member], settings: Settings
) -> None:
    """What is not even worth decoding."""
    if len(placed.files) > settings.max_images:
        raise too_many_files(settings.max_images, "images")
    if len(placed.classes) > settings.max_classes:
        detail = (
            f"The upload has {len(placed.classes):,} classes; at most {settings.max_classes} are possible. "
            "Merge classes, or make several data sets."
        )
        findings.faults.append(Finding("too_many_classes", "/classes", detail))
    if not members:
        detail = (
            "The upload holds no file. Send one zip of class folders, or files named class/file; "
            "images without labels are named unlabelled/file."
        )
        raise Invalid(detail, code="no_files", findings=(Finding("no_files", "/files", detail),))


def _examine(files: Sequence[Placed], clean: Path, findings: Findings, settings: Settings) -> list[Examined]:
    """Decode every file, in parallel; the clean images go to one file, one after the other."""
    with clean.open("wb") as output, ExitStack() as decoders, ThreadPoolExecutor(DECODERS, "decode") as pool:
        examined = list(pool.map(_Examiner(output, settings, decoders).examine, files))
    for item in examined:
        report.note_image(findings, item)
        if item.image is not None:
            report.note_extension(findings, item.file, item.found)
    nested = [item.fault for item in examined if item.fault is not None and item.fault.code == "zip_nested"]
    findings.faults += nested
    findings.faults += [item.mask_fault for item in examined if item.mask_fault is not None]
    findings.warnings = [warning for warning in findings.warnings if warning not in nested]
    return examined


class _Examiner:
    """Shared by the decoding threads; each has a decoder of its own."""

    def __init__(self, output: BinaryIO, settings: Settings, decoders: ExitStack) -> None:
        self._output = output
        self._settings = settings
        self._decoders = decoders
        self._lock = threading.Lock()
        self._own = threading.local()

    def examine(self, file: Placed) -> Examined:
        try:
            content, found = self._content(file.member)
            image = self._decoder().clean(content)
        except ImageRejected as rejected:
            detail = f"{file.member.name}: {rejected.detail}"
            return Examined(
                file, None, "", "", 0, 0, Finding(rejected.code, pointer(file.member.name), detail)
            )
        digest, offset = self._keep(image.content)
        examined = Examined(
            file, replace(image, content=b""), found, digest, offset, len(image.content), None
        )
        if file.mask is None:
            return examined
        try:
            return replace(examined, mask=self._mask(file.mask, image))
        except ImageRejected as rejected:
            detail = f"{file.mask.name}: {rejected.detail}"
            return replace(examined, mask_fault=Finding(rejected.code, pointer(file.mask.name), detail))

    def _keep(self, encoded: bytes) -> tuple[str, int]:
        """Write a clean file; its digest, and where it lies."""
        with self._lock:
            offset = self._output.tell()
            self._output.write(encoded)
        return hashlib.sha256(encoded).hexdigest(), offset

    def _mask(self, member: Member, image: CleanImage) -> ExaminedMask:
        content, found = self._content(member)
        if found != "PNG":
            raise ImageRejected(
                "mask_format", f"it is a {found} file. Save masks as PNG: other formats change values."
            )
        mask = self._decoder().clean_mask(content, image.width, image.height)
        whole = (image.original_width, image.original_height)
        if mask.original != whole:
            raise ImageRejected("mask_size", _other_size(mask.original, whole, image.rotated))
        return ExaminedMask(mask.values, *self._keep(mask.content), len(mask.content))

    def _content(self, member: Member) -> tuple[bytes, str]:
        if member.size > self._settings.max_image_bytes:
            raise ImageRejected(
                "image_too_large",
                f"it has {member.size / 2**20:,.1f} MiB; at most "
                f"{self._settings.max_image_bytes / 2**20:,.1f} MiB are accepted. Scale it down.",
            )
        if not member.size:
            raise ImageRejected("image_empty", "it is empty (0 bytes). Export it again from the original.")
        try:
            content = member.read()
        except ValueError as error:
            raise ImageRejected(
                "image_corrupt", f"the zip holds it damaged: {error}. Zip it again."
            ) from None
        found = kind(content)
        if found.endswith("archive"):
            raise ImageRejected(
                "zip_nested", f"it is a {found} inside the upload. Unpack it and send its images."
            )
        if found not in ACCEPTED:
            what = f"it is a {found} file" if found else "it is no image of a known format"
            raise ImageRejected(
                "image_format", f"{what}. Only JPEG, PNG and WebP are accepted; convert it or remove it."
            )
        return content, found

    def _decoder(self) -> Decoder:
        if not hasattr(self._own, "decoder"):
            decoder = Decoder(
                max_pixels=self._settings.max_image_pixels, timeout_s=self._settings.image_timeout_s
            )
            with self._lock:
                self._own.decoder = self._decoders.enter_context(decoder)
        made: Decoder = self._own.decoder
        return made


def _other_size(size: tuple[int, int], image: tuple[int, int], rotated: bool) -> str:
    detail = f"it has {size[0]} x {size[1]} pixels, and its image {image[0]} x {image[1]}. "
    if rotated and size == image[::-1]:
        return detail + "The image is turned as its EXIF orientation asks; turn the mask alike."
    return detail + "Make the mask of the image as it is, without scaling or cropping."


def _write(
    folder: Path, split: Split, classes: Sequence[str], kept: Sequence[Examined], clean: Path
) -> VerifiedSplit:
    """The split's archive: by class, then by name."""
    items = sorted(
        (item for item in kept if item.file.split == split),
        key=lambda item: (item.file.label or "", item.file.name, item.digest),
    )
    stored = tuple(
        StoredImage(
            f"{number:05d}{item.image.suffix}",
            item.file.label,
            item.file.name,
            item.image.width,
            item.image.height,
            None if item.mask is None else f"{number:05d}.mask.png",
        )
        for number, item in enumerate(items)
        if item.image is not None
    )
    path = folder / f"{split}.zip"
    if stored:
        numbers = {name: number for number, name in enumerate(classes)}
        images = tuple(
            archive.ArchivedImage(
                image.file, None if image.label is None else numbers[image.label], image.name, image.mask
            )
            for image in stored
        )
        with clean.open("rb") as source:
            contents = (
                os.pread(source.fileno(), part.size, part.offset)
                for item in items
                for part in (item, item.mask)
                if part is not None
            )
            archive.write(path, archive.ArchiveIndex(tuple(classes), images), contents)
    return VerifiedSplit(path, stored)
