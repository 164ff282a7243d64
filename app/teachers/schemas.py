"""Orders and answers about teachers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from app.schemas import Answer, Order, Time
from app.security import egress
from models.teachers.black_box import (
    MOST_IN_A_CALL,
    AnswerKind,
    ClassName,
    InputFormat,
    WireProtocol,
)

#: What the protocol's adapter writes itself.
_ADAPTERS_HEADERS = frozenset(
    {"accept", "content-type", "content-encoding", "inference-header-content-length"}
)
_MOST_HEADERS = 32
_LONGEST_VALUE = 8192
#: Names of URL parameters that services take secrets in.
_SECRET_PARAMETER = re.compile(
    r"(key|token|secret|signature|password|passwd|pwd|auth|authorization|credentials?|\b(sig|code))$",
    re.IGNORECASE,
)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds characters that cannot be printed")
    return text


def _different(names: list[str]) -> list[str]:
    first: dict[str, int] = {}
    for at, name in enumerate(names):
        if first.setdefault(name, at) != at:
            raise ValueError(f"class '{name}' is named twice, at {first[name]} and at {at}")
    return names


def _sendable(headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
    """Names and values that HTTP allows; the messages repeat no value."""
    lower = [name.lower() for name in headers]
    for name, secret in headers.items():
        value = secret.get_secret_value()
        if name.lower() in _ADAPTERS_HEADERS:
            raise ValueError(f"header '{name}' is set by the protocol; leave it out")
        if lower.count(name.lower()) > 1:
            raise ValueError(f"header '{name}' is given twice")
        if not 1 <= len(value) <= _LONGEST_VALUE:
            raise ValueError(f"header '{name[:100]}' must have a value of 1 to {_LONGEST_VALUE} characters")
        try:
            egress.check_headers({name: value})
        except egress.Refused as refused:
            raise ValueError(f"{refused.detail}. {refused.hint}") from None
    return headers


def _without_secrets(url: str) -> str:
    """The URL is shown again, and kept as it is: nothing in it may be a secret."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ValueError("it holds a user name or password; send them as the header 'Authorization' instead")
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if _SECRET_PARAMETER.search(name):
            raise ValueError(f"its parameter '{name[:64]}' looks like a secret; send it as a header instead")
    if parts.fragment:
        raise ValueError("it has a fragment (#…), which is never sent; leave it out")
    return url


def _format(values: dict[str, Any]) -> InputFormat:
    """Raises ValueError in one sentence, which pydantic's own error is not."""
    try:
        return InputFormat.model_validate(values)
    except ValidationError as error:
        words = "; ".join(str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors())
        raise ValueError(words) from None


Text = Annotated[str, AfterValidator(_printable)]
Headers = Annotated[
    dict[str, SecretStr],
    AfterValidator(_sendable),
    Field(
        max_length=_MOST_HEADERS,
        description="Sent with each question, such as Authorization. Kept encrypted and never shown again.",
    ),
]


class BlackBoxOrder(Order):
    title: Text = Field(min_length=1, max_length=200, description="What people call it.")
    classes: Annotated[list[Annotated[ClassName, AfterValidator(_printable)]], AfterValidator(_different)] = (
        Field(min_length=2, max_length=10_000, description="Its classes, in the order of its outputs.")
    )
    licence: Text = Field("not stated", max_length=200)
    licence_url: Text = Field("", max_length=2000)


class HttpOrder(BlackBoxOrder):
    """A teacher behind HTTP."""

    kind: Literal["http"]
    protocol: WireProtocol = Field(WireProtocol.DRAM, description="How it wants to be asked.")
    url: Annotated[Text, AfterValidator(_without_secrets)] = Field(
        min_length=1, max_length=2000, description="Of the request itself, such as …/v2/models/NAME/infer."
    )
    input: InputFormat = Field(description="The images that it expects.")
    answers: AnswerKind = Field(AnswerKind.PROBABILITIES, description="What it says about an image.")
    headers: Headers = Field({})
    input_name: Text = Field("image", max_length=200, description="Name of the input tensor (KServe v2).")
    output_name: Text = Field("", max_length=200, description="Name of the output tensor; empty: the first.")
    batch_size: int = Field(32, ge=1, le=MOST_IN_A_CALL, description="Images in one request.")
    concurrency: int = Field(2, ge=1, le=32, description="Requests at once, of each worker.")
    timeout_s: float = Field(
        30.0, gt=0, le=600, description="Longest time one request may take.", allow_inf_nan=False
    )
    retries: int = Field(5, ge=0, le=20, description="Further tries of a request that failed for the moment.")


