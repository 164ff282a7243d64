"""Teachers of which only answers are known: an ONNX file or an HTTP endpoint of the user's. Declares only.

A black box is shown images of one size and answers for its own classes, in its own order. What it answers becomes
one float32 row a image, over its classes (`models.teachers.ledger`).
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from models.pipeline import TeacherOutput, digest

#: The uploaded ONNX file, beside `teacher.json` in the teacher's source folder.
MODEL_FILE = "model.onnx"
#: Most images of one call.
MOST_IN_A_CALL = 256
#: Goes into the keys of kept answers: raise it when code changes how images are prepared or answers become rows.
ANSWERS_VERSION = 1

ClassName = Annotated[str, StringConstraints(min_length=1, max_length=100)]

Pixels = NDArray[np.uint8]  # [N, H, W, 3], RGB
Answers = NDArray[np.float32]  # [N, C], see AnswerKind


class AnswerKind(StrEnum):
    """What a black box says about an image, and the row that is kept of it.

    probabilities: as they are. logits: their softmax. top_k: probabilities of some classes; NaN for the others.
    label: 1 for the class it names, 0 for the others.
    """

    PROBABILITIES = "probabilities"
    LOGITS = "logits"
    TOP_K = "top_k"
    LABEL = "label"


class WireProtocol(StrEnum):
    """How an endpoint wants to be asked; `models/teachers/http_protocols.py` has an adapter for each."""

    DRAM = "dram"
    KSERVE_V2 = "kserve_v2"
    KSERVE_V2_BINARY = "kserve_v2_binary"
    TORCHSERVE = "torchserve"
    TENSORFLOW_SERVING = "tensorflow_serving"


class InputFormat(BaseModel):
    """The images a black box expects: squeezed to this size, scaled to `range`, then `(x - mean) / std`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    height: int = Field(ge=1, le=1024)
    width: int = Field(ge=1, le=1024)
    channels: Literal[1, 3] = Field(3, description="3: RGB; 1: grey (luma, ITU-R BT.601).")
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    dtype: Literal["float32", "uint8"] = "float32"
    range: Literal["0..1", "-1..1", "0..255"] = "0..1"
    mean: tuple[float, ...] = Field((), description="One a channel, in the units of `range`. Empty: none.")
    std: tuple[float, ...] = Field((), description="One a channel, in the units of `range`. Empty: none.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channels")
        if any(value <= 0 for value in self.std):
            raise ValueError("std must be above 0")
        if self.dtype == "uint8" and (self.range != "0..255" or self.mean or self.std):
            raise ValueError("uint8 images have the range 0..255 and neither mean nor std")
        return self


class BlackBoxSpec(BaseModel):
    """What onnx and http teachers have in common. `name` is the id the service gave it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    title: str = Field(min_length=1, max_length=200)
    classes: tuple[ClassName, ...] = Field(min_length=2, max_length=10_000)
    input: InputFormat
    answers: AnswerKind = AnswerKind.PROBABILITIES
    licence: str = Field("not stated", max_length=200)
    licence_url: str = Field("", max_length=2000)

    @model_validator(mode="after")
    def _classes_differ(self) -> Self:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class is named twice")
        return self

    @property
    def offers(self) -> frozenset[TeacherOutput]:
        if self.answers is AnswerKind.LABEL:
            return frozenset({TeacherOutput.LABELS})
        return frozenset({TeacherOutput.LABELS, TeacherOutput.PROBABILITIES})

    @property
    def input_size(self) -> int:
        """The longer side of its images."""
        return max(self.input.height, self.input.width)

    @property
    def answers_key(self) -> str:
        """Under which its answers are kept: the same for all that would be asked and answer alike."""
        return self._key_without("title", "licence", "licence_url")

    def _key_without(self, *told: str) -> str:
        return digest({**self.model_dump(mode="json", exclude=set(told)), "version": ANSWERS_VERSION})


class OnnxTeacher(BlackBoxSpec):
    """An uploaded ONNX file, `model.onnx` beside `teacher.json`. `source` is its sha-256."""

    kind: Literal["onnx"] = "onnx"
    source: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=1)
    parameters: int = Field(ge=0)
    input_name: str
    output_name: str

    @property
    def answers_key(self) -> str:
        """Two uploads of one file share their answers."""
        return self._key_without("name", "title", "licence", "licence_url")


class HttpTeacher(BlackBoxSpec):
    """An HTTP endpoint. Secret headers are no part of this: they come with `TeacherAccess`."""

    kind: Literal["http"] = "http"
    protocol: WireProtocol = WireProtocol.DRAM
    source: str = Field(max_length=2000, description="URL of the request itself.")
    input_name: str = Field("image", max_length=200, description="Name of the input tensor (KServe v2).")
    output_name: str = Field("", max_length=200, description="Name of the output tensor; empty: the first.")
    batch_size: int = Field(32, ge=1, le=MOST_IN_A_CALL, description="Images in one request.")
    concurrency: int = Field(2, ge=1, le=32, description="Requests at once, of each worker.")
    timeout_s: float = Field(30.0, gt=0, le=600, description="Longest time one request may take.")
    retries: int = Field(5, ge=0, le=20, description="Further tries of a request that failed for the moment.")


BlackBoxTeacher = OnnxTeacher | HttpTeacher


class BlackBox(Protocol):
    """A teacher that can be asked. `key` names its answers; `classes` their columns."""

    key: str
    classes: tuple[str, ...]
    answers: AnswerKind
    batch_size: int
    concurrency: int
    retries: int

    def answer(self, images: list[Pixels]) -> Answers:
        """Answers [N, C] for N images [H, W, 3] of any sizes. Safe to call from `concurrency` threads.

        Raises `TryAgain` where the same question may be answered later, `TeacherError` where it will not be.
        """

    def close(self) -> None: ...


def model_path(folder: Path) -> Path:
    """The ONNX file in a teacher's source folder."""
    return folder / MODEL_FILE
