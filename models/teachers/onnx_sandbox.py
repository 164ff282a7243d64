"""Child process that runs one untrusted ONNX file: run by path, imports nothing of this project.

It limits itself, reads the file from an open descriptor, checks it, loads it from memory, then answers one batch of
images after the other. Its working directory does not exist any more: no file can be found or made in it.

A frame is the length of a JSON header and of a payload (4 bytes each, big endian), then both.
First frame on stdout: the facts of the graph. Then for each frame on stdin (header: shape, dtype, output; payload:
the images) one on stdout (header: shape, dtype; payload: the answers). A header may hold `detail` and `hint`
instead: what is wrong, in words.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import resource
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

HEADER = struct.Struct(">II")
#: Most bytes of one request and of one answer.
MAX_PAYLOAD = 1 << 27
#: A graph in memory is the file several times over: bytes, protobuf, tensors; 3.5 times as measured with 381 MiB.
COPIES_OF_FILE = 4

_PR_SET_PDEATHSIG = 1
_STANDARD = ("", "ai.onnx", "ai.onnx.ml")  # operator domains that onnxruntime answers for without libraries
_OTHER_FILES = (
    (0, b"PK\x03\x04", "a zip archive, as torch.save makes it"),
    (0, b"\x80\x02", "a Python pickle"),
    (0, b"\x89HDF", "an HDF5 file, as Keras makes it"),
    (4, b"TFL3", "a TensorFlow Lite file"),
    (4, b"ORTM", "a file in onnxruntime's own format"),
    (0, b"<", "HTML or XML"),
)


class Rejected(Exception):
    """The file or its answer cannot be used: what is wrong, and how to mend it."""

    def __init__(self, detail: str, hint: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.hint = hint


def confine(parent: int, memory: int) -> None:
    """Give up what running a graph does not need: memory, files, life after the parent."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    Path(folder).rmdir()
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        resource.setrlimit(kind, (limit, limit))