class InputOrder(Order):
    """The images that a file expects: its range, mean and std, and, where the file leaves them open, its sizes."""

    height: int | None = Field(None, ge=1, le=1024)
    width: int | None = Field(None, ge=1, le=1024)
    channels: Literal[1, 3] | None = None
    layout: Literal["NCHW", "NHWC"] | None = None
    dtype: Literal["float32", "uint8"] | None = None
    range: Literal["0..1", "-1..1", "0..255"] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width belong together")
        if self.height is None and not self._given().keys() <= {"range", "mean", "std"}:
            raise ValueError(
                "channels, layout and dtype are read from the file, unless height and width are stated"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) not in (1, 3):
                raise ValueError(f"{name} has {len(values)} values; it takes one for each channel")
        self.stated()
        return self

    def stated(self) -> InputFormat | None:
        """The whole format where sizes are stated; None: the file says."""
        return None if self.height is None else _format(self._with_range())

    def applied_to(self, found: InputFormat) -> InputFormat:
        """The file's format with what is stated instead. Raises ValueError."""
        return _format({**found.model_dump(), **self._given()})

    def _with_range(self) -> dict[str, Any]:
        return {"range": "0..255", **self._given()} if self.dtype == "uint8" else self._given()

    def _given(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class OnnxOrder(BlackBoxOrder):
    """A teacher that is an ONNX file; what is left out is read from the file."""

    kind: Literal["onnx"]
    input: InputOrder = InputOrder()
    answers: AnswerKind | None = Field(None, description="Left out: as a try of the file shows.")
    output_name: Text | None = Field(None, max_length=200, description="Left out: the only output.")


class HeadersOrder(Order):
    headers: Headers


class TopClass(Answer):
    name: str
    score: float


class ProbeReport(BaseModel):
    """What came of asking a teacher about one image."""

    model_config = ConfigDict(extra="forbid")

    ok: bool
    latency_ms: float | None = Field(description="Of the question; for an endpoint, with its network.")
    shape: list[int] | None = Field(description="Of the answers: images, classes.")
    top: list[TopClass] = Field(description="Its most likely classes, first five.")
    problems: list[str] = Field(description="What is wrong, in words; empty where it is ok.")
    hint: str = Field(description="How to mend it.")


class ProbeAnswer(ProbeReport):
    object: Literal["probe"]
    teacher_id: str


class KeptProbe(ProbeReport):
    at: Time = Field(description="When it was asked.")


class TeacherAnswer(Answer):
    object: Literal["teacher"]
    id: str
    title: str
    kind: str = Field(description="onnx, http: a black box of yours; others: a network of the catalogue.")
    source: str = Field(
        description="Package, hub id, or 'local' for a folder of the operator's; sha-256 of your file; URL of your "
        "endpoint, the values of its parameters left out."
    )
    revision: str | None = Field(description="The pinned commit at the hub.")
    input_size: int = Field(description="The longer side of its images.")
    parameters: int | None = Field(description="Learned numbers, where they are known.")
    embedding_dim: int | None = Field(description="Length of its features; a black box shows none.")
    offers: list[str] = Field(description="What a method may ask it for.")
    licence: str
    licence_url: str
    resident_mib: int | None = Field(description="Memory that the loaded network takes, about.")
    available: bool
    reason: str = Field(description="Where it comes from, or why it cannot be had now.")
    created_at: Time | None = Field(description="Of a black box of yours.")


class InputAnswer(Answer):
    """The images that a black box expects."""

    height: int
    width: int
    channels: Literal[1, 3]
    layout: Literal["NCHW", "NHWC"]
    dtype: Literal["float32", "uint8"]
    range: Literal["0..1", "-1..1", "0..255"]
    mean: list[float]
    std: list[float]


class BlackBoxDetail(Answer):
    """A black box as it is asked."""

    classes: list[str]
    input: InputAnswer
    answers: AnswerKind
    protocol: WireProtocol | None
    input_name: str
    output_name: str
    headers: list[str] = Field(description="Names of the secret headers. Their values are never shown.")
    batch_size: int | None
    concurrency: int | None
    timeout_s: float | None
    retries: int | None
    bytes: int | None = Field(description="Size of the file.")
    probe: KeptProbe | None = Field(description="The report of the newest probe.")


class TeacherDetail(TeacherAnswer):
    black_box: BlackBoxDetail | None = Field(description="Of a black box of yours.")
