"""Answers about data sets."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.schemas import Answer, Time

SplitName = Literal["support", "test", "unlabelled"]


class FindingAnswer(Answer):
    code: str = Field(description="Stable name of what was found.")
    pointer: str = Field(description="JSON pointer: /files/class~1file.jpg or /classes/class")
    detail: str


class Counts(Answer):
    corrupt: int = Field(description="Files that could not be decoded; left out.")
    refused: int = Field(description="Files of another format, too large or animated; left out.")
    duplicates: int = Field(description="Images that were there already; left out.")
    tiny: int = Field(description="Images with a side below 32 pixels; kept.")
    rotated: int = Field(description="Images turned upright as their EXIF orientation asks.")


class ClassReport(Counts):
    name: str
    shots: int = Field(
        description="Labelled images to learn from; of images with masks those that show the class."
    )
    test_images: int


class UnlabelledReport(Counts):
    """Of images that are of no one class: unlabelled ones, and those with masks."""

    images: int = Field(description="Unlabelled images.")


class Report(Answer):
    verdict: Literal["ok", "ok_with_warnings"]
    classes: list[ClassReport]
    unlabelled: UnlabelledReport
    skipped: list[str] = Field(description="Hidden files, __MACOSX, Thumbs.db and the like.")
    skipped_count: int
    warnings: list[FindingAnswer]


class SplitAnswer(Answer):
    images: int
    bytes: int
    digest: str = Field(description="sha-256 of the stored archive.")


class DatasetSummary(Answer):
    object: Literal["dataset"]
    id: str
    name: str
    digest: str = Field(description="sha-256 over classes and splits: equal content, equal digest.")
    task: Literal["classification", "segmentation"] = Field(
        description="Segmentation where its images have masks, which methods of that task need and others refuse."
    )
    classes: list[str] = Field(
        description="Of the labelled images; of the test images, where no other has a label."
    )
    splits: dict[SplitName, SplitAnswer]
    smallest_class: int = Field(
        description="Labelled images of the class that has, or in masks is shown by, fewest; 0 where there are none."
    )
    created_at: Time


class DatasetAnswer(DatasetSummary):
    report: Report


class ImageAnswer(Answer):
    object: Literal["image"]
    id: str
    split: SplitName
    label: str | None
    name: str = Field(description="Path as uploaded, below its split.")
    width: int
    height: int
    url: str
    mask_url: str | None = Field(description="Its mask: an 8-bit grey PNG of the image's size.")
