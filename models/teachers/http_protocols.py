"""How HTTP endpoints are asked and what they say: one adapter for each `WireProtocol`. No network, no torch.

docs/black-box-teachers.md shows requests and answers. Sources: Open Inference Protocol, REST, and its binary tensor
data extension (kserve/open-inference-protocol; Triton, extension_binary_data); TorchServe, inference API; TensorFlow
Serving, RESTful API.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.errors import TeacherError
from models.pipeline import Response
from models.teachers.black_box import (
    MOST_IN_A_CALL,
    AnswerKind,
    HttpTeacher,
    InputFormat,
    Pixels,
    WireProtocol,
)
from models.teachers.formats import prepared

Body = tuple[bytes, dict[str, str]]  # with the headers that belong to it
Raw = NDArray[np.generic]  # what `formats.read_answers` reads

_JSON = {"Content-Type": "application/json", "Accept": "application/json"}
_KSERVE_DTYPES = {"float32": "FP32", "uint8": "UINT8"}
_NUMPY_DTYPES = {
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "BOOL": "|u1",
    "INT8": "|i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "UINT8": "|u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
}  # fmt: skip
#: An answer of more dimensions, or of longer ones, holds no rows over classes; numpy itself has such limits.
_MOST_DIMENSIONS = 8
_LONGEST_SIDE = 2**31
_FIELDS = {
    AnswerKind.PROBABILITIES: "probabilities",
    AnswerKind.LOGITS: "logits",
    AnswerKind.TOP_K: "top_k",
    AnswerKind.LABEL: "labels",
}


@dataclass(frozen=True)
class Adapter:
    """One protocol. `parse(response, spec, n)` reads the answer to n images. Raises `TeacherError`."""

    request: Callable[[Sequence[Pixels], HttpTeacher], Body]
    parse: Callable[[Response, HttpTeacher, int], Raw]
    answers: frozenset[AnswerKind]  # the kinds that it can carry
    most_images: int = MOST_IN_A_CALL


# Dram's own: PNG images in base64; what comes back is named by its kind.


def _ask_dram(images: Sequence[Pixels], spec: HttpTeacher) -> Body:
    pictures = [base64.b64encode(png).decode() for png in _pngs(images, spec.input)]
    return json.dumps({"images": pictures}).encode(), _JSON


def _read_dram(response: Response, spec: HttpTeacher, n: int) -> Raw:
    document = _object(_json(response, response.body))
    if "classes" in document and document["classes"] != list(spec.classes):
        raise TeacherError(
            "the endpoint's classes are not those it was registered with, in that order",
            "If it was changed, register it as another teacher.",
        )
    field = _FIELDS[spec.answers]
    if field not in document:
        raise TeacherError(
            f"the endpoint's answer has no '{field}'; it has: {_listed(document)}",
            f"The teacher was registered with answers '{spec.answers}'.",
        )
    given = document[field]
    if spec.answers is AnswerKind.LABEL:
        return _labels(given, spec)
    if spec.answers is AnswerKind.TOP_K:
        if not isinstance(given, list) or len(given) != n:
            raise _unexpected(f"'{field}'", f"a list of {n} entries, one for each image")
        return np.stack([_top(_said(entry), spec) for entry in given])
    return _numbers(given)


def _said(entries: Any) -> list[tuple[Any, Any]]:
    """The classes and probabilities of one image's top k."""
    try:
        return [(entry["class"], entry["probability"]) for entry in entries]
    except (TypeError, KeyError):
        raise _unexpected(
            "an image's 'top_k'", 'a list of {"class": ..., "probability": ...} objects'
        ) from None


# Open Inference Protocol (KServe v2), as JSON and with binary tensors.


def _ask_kserve(images: Sequence[Pixels], spec: HttpTeacher) -> Body:
    batch = prepared(images, spec.input)
    described = json.dumps(_tensor(batch, spec))
    outputs = f', "outputs": {json.dumps([{"name": spec.output_name}])}' if spec.output_name else ""
    data = ",".join(_texts(batch))
    return f'{{"inputs": [{described[:-1]}, "data": [{data}]}}]{outputs}}}'.encode(), _JSON


