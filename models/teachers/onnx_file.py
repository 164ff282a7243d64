"""A black box that is an ONNX file of the user's: parent side of `onnx_sandbox.py`. No torch, no onnx here.

The file is never opened by this process's libraries. A child under limits of memory and time checks it and runs it,
and is replaced when it does not survive; what it answers is not trusted either.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from models.errors import TeacherError
from models.teachers import formats
from models.teachers.black_box import AnswerKind, Answers, InputFormat, OnnxTeacher, Pixels
from models.teachers.onnx_sandbox import HEADER, MAX_PAYLOAD

PROGRAM = Path(__file__).with_name("onnx_sandbox.py")
#: Most images, and most pixels, of one call of the child.
BATCH_SIZE = 64
BATCH_PIXELS = 1 << 21

_MAX_HEADER = 1 << 20
_OUTPUT_TYPES = {
    name: np.dtype(name)
    for bits in (8, 16, 32, 64)
    for name in (f"int{bits}", f"uint{bits}", *([f"float{bits}"] if bits > 8 else ["bool"]))
}
_INPUT_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
#: How far an image's answers may differ between two calls, in units of the largest answer.
_REPEATABLE = 1e-2


@dataclass(frozen=True)
class Limits:
    """What an ONNX file may have and take. `memory` in bytes, beside a multiple of the file itself.

    `depth` bounds how deep graphs and functions are nested, `elements` the size of all tensors in the file
    together, `nodes` the operators after functions are put in their places. No further output is tried after
    `tries_s` at upload.
    """

    bytes: int = 512 << 20
    memory: int = 2 << 30
    load_s: float = 60.0
    call_s: float = 60.0
    tries_s: float = 120.0
    threads: int = 1
    nodes: int = 50_000
    depth: int = 16
    elements: int = 200_000_000


@dataclass(frozen=True)
class OutputFacts:
    """One output that can be answers: [N, classes], or labels [N] (`classes` 0). `looks_like`: by what it said."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    classes: int
    looks_like: AnswerKind | None


@dataclass(frozen=True)
class OnnxFacts:
    """What an ONNX file is. `format` is the input asked for, or what the graph's own input suggests.

    `outputs` has those that can be answers, at least one; None in a shape: dynamic. With a batch that is not
    dynamic the file is asked one image at a time.
    """

    sha256: str
    bytes: int
    parameters: int
    input_name: str
    input_shape: tuple[int | None, ...]
    input_dtype: str
    dynamic_batch: bool
    format: InputFormat
    outputs: tuple[OutputFacts, ...]