def allow_cpu(seconds: float) -> None:
    """The kernel ends this process when it computes for longer from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


# --- the file -------------------------------------------------------------------------------------------------


def parsed(content: bytes) -> Any:
    """The file as an onnx.ModelProto. Raises `Rejected`."""
    import onnx  # noqa: PLC0415 - after confine()

    hint = "Upload one file, as torch.onnx.export(..., external_data=False) or another exporter to ONNX writes it."
    for offset, magic, name in _OTHER_FILES:
        if content[offset : offset + len(magic)] == magic:
            raise Rejected(f"the file is no ONNX file but {name}", hint)
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # whatever the parser makes of it
        check_memory(error)
        raise Rejected(f"the file is no ONNX file, or not all of it ({brief(error)})", hint) from None
    if not model.graph.node:
        raise Rejected("the file is no ONNX file: it holds no graph", hint)
    return model


def check_structure(model: Any, limits: dict[str, Any]) -> int:
    """Whether all that onnxruntime would do with the file stays inside it and is of a sane size. Raises `Rejected`.

    Returns the number of its parameters. Nothing but protobuf has looked at the file yet.
    """
    from onnx import NodeProto, SparseTensorProto, TensorProto  # noqa: PLC0415 - after confine()

    functions = {(function.domain, function.name, function.overload) for function in model.functions}
    nodes: Counter[Any] = Counter()  # by the body they are in: a function's key, None for the graph
    calls: dict[Any, Counter[Any]] = {}
    elements = parameters = 0
    no_parameters = (TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING)
    for message, depth, body in messages(model):
        if depth > limits["depth"]:
            raise Rejected(
                f"the graph is nested deeper than {limits['depth']} levels",
                "Export it without such control flow.",
            )
        if isinstance(message, NodeProto):
            key = (message.domain, message.op_type, message.overload)
            nodes[body] += 1
            if key in functions:
                calls.setdefault(body, Counter())[key] += 1
            elif message.domain not in _STANDARD:
                raise Rejected(
                    f"the graph uses the operator '{message.op_type[:60]}' of the domain '{message.domain[:60]}'",
                    "Export it with the standard operators of ONNX only (domains ai.onnx and ai.onnx.ml).",
                )
        elif isinstance(message, TensorProto):
            if message.data_location == TensorProto.EXTERNAL or message.external_data:
                raise Rejected(
                    f"the tensor '{message.name[:60]}' lies outside the file (external data)",
                    "Save all weights in the one file: onnx.save_model(model, path, save_as_external_data=False).",
                )
            size = elements_of(message.dims)
            elements += size
            parameters += 0 if message.data_type in no_parameters else size
        elif isinstance(message, SparseTensorProto):
            elements += elements_of(message.dims)  # that is what it becomes in memory
        if elements > limits["elements"]:
            raise Rejected(
                f"the file's tensors have more than {limits['elements']:,} elements", "Use a smaller teacher."
            )
    if expanded(None, nodes, calls, limits["depth"], {}, 0)[0] > limits["nodes"]:
        raise Rejected(
            f"the graph has more than {limits['nodes']:,} operators once its functions are put in their places",
            "Use a smaller teacher, or export it without functions.",
        )
    return parameters


def messages(model: Any) -> Iterator[tuple[Any, int, Any]]:
    """Every message below the model, whatever field it is in: (message, graphs around it, function it is in)."""
    from onnx import FunctionProto, GraphProto, TensorProto  # noqa: PLC0415 - after confine()

    waiting: list[tuple[Any, int, Any]] = [(model, 0, None)]
    while waiting:
        message, depth, body = waiting.pop()
        if isinstance(message, GraphProto):
            depth += 1
        if isinstance(message, FunctionProto):
            body = (message.domain, message.name, message.overload)
        yield message, depth, body
        if isinstance(message, TensorProto):
            continue  # numbers
        for field, value in message.ListFields():
            if field.message_type is not None:
                parts = [value] if hasattr(value, "ListFields") else value
                waiting += [(part, depth, body) for part in parts]


def elements_of(dims: Any) -> int:
    if any(size < 0 for size in dims):
        raise Rejected("a tensor in the file has a negative size", "Export it again from the original.")
    return math.prod(dims)


def expanded(
    body: Any,
    nodes: Counter[Any],
    calls: dict[Any, Counter[Any]],
    deepest: int,
    known: dict[Any, Any],
    depth: int,
) -> tuple[int, int]:
    """(operators, levels) of a body once each call is replaced by the function's own body. Raises `Rejected`."""
    if body in known:
        return known[body]  # type: ignore[no-any-return]
    total, levels = nodes[body], 0
    for called, times in calls.get(body, {}).items():
        if depth < deepest:
            size, below = expanded(called, nodes, calls, deepest, known, depth + 1)
            total += times * size
            levels = max(levels, below + 1)
        if depth >= deepest or levels > deepest:
            raise Rejected(
                f"the file's functions call each other over more than {deepest} levels, or for ever",
                "Export it without functions.",
            )
    known[body] = total, levels
    return total, levels


def fully_checked(content: bytes) -> None:
    """ONNX's own check, with the inference of all shapes. Raises `Rejected`."""
    import onnx  # noqa: PLC0415 - after confine()

    try:
        onnx.checker.check_model(content, full_check=True)
    except Exception as error:  # ValidationError, InferenceError, and what hostile files bring about
        check_memory(error)
        raise Rejected(
            f"ONNX's checker finds the file invalid: {brief(error)}",
            "Export it again; onnx.checker.check_model(path, full_check=True) shows the same.",
        ) from None


# --- the graph ------------------------------------------------------------------------------------------------


def session_of(content: bytes, threads: int) -> Any:
    """The onnxruntime session. Raises `Rejected`."""
    import onnxruntime  # noqa: PLC0415 - after confine()

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each of its codes
        check_memory(error)
        raise Rejected(
            f"onnxruntime {onnxruntime.__version__} cannot load the file: {brief(error)}",
            "Check that it loads with onnxruntime on the CPU; an older opset may help.",
        ) from None


def facts_of(session: Any) -> dict[str, Any]:
    """Inputs and outputs; a size is an int, or None where it is dynamic."""

    def described(values: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": value.name,
                "shape": [size if isinstance(size, int) and size >= 0 else None for size in value.shape],
                "type": value.type,
            }
            for value in values
        ]

    return {"inputs": described(session.get_inputs()), "outputs": described(session.get_outputs())}


