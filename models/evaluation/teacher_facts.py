"""What is known of the teacher beside its answers: much of a network, some of a file, nothing of an endpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import teachers
from models.errors import TeacherError
from models.evaluation import latency
from models.export import teacher_graph
from models.pipeline import StageContext
from models.teachers import TeacherSpec
from models.teachers.black_box import HttpTeacher, OnnxTeacher, model_path
from models.teachers.onnx_file import OnnxFile

#: Longest time that a file is timed for, in seconds: some take seconds for one image.
MOST_TIMING_S = 30.0


@dataclass(frozen=True)
class TeacherFacts:
    """`parameters` and `bytes` are None where they are not known. `black_box`: only its answers were used."""

    name: str
    title: str
    kind: str
    black_box: bool
    input_size: int
    parameters: int | None
    bytes: int | None


def read(context: StageContext) -> TeacherFacts:
    """From the teacher's ONNX graph where the method makes one, else from its spec."""
    spec = teachers.read_any(context.folder("teacher"))
    input_size: int = spec.input_size
    parameters: int | None = None
    size: int | None = None
    if "teacher_onnx" in context.inputs:
        path = context.folder("teacher_onnx") / teacher_graph.DOCUMENT_NAME
        graph: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        input_size, parameters, size = graph["input_size"], graph["parameters"], graph["bytes"]
    elif isinstance(spec, TeacherSpec):
        parameters = spec.parameters
    elif isinstance(spec, OnnxTeacher):
        parameters, size = spec.parameters or None, spec.bytes
    black_box = "black_box" in context.inputs
    return TeacherFacts(spec.name, spec.title, spec.kind, black_box, input_size, parameters, size)


def time_black_box(
    context: StageContext, image: NDArray[np.uint8], runs: int
) -> tuple[latency.Latency | None, str]:
    """How long a black box takes for `image` [height, width, 3], and how it was timed, as a clause.

    Only a file is timed, where it may run: behind its sandbox.
    """
    spec = teachers.read_any(context.folder("teacher"))
    if isinstance(spec, HttpTeacher):
        return None, "the latency of the teacher's endpoint was not measured"
    if not isinstance(spec, OnnxTeacher):
        return None, "the teacher's latency was not measured, as only its answers were used"
    try:
        with OnnxFile(model_path(context.folder("teacher")), spec) as box:
            seconds = latency.alone(lambda: box.answer([image]), runs, MOST_TIMING_S)
    except TeacherError as error:
        return None, f"the teacher's latency could not be measured: {error.detail}"
    return latency.summary(
        seconds
    ), "the teacher was timed through the sandbox that it runs in, with its overhead"