def _ask_kserve_binary(images: Sequence[Pixels], spec: HttpTeacher) -> Body:
    batch = prepared(images, spec.input)
    data = batch.astype(batch.dtype.newbyteorder("<")).tobytes()
    tensor = {**_tensor(batch, spec), "parameters": {"binary_data_size": len(data)}}
    document: dict[str, Any] = {"inputs": [tensor]}
    if spec.output_name:
        document["outputs"] = [{"name": spec.output_name, "parameters": {"binary_data": True}}]
    else:
        document["parameters"] = {"binary_data_output": True}
    head = json.dumps(document).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    return head + data, headers


def _tensor(batch: NDArray[Any], spec: HttpTeacher) -> dict[str, Any]:
    return {
        "name": spec.input_name,
        "shape": list(batch.shape),
        "datatype": _KSERVE_DTYPES[str(batch.dtype)],
    }


def _read_kserve(response: Response, spec: HttpTeacher, n: int) -> Raw:
    """The named output, or the first; with binary tensors where the answer says so."""
    head, binary = _split(response)
    document = _object(_json(response, head))
    outputs = document.get("outputs")
    if not isinstance(outputs, list) or not outputs or not all(isinstance(one, dict) for one in outputs):
        raise _unexpected("the answer's 'outputs'", "a list of tensors")
    start = 0
    for output in outputs:
        parameters = output.get("parameters") or {}
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        end = start + (size if isinstance(size, int) and size >= 0 else 0)
        if not spec.output_name or output.get("name") == spec.output_name:
            return _read_tensor(output, binary[start:end] if size is not None else None, spec)
        start = end
    raise TeacherError(
        f"the endpoint's answer has no output '{spec.output_name}'; it has:"
        f" {_listed([output.get('name') for output in outputs])}",
        "Correct output_name; empty means the first.",
    )


def _split(response: Response) -> tuple[bytes, bytes]:
    """The JSON of a KServe answer and the binary tensors behind it."""
    length = response.headers.get("inference-header-content-length")
    if length is None:
        return response.body, b""
    if not re.fullmatch("[0-9]{1,12}", length) or int(length) > len(response.body):
        raise _unexpected("Inference-Header-Content-Length", "the length of the JSON before the tensors")
    return response.body[: int(length)], response.body[int(length) :]


def _read_tensor(output: dict[str, Any], binary: bytes | None, spec: HttpTeacher) -> Raw:
    shape, datatype = output.get("shape"), output.get("datatype")
    sides: list[Any] = shape if isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS else [None]
    if not all(isinstance(side, int) and 0 <= side < _LONGEST_SIDE for side in sides):
        raise _unexpected("an output's 'shape'", "a short list of whole numbers")
    if datatype == "BYTES":
        return _labels(_strings(binary) if binary is not None else output.get("data"), spec)
    if binary is None:
        values: Raw = _numbers(output.get("data"))
    elif isinstance(datatype, str) and datatype in _NUMPY_DTYPES:
        dtype = np.dtype(_NUMPY_DTYPES[datatype])
        if len(binary) % dtype.itemsize:
            raise _unexpected("the answer's binary data", "as long as its 'binary_data_size' says")
        values = np.frombuffer(binary, dtype)
    else:
        raise _unexpected("an output's 'datatype'", f"one of {', '.join(sorted(_NUMPY_DTYPES))}, BYTES")
    if values.size != math.prod(sides):
        raise TeacherError(
            f"the endpoint's output has {values.size} values, but its shape is {sides}",
            "Its server must answer with tensors as the Open Inference Protocol describes them.",
        )
    return values.reshape(sides)


def _strings(binary: bytes) -> list[str]:
    """The elements of a BYTES tensor: each with its length before it, 4 bytes."""
    found, at = [], 0
    while at < len(binary):
        end = at + 4 + int.from_bytes(binary[at : at + 4], "little")
        if end > len(binary):
            raise _unexpected("a BYTES tensor", "elements with their length before them")
        found.append(binary[at + 4 : end].decode("utf-8", "replace"))
        at = end
    return found


