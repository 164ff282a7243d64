"""Answers about what can be ordered."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.schemas import Answer
from models.pipeline import Task


class StageAnswer(Answer):
    name: str
    queue: Literal["gpu", "cpu"]
    params: str | None = Field(description="The group of parameters that this stage reads.")
    inputs: list[str]
    optional: list[str]
    output: str


class MethodAnswer(Answer):
    object: Literal["method"]
    id: str
    title: str
    source: str = Field(description="The paper.")
    task: Task = Field(
        description="What its students tell of an image. Masks are for segmentation, and only for that."
    )
    needs: list[str] = Field(description="What it asks of a teacher; a teacher's `offers` must include them.")
    student: str | None = Field(
        description="The one student that it makes, out of its teacher. Null: any of GET /v1/architectures."
    )
    stages: list[StageAnswer]
    presets: dict[str, dict[str, Any]] = Field(
        description="What each preset sets; the rest keeps its default."
    )
    params: dict[str, Any] = Field(description="JSON schema of the `params` of a job.")


class GeneratorAnswer(Answer):
    """A text-to-image model that methods such as tint make images with."""

    object: Literal["generator"]
    id: str
    title: str
    kind: Literal["embedded", "local", "hub"]
    source: str = Field(description="Hub id, 'local' for a folder of the operator's, or 'embedded'.")
    revision: str | None = Field(description="The pinned commit at the hub, else a name for the weights.")
    resolution: int = Field(description="Side in pixels of its images.")
    parameters: int | None = Field(description="Learned numbers, where they are known.")
    licence: str
    licence_url: str
    resident_mib: int = Field(description="Memory that the loaded networks take, about; 0: not known.")
    available: bool
    reason: str = Field(description="Where it comes from, or why it cannot be had now.")


class ArchitectureAnswer(Answer):
    object: Literal["architecture"]
    id: str
    title: str
    family: str
    parameters: int = Field(description="Learned numbers, with 10 classes.")
    macs: int = Field(description="Multiply-adds for one image of input_size.")
    input_size: int = Field(description="Side in pixels of its images, unless a job asks for another.")
    min_input_size: int
    max_input_size: int
    licence: str