class OnnxFile:
    """Answers of an ONNX file. The child is started at the first question and again after it was lost.

    Raises `TeacherError` for a file that cannot be used, a crash, and a call that takes too much time or memory.
    """

    concurrency = 1
    retries = 0

    def __init__(self, path: Path, spec: OnnxTeacher, limits: Limits = Limits()) -> None:
        self.key = spec.answers_key
        self.classes = spec.classes
        self.answers = spec.answers
        self.batch_size = max(1, min(BATCH_SIZE, BATCH_PIXELS // (spec.input.height * spec.input.width)))
        self._path = path
        self._spec = spec
        # Its size was accepted at its upload, whatever the operator allows there.
        self._limits = replace(limits, bytes=max(limits.bytes, spec.bytes))
        self._sandbox: _Sandbox | None = None
        self._closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def answer(self, images: list[Pixels]) -> Answers:
        """Answers [N, C] for N images [H, W, 3]."""
        with self._lock:
            sandbox = self._opened()
            step = self.batch_size if sandbox.input.dynamic_batch else 1
            rows = [np.empty((0, len(self.classes)), np.float32)]
            for at in range(0, len(images), step):
                part = images[at : at + step]
                raw = sandbox.run(formats.prepared(part, self._spec.input), self._spec.output_name)
                rows.append(formats.read_answers(raw, self.answers, len(self.classes), len(part)))
            return np.concatenate(rows)

    def close(self) -> None:
        """Ends the child, also in the middle of a call; no further question is answered."""
        self._closed = True
        if self._sandbox is not None:
            self._sandbox.close()

    def _opened(self) -> _Sandbox:
        if self._sandbox is not None and not self._sandbox.alive:
            self._sandbox.close()
            self._sandbox = None
        if self._sandbox is None and not self._closed:
            self._sandbox = _Sandbox(self._path, self._limits, "trust", self._spec.source)
        if self._sandbox is None or self._closed:
            self.close()  # perhaps while it was loading
            raise TeacherError(f"the teacher '{self._spec.name}' is closed")
        return self._sandbox


def inspect(
    path: Path, limits: Limits = Limits(), format: InputFormat | None = None, output: str = ""
) -> OnnxFacts:
    """Checks an uploaded file and asks it about two images of noise.

    `format` is what its input will be given, `output` the output that must be usable, where the user states them.
    Raises `TeacherError` that says what is wrong and how to mend it.
    """
    with contextlib.closing(_Sandbox(path, limits, "check")) as sandbox:
        agreed = _agreed(sandbox.input, format)
        names = [value.name for value in sandbox.outputs]
        if output and output not in names:
            raise TeacherError(f"the graph has no output '{output}'", f"Its outputs are {', '.join(names)}.")
        candidates = [value for value in sandbox.outputs if output in ("", value.name)]
        until = time.monotonic() + limits.tries_s
        tried: list[OutputFacts | None] = []
        for value in candidates:
            if tried and time.monotonic() > until:
                raise TeacherError(
                    f"trying the graph's {len(candidates)} outputs takes longer than {limits.tries_s:g} s",
                    "Name the one that holds the answers: output_name.",
                )
            tried.append(_tried(sandbox, value, agreed))
        outputs = tuple(facts for facts in tried if facts is not None)
        if not outputs:
            described = "; ".join(f"'{value.name}' {value.told()}" for value in sandbox.outputs[:5])
            raise TeacherError(
                f"the graph has no output of the shape [N, classes]: it has {described}",
                "Export it so that it answers each image with one row of numbers, one a class.",
            )
        return OnnxFacts(
            sha256=sandbox.sha256,
            bytes=sandbox.bytes,
            parameters=sandbox.parameters,
            input_name=sandbox.input.name,
            input_shape=sandbox.input.shape,
            input_dtype=_INPUT_TYPES[sandbox.input.type],
            dynamic_batch=sandbox.input.dynamic_batch,
            format=agreed,
            outputs=outputs,
        )


@dataclass(frozen=True)
class _Tensor:
    """An input or output as onnxruntime describes it."""

    name: str
    shape: tuple[int | None, ...]
    type: str

    @classmethod
    def read(cls, value: Mapping[str, Any]) -> Self:
        return cls(str(value["name"]), tuple(value["shape"]), str(value["type"]))

    @property
    def dynamic_batch(self) -> bool:
        return self.shape[0] is None

    def told(self) -> str:
        sizes = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.type} [{sizes}]"


def _image_input(inputs: list[_Tensor]) -> _Tensor:
    """The one input that takes images. Raises `TeacherError`."""
    if len(inputs) != 1:
        names = ", ".join(f"'{value.name}' {value.told()}" for value in inputs[:5])
        raise TeacherError(
            f"the graph has {len(inputs)} inputs{': ' + names if names else ''}",
            "It must have one, which takes a batch of images. Make the others constants when you export it.",
        )
    (value,) = inputs
    if len(value.shape) != 4:
        raise TeacherError(
            f"the graph's input '{value.name}' is {value.told()}",
            "It must have four dimensions: [N, channels, height, width] or [N, height, width, channels].",
        )
    if value.type not in _INPUT_TYPES:
        raise TeacherError(
            f"the graph's input '{value.name}' is {value.told()}", "It must take float32, float16 or uint8."
        )
    if value.shape[0] not in (None, 1):
        raise TeacherError(
            f"the graph's input '{value.name}' takes exactly {value.shape[0]} images at once",
            "Export it with a dynamic first dimension, or with 1.",
        )
    return value


def _agreed(value: _Tensor, stated: InputFormat | None) -> InputFormat:
    """The format stated, where the graph can take it; else what the graph's input is. Raises `TeacherError`."""
    dtype: Literal["uint8", "float32"] = "uint8" if value.type == "tensor(uint8)" else "float32"
    if stated is not None:
        sizes = (stated.channels, stated.height, stated.width)
        wanted = sizes if stated.layout == "NCHW" else (*sizes[1:], sizes[0])
        fits = all(size in (None, want) for size, want in zip(value.shape[1:], wanted, strict=True))
        if not fits or stated.dtype != dtype:
            raise TeacherError(
                f"the graph's input '{value.name}' is {value.told()}; `input` states {stated.dtype}"
                f" [N, {', '.join(map(str, wanted))}]",
                "Correct height, width, channels, layout or dtype of `input`.",
            )
        return stated
    layout: Literal["NCHW", "NHWC"] = "NCHW" if value.shape[1] in (1, 3) else "NHWC"
    channels, height, width = (value.shape[at] for at in ((1, 2, 3) if layout == "NCHW" else (3, 1, 2)))
    if height is None or width is None or channels is None:
        raise TeacherError(
            f"the graph's input '{value.name}' is {value.told()}: it leaves open how large its images are",
            "State `input`: height, width, channels and layout, as the teacher was trained.",
        )
    if channels not in (1, 3) or not (1 <= height <= 1024 and 1 <= width <= 1024):
        raise TeacherError(
            f"the graph's input '{value.name}' is {value.told()}",
            "It must take images of 3 channels (RGB) or 1 (grey), at most 1024 x 1024.",
        )
    known: dict[str, Any] = {"height": height, "width": width, "channels": channels, "layout": layout}
    return InputFormat(**known, dtype=dtype, range="0..255" if dtype == "uint8" else "0..1")


def _tried(sandbox: _Sandbox, value: _Tensor, format: InputFormat) -> OutputFacts | None:
    """What the output says of noise; None where it cannot be answers. Raises `TeacherError` where it fails."""
    if not value.type.startswith("tensor(") or value.type == "tensor(string)" or len(value.shape) > 2:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (2, format.height, format.width, 3), np.uint8)
    images = formats.prepared(list(noise), format)
    rows = [sandbox.run(images[at : at + 1], value.name) for at in (0, 1)]
    if rows[0].ndim not in (1, 2) or rows[0].shape[0] != 1 or rows[0].shape != rows[1].shape:
        return None
    raw = np.concatenate(rows)
    if not np.isfinite(raw.astype(np.float64)).all():
        raise TeacherError(
            f"the graph's output '{value.name}' holds NaN or infinity for an image of noise",
            "Check the exported file, and the range, mean and std of `input`.",
        )
    looks = formats.looks_like(raw)
    classes = raw.shape[1] if raw.ndim == 2 and raw.shape[1] > 1 else 0
    if not classes and looks is not AnswerKind.LABEL:
        return None
    if sandbox.input.dynamic_batch:
        _check_batch(raw, sandbox.run(images, value.name), value.name)
    return OutputFacts(value.name, value.shape, str(raw.dtype), classes, looks)