# TorchServe: one PNG a request; the image classifier's answer names its top classes.


def _ask_torchserve(images: Sequence[Pixels], spec: HttpTeacher) -> Body:
    (png,) = _pngs(images, spec.input)
    return png, {"Content-Type": "image/png", "Accept": "application/json"}


def _read_torchserve(response: Response, spec: HttpTeacher, n: int) -> Raw:
    answer = _json(response, response.body)
    if spec.answers is AnswerKind.LABEL:
        return _labels(answer if isinstance(answer, list) else [answer], spec)
    if not isinstance(answer, dict):
        return _numbers(answer)
    row = _top(list(answer.items()), spec)
    if spec.answers is not AnswerKind.TOP_K and np.isnan(row).any():
        named = len(spec.classes) - int(np.isnan(row).sum())
        raise TeacherError(
            f"the endpoint named {named} of {len(spec.classes)} classes",
            "Set answers to 'top_k', or raise topk in its handler.",
        )
    return row[None]


# TensorFlow Serving: rows in, rows out.


def _ask_tensorflow(images: Sequence[Pixels], spec: HttpTeacher) -> Body:
    batch = prepared(images, spec.input)
    texts = _texts(batch)
    for side in reversed(batch.shape):
        texts = [f"[{','.join(texts[at : at + side])}]" for at in range(0, len(texts), side)]
    return f'{{"instances": {texts[0]}}}'.encode(), _JSON


def _read_tensorflow(response: Response, spec: HttpTeacher, n: int) -> Raw:
    predictions = _object(_json(response, response.body)).get("predictions")
    if not isinstance(predictions, list):
        raise _unexpected("the answer's 'predictions'", "a list with an entry for each image")
    if predictions and isinstance(predictions[0], dict):  # several outputs
        try:
            predictions = [entry[spec.output_name] for entry in predictions]
        except (TypeError, KeyError):
            raise TeacherError(
                f"the endpoint's predictions have no output '{spec.output_name}'; they have:"
                f" {_listed(predictions[0])}",
                "Set output_name to one of these.",
            ) from None
    return _labels(predictions, spec) if spec.answers is AnswerKind.LABEL else _numbers(predictions)


ADAPTERS: dict[WireProtocol, Adapter] = {
    WireProtocol.DRAM: Adapter(_ask_dram, _read_dram, frozenset(AnswerKind)),
    WireProtocol.KSERVE_V2: Adapter(_ask_kserve, _read_kserve, frozenset(AnswerKind) - {AnswerKind.TOP_K}),
    WireProtocol.KSERVE_V2_BINARY: Adapter(
        _ask_kserve_binary, _read_kserve, frozenset(AnswerKind) - {AnswerKind.TOP_K}
    ),
    WireProtocol.TORCHSERVE: Adapter(_ask_torchserve, _read_torchserve, frozenset(AnswerKind), most_images=1),
    WireProtocol.TENSORFLOW_SERVING: Adapter(
        _ask_tensorflow, _read_tensorflow, frozenset(AnswerKind) - {AnswerKind.TOP_K}
    ),
}


def _pngs(images: Sequence[Pixels], format: InputFormat) -> list[bytes]:
    """The images at the teacher's size, RGB or grey. Range, mean and std are the endpoint's own matter."""
    shown = InputFormat(
        height=format.height,
        width=format.width,
        channels=format.channels,
        layout="NHWC",
        dtype="uint8",
        range="0..255",
    )
    files = []
    for pixels in prepared(images, shown):
        file = io.BytesIO()
        picture = pixels[:, :, 0] if format.channels == 1 else pixels
        Image.fromarray(np.ascontiguousarray(picture)).save(file, "png", compress_level=1)
        files.append(file.getvalue())
    return files