def answered(session: Any, request: dict[str, Any], payload: bytes) -> Any:
    """The array that the graph gives for a batch of images. Raises `Rejected`."""
    import numpy as np  # noqa: PLC0415 - after confine()

    (graph_input,) = session.get_inputs()
    images = np.frombuffer(payload, request["dtype"]).reshape(request["shape"])
    if graph_input.type == "tensor(float16)":
        images = images.astype(np.float16)
    try:
        (array,) = session.run([request["output"]], {graph_input.name: images})
    except Exception as error:  # as above
        check_memory(error)
        raise Rejected(
            f"the graph fails on {len(images)} image(s) of shape {list(images.shape[1:])}: {brief(error)}",
            "Check that the graph takes such a batch: the size and layout of `input`, and a dynamic first dimension.",
        ) from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise Rejected(
            f"the output '{request['output'][:60]}' holds no numbers",
            "Choose an output of shape [N, classes].",
        )
    if array.nbytes > MAX_PAYLOAD:
        raise Rejected(
            f"the output '{request['output'][:60]}' has {array.nbytes:,} bytes for {len(images)} image(s)",
            "Choose an output of shape [N, classes].",
        )
    return np.ascontiguousarray(array)


def check_memory(error: Exception) -> None:
    """Raises `MemoryError` where that is what the error means: libraries word a failed allocation in several ways."""
    words = ("bad_alloc", "bad alloc", "alloc failed", "allocate memory", "out of memory")
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in words):
        raise MemoryError


def brief(error: Exception) -> str:
    """An error in at most 300 characters, without onnxruntime's codes and the places in its source code."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/\S+\.(?:h|cc|cpp):\d+ .*?\)(?: const)? ", "", text)
    return text if len(text) <= 300 else f"{text[:297]}..."


# --- the frames -----------------------------------------------------------------------------------------------


def send(stream: BinaryIO, header: dict[str, Any], payload: bytes = b"") -> None:
    text = json.dumps(header).encode()
    stream.write(HEADER.pack(len(text), len(payload)) + text)
    stream.write(payload)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """One request; None where there are no more."""
    lengths = stream.read(HEADER.size)
    if len(lengths) < HEADER.size:
        return None
    header, payload = HEADER.unpack(lengths)
    return json.loads(stream.read(header)), stream.read(payload)


@contextmanager
def telling(stream: BinaryIO, memory: int) -> Iterator[None]:
    """Sends what is wrong instead of the answer."""
    try:
        yield
    except Rejected as error:
        send(stream, {"detail": error.detail, "hint": error.hint})
    except MemoryError:
        detail = f"the teacher needs more memory than the {memory >> 20} MiB it may use beside its file"
        send(stream, {"detail": detail, "hint": "Use a smaller teacher, or smaller images (`input`)."})


def loaded(descriptor: int, thorough: bool, limits: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The session and the facts of the file. Raises `Rejected`, `MemoryError`."""
    with os.fdopen(descriptor, "rb") as file:
        content = file.read()
    parameters = check_structure(parsed(content), limits)
    if thorough:
        fully_checked(content)
    session = session_of(content, limits["threads"])
    return session, {**facts_of(session), "parameters": parameters}


def main() -> None:
    """Arguments: parent's process id, descriptor of the file, 'check' or 'trust', limits as JSON."""
    parent, descriptor, thorough = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "check"
    limits = json.loads(sys.argv[4])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints gets between the frames
    confine(parent, limits["memory"] + COPIES_OF_FILE * os.fstat(descriptor).st_size)
    allow_cpu(limits["load_s"] * limits["threads"])
    session = None
    with telling(answers, limits["memory"]):
        session, facts = loaded(descriptor, thorough, limits)
        send(answers, facts)
    while session is not None and (received := receive(sys.stdin.buffer)):
        request, payload = received
        allow_cpu(limits["call_s"] * limits["threads"])
        with telling(answers, limits["memory"]):
            array = answered(session, request, payload)
            send(answers, {"shape": array.shape, "dtype": str(array.dtype)}, array.tobytes())


if __name__ == "__main__":
    main()