def _check_batch(single: NDArray[np.generic], together: NDArray[np.generic], output: str) -> None:
    """Two images must be answered together as each by itself: answers are kept by image."""
    if together.shape != single.shape:
        raise TeacherError(
            f"the graph answers two images with an output '{output}' of shape {list(together.shape)}, expected"
            f" {list(single.shape)}",
            "Export it with a first dimension that is dynamic all through, or fixed at 1.",
        )
    alone, beside = single.astype(np.float64), together.astype(np.float64)
    if not np.all(np.abs(alone - beside) <= _REPEATABLE * max(1e-6, float(np.abs(alone).max()))):
        raise TeacherError(
            f"the graph's output '{output}' is another when an image is asked about beside a second one",
            "Export it in inference mode (without dropout), with the softmax over the classes, not over the batch.",
        )


class _Sandbox:
    """One child process with one model in it; not for several threads at once, but for `close`.

    A thread of its own starts the child and kills it when it is late: a child dies with the thread that started
    it, and this one lives as long as the child may.
    """

    def __init__(self, path: Path, limits: Limits, mode: Literal["check", "trust"], sha256: str = "") -> None:
        self._limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        self._timed_out = False
        self._closing = False
        self._deadline: float | None = None
        self._changed = threading.Condition()
        started = threading.Event()
        with _opened(path) as file:
            self.bytes = os.fstat(file.fileno()).st_size
            if self.bytes > limits.bytes:
                raise TeacherError(
                    f"the teacher's file has {self.bytes:,} bytes; at most {limits.bytes:,} are accepted",
                    "Use a smaller teacher, or serve it over HTTP.",
                )
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 and self.sha256 != sha256:
                raise TeacherError("the teacher's file is not the one that was uploaded", "Upload it again.")
            file.seek(0)  # the child reads on from where this process stopped
            self._keeper = threading.Thread(
                target=self._keep, args=(file.fileno(), mode, started), name="onnx-sandbox", daemon=True
            )
            self._keeper.start()
            started.wait()
        facts, _ = self._ask(None, limits.load_s, "loading the teacher")
        try:
            inputs, outputs = (
                [_Tensor.read(value) for value in facts[name]] for name in ("inputs", "outputs")
            )
            self.parameters = int(facts["parameters"])
            self.outputs = outputs
            self.input = _image_input(inputs)
        except (KeyError, TypeError, ValueError):
            raise self._lost("loading the teacher", limits.load_s) from None
        except TeacherError:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        ended = self._child is None or self._child.poll() is not None
        return not (ended or self._closing or self._timed_out)

    def run(self, images: NDArray[Any], output: str) -> NDArray[np.generic]:
        """The output for one batch as prepared for the graph. Raises `TeacherError`."""
        header = {"shape": images.shape, "dtype": str(images.dtype), "output": output}
        doing = f"answering {len(images)} image(s)"
        facts, payload = self._ask((header, images.tobytes()), self._limits.call_s, doing)
        try:
            array = np.frombuffer(payload, _OUTPUT_TYPES[facts["dtype"]]).reshape(facts["shape"])
        except (KeyError, TypeError, ValueError):
            raise self._lost(doing, self._limits.call_s) from None
        return array.astype(np.uint8) if array.dtype == np.bool_ else array

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._keeper.join()
        if self._child is None:
            return
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(OSError, ValueError):  # what it did not read any more
                if pipe is not None:
                    pipe.close()

    def _keep(self, model: int, mode: str, started: threading.Event) -> None:
        """The thread: starts the child, waits for its deadline or for `close`, kills it."""
        limits = json.dumps(asdict(self._limits))
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-I", str(PROGRAM), str(os.getpid()), str(model), mode, limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(model,),
                start_new_session=True,
                cwd="/",
                env={"LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:
            self._failure = error
            return
        finally:
            started.set()
        with self._changed:
            while not self._closing and not self._timed_out:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                self._timed_out = left is not None and left <= 0
                if not self._timed_out:
                    self._changed.wait(left)
            with contextlib.suppress(ProcessLookupError):
                if self._child.returncode is None:
                    os.killpg(self._child.pid, signal.SIGKILL)

    def _ask(
        self, question: tuple[Mapping[str, Any], bytes] | None, seconds: float, doing: str
    ) -> tuple[dict[str, Any], bytes]:
        """Sends a frame, if any, and receives one. Raises `TeacherError`; the child lives on only if it said why."""
        if self._child is None:
            raise TeacherError(f"the teacher's process does not start: {self._failure}", "Try again later.")
        requests, answers = self._child.stdin, self._child.stdout
        assert requests is not None
        assert answers is not None
        self._set_deadline(seconds)
        try:
            if question is not None:
                header = json.dumps(question[0]).encode()
                requests.write(HEADER.pack(len(header), len(question[1])) + header)
                requests.write(question[1])
                requests.flush()
            facts, payload = _frame(answers)
        except (OSError, EOFError, ValueError):
            raise self._lost(doing, seconds) from None
        finally:
            self._set_deadline(None)
        if "detail" in facts:
            if question is None:
                self.close()
            raise TeacherError(str(facts["detail"])[:1000], str(facts.get("hint", ""))[:1000])
        return facts, payload

    def _set_deadline(self, seconds: float | None) -> None:
        with self._changed:
            self._deadline = None if seconds is None else time.monotonic() + seconds
            self._changed.notify()

    def _lost(self, doing: str, seconds: float) -> TeacherError:
        """Ends the child, which said nothing sensible, and tells what became of it."""
        assert self._child is not None
        was_closed = self._closing
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(1)  # it may be ending by itself, and how is worth knowing
        self.close()
        code = self._child.returncode
        if was_closed:
            return TeacherError("the teacher was closed while it answered")
        if self._timed_out or code == -signal.SIGXCPU:
            return TeacherError(
                f"{doing} took longer than {seconds:g} s",
                "Use a faster teacher or smaller images; check that its loops end.",
            )
        ending = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return TeacherError(
            f"{doing}, the teacher's process ended ({ending})",
            "The file makes onnxruntime crash, or memory ran out. Export it again, simpler or smaller.",
        )


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise TeacherError(
            f"the teacher's file cannot be read ({error.strerror})", "Upload it again."
        ) from None


def _frame(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    header, payload = HEADER.unpack(_exactly(stream, HEADER.size))
    if header > _MAX_HEADER or payload > MAX_PAYLOAD:
        raise ValueError("the child's answer is too large")
    facts = json.loads(_exactly(stream, header))
    if not isinstance(facts, dict):
        raise ValueError("the child's answer has no header")
    return facts, _exactly(stream, payload)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError("the child ended")
    return content