def _texts(batch: NDArray[Any]) -> list[str]:
    """The numbers of a batch in JSON, flat. Pixels take few values: each is written once."""
    values, places = np.unique(batch, return_inverse=True)
    written = values.astype(str).tolist()
    return [written[place] for place in places.ravel().tolist()]


def _json(response: Response, content: bytes) -> Any:
    if "html" in response.headers.get("content-type", "") or content.lstrip()[:1] == b"<":
        raise TeacherError(
            "the endpoint answered with an HTML page, not with JSON",
            "Is the URL that of the prediction itself, and not of a web or login page before it?",
        )
    try:
        return json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError):
        what = "breaks off or is no JSON" if content.strip() else "is empty"
        raise TeacherError(
            f"the endpoint's answer {what} ({len(content)} bytes)",
            "Check its protocol, and what it answers to this request.",
        ) from None


def _no_number(token: str) -> float:
    raise TeacherError(
        f"the endpoint's answer holds {token}",
        "Check the teacher, and the input's range, mean and std.",
    )


def _object(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise _unexpected("the answer", "a JSON object")
    return document


def _numbers(given: Any) -> Raw:
    """Nested lists of numbers as an array."""
    values = _nested(given)
    if not all(type(value) in (int, float) for value in values.flat):
        raise _unexpected("the answer's data", "numbers, in rows of the same length")
    try:
        whole = all(type(value) is int for value in values.flat)
        return values.astype(np.int64 if whole else np.float64)
    except OverflowError:
        raise _unexpected("the answer's numbers", "within the range of a float") from None


def _labels(given: Any, spec: HttpTeacher) -> Raw:
    """Class indices [N] from names or numbers, or one-hot rows as they are."""
    values = _nested(given)
    if any(isinstance(value, str) for value in values.flat):
        return np.array([_place(value, spec) for value in values.flat], np.int64)
    return _numbers(given)


def _nested(given: Any) -> NDArray[Any]:
    """Nested lists as an array of what they hold: by reference, however large that is."""
    if not isinstance(given, list):
        raise _unexpected("the answer's data", "a list")
    try:
        values = np.asarray(given, dtype=object)
    except ValueError:
        raise _unexpected("the answer's rows", "of the same length") from None
    if values.ndim > _MOST_DIMENSIONS:
        raise _unexpected("the answer's data", "a row for each image")
    return values


def _top(said: list[tuple[Any, Any]], spec: HttpTeacher) -> NDArray[np.float64]:
    """One image's row [C] of what is said of some classes; NaN elsewhere."""
    row = np.full(len(spec.classes), np.nan)
    for name, value in said:
        place = _place(name, spec)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _unexpected("a class's probability", "a number")
        if not np.isnan(row[place]):
            raise TeacherError(f"the endpoint named class '{spec.classes[place]}' twice for an image")
        try:
            row[place] = value
        except OverflowError:
            raise _unexpected("a class's probability", "within the range of a float") from None
    return row


def _place(name: Any, spec: HttpTeacher) -> int:
    """Where a class, given by name or index, stands in the teacher's list."""
    if isinstance(name, str) and name in spec.classes:
        return spec.classes.index(name)
    if isinstance(name, str) and name.isascii() and name.isdigit() and len(name) < 6:
        name = int(name)
    if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(spec.classes):
        return name
    raise TeacherError(
        f"the endpoint named the class {_shown(name)}, which is not among the {len(spec.classes)} of the teacher",
        "List all classes of the teacher as the endpoint spells them. If it was changed, register it anew.",
    )


def _unexpected(what: str, expected: str) -> TeacherError:
    return TeacherError(
        f"the endpoint's answer is not as its protocol says: {what} must be {expected}",
        "Check the teacher's protocol; docs/black-box-teachers.md shows each.",
    )


def _listed(names: Any) -> str:
    return ", ".join(_shown(name) for name in list(names)[:10]) or "nothing"


def _shown(name: Any) -> str:
    """A name of the endpoint's in a message: short, printable."""
    text = str(name)
    return f"'{''.join(letter if letter.isprintable() else '?' for letter in text[:40])}'"
