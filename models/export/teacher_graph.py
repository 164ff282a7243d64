"""The teacher as an ONNX file with the student's input, so that both can be timed in the same runtime.

It is never shipped: backbone and few-shot head in one graph, pixels in, class probabilities out.
"""

from __future__ import annotations

import torch
from torch import nn

from models import teachers
from models.export import onnx_graph
from models.pipeline import StageContext
from models.teachers import few_shot_head
from models.teachers.few_shot_head import HeadedNetwork

FILE_NAME = "teacher.onnx"
DOCUMENT_NAME = "teacher_graph.json"


def run(context: StageContext, params: None) -> None:
    """TEACHER_GRAPH: write `teacher.onnx` and its parameter count and size in `teacher_graph.json`."""
    spec = teachers.read_spec(context.folder("teacher"))
    head = few_shot_head.load(context.folder("soft_labels"))
    teacher = teachers.load(spec, "cpu", head.input_size)
    network = HeadedNetwork.of(teacher.network.to(memory_format=torch.contiguous_format), head)
    graph = onnx_graph.build(network, teacher.input_size, teacher.mean, teacher.std)
    content = onnx_graph.to_bytes(graph)
    write(context, spec.name, content, network, teacher.input_size)


def write(context: StageContext, name: str, content: bytes, network: nn.Module, input_size: int) -> None:
    """A teacher's graph, whatever it gives, and what is known of it: its artefact is the same for every task."""
    (context.output / FILE_NAME).write_bytes(content)
    document = {
        "name": name,
        "parameters": onnx_graph.parameter_count(network),
        "bytes": len(content),
        "input_size": input_size,
    }
    onnx_graph.write_json(context.output / DOCUMENT_NAME, document)
    context.report(1, 1)
