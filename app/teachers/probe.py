"""Asks a teacher about one image and says what came of it, in words. A bad teacher is a report, never an error."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from app.security.egress import Egress
from app.settings import Settings
from app.storage import BlobStore
from app.teachers.schemas import ProbeReport, TopClass
from models.errors import TeacherError, TryAgain
from models.teachers.black_box import MODEL_FILE, Answers, BlackBox, BlackBoxTeacher, OnnxTeacher, Pixels
from models.teachers.http_endpoint import HttpEndpoint
from models.teachers.onnx_file import Limits, OnnxFile

_MOST_CLASSES = 5
#: A person waits for the answer, whatever the teacher's own timeout is.
_LONGEST_WAIT_S = 30.0


def probe(
    spec: BlackBoxTeacher,
    files: Mapping[str, str],
    headers: Mapping[str, str],
    image: Pixels | None,
    settings: Settings,
    blobs: BlobStore,
) -> ProbeReport:
    """The report on one question about `image` [H, W, 3] (None: a test pattern)."""
    picture = pattern(spec.input.height, spec.input.width) if image is None else image
    started = time.monotonic()
    try:
        with _opened(spec, files, headers, settings, blobs) as box:
            started = time.monotonic()
            answers = box.answer([picture])
    except TeacherError as error:
        return _failed(error)
    seconds = time.monotonic() - started
    if answers.shape != (1, len(spec.classes)):
        words = f"It answered an array of shape {list(answers.shape)}; [1, {len(spec.classes)}] was expected."
        return _report(answers, spec, seconds, [words], "Give one class name for each of its outputs.")
    return _report(answers, spec, seconds, [], "")


def pattern(height: int, width: int) -> Pixels:
    """A picture [H, W, 3] with colours, edges and gradients, always the same."""
    across = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    rows, columns = np.indices((height, width))
    board = ((rows * 8 // height + columns * 8 // width) % 2) * 255.0
    return np.stack([across, down, board], -1).astype(np.uint8)


@contextmanager
def _opened(
    spec: BlackBoxTeacher,
    files: Mapping[str, str],
    headers: Mapping[str, str],
    settings: Settings,
    blobs: BlobStore,
) -> Iterator[BlackBox]:
    with tempfile.TemporaryDirectory(prefix="dram-probe-") as folder:
        if isinstance(spec, OnnxTeacher):
            path = Path(folder, MODEL_FILE)
            blobs.fetch(files[MODEL_FILE], path)
            box: BlackBox = OnnxFile(path, spec, Limits(bytes=settings.max_model_bytes))
            transport = None
        else:
            patient = spec.model_copy(update={"timeout_s": min(spec.timeout_s, _LONGEST_WAIT_S)})
            transport = Egress(settings.egress_allow)
            box = HttpEndpoint(patient, transport, headers)
        try:
            yield box
        finally:
            box.close()
            if transport is not None:
                transport.close()


def _report(
    answers: Answers, spec: BlackBoxTeacher, seconds: float, problems: list[str], hint: str
) -> ProbeReport:
    said = [] if problems else list(zip(spec.classes, answers[0].tolist(), strict=True))
    ranked = sorted((pair for pair in said if np.isfinite(pair[1])), key=lambda pair: -pair[1])
    return ProbeReport(
        ok=not problems,
        latency_ms=round(1000 * seconds, 1),
        shape=list(answers.shape),
        top=[TopClass(name=name, score=score) for name, score in ranked[:_MOST_CLASSES]],
        problems=problems,
        hint=hint,
    )


def _failed(error: TeacherError) -> ProbeReport:
    hint = error.hint
    if isinstance(error, TryAgain) and error.after:
        hint = f"{hint} It asks to be left alone for {error.after:g} s.".strip()
    return ProbeReport(
        ok=False,
        latency_ms=None,
        shape=None,
        top=[],
        problems=[_sentence(error.detail)],
        hint=_sentence(hint),
    )


def _sentence(words: str) -> str:
    """With a capital and a full stop."""
    words = words.strip()
    return words and words[0].upper() + words[1:] + ("" if words.endswith((".", "!", "?")) else ".")
