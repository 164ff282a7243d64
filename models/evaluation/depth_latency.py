"""How much sooner a vision transformer answers without some of its blocks: in ONNX Runtime, beside the whole."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import onnxruntime
import torch
from torch import nn

from models.evaluation import latency
from models.export import onnx_graph, parity
from models.runtime import generator
from models.students import shortened_vit
from models.teachers.few_shot_head import HeadedNetwork
from models.teachers.protocol import Teacher

RUNS = 50
_CLASSES = 10


@dataclass(frozen=True)
class Timed:
    """Median milliseconds for an image of a student of so many `blocks` and of its teacher, and their ratio."""

    blocks: int
    student_ms: float
    teacher_ms: float
    share: float


class DepthTimer:
    """Times students of any number of blocks, one image and one thread, in turn with their teacher.

    Which blocks these are changes nothing, nor does their training: they are the teacher's first ones. `timed` keeps
    what was measured, in order.
    """

    def __init__(self, teacher: Teacher, runs: int = RUNS) -> None:
        self.teacher = teacher
        self.runs = runs
        self.timed: list[Timed] = []
        self._whole = session(teacher, teacher.network)
        side = teacher.input_size
        noise = torch.randint(0, 256, (side, side, 3), generator=generator(0, "latency"))
        self._image = noise.to(torch.uint8).numpy()

    def __call__(self, blocks: int) -> Timed:
        known = next((timed for timed in self.timed if timed.blocks == blocks), None)
        if known:
            return known
        student = session(self.teacher, shortened_vit.shorten(self.teacher.network, range(blocks)))
        seconds = latency.interleaved({"student": student, "teacher": self._whole}, self._image, self.runs)
        medians = {name: latency.summary(taken).median_ms for name, taken in seconds.items()}
        share = 1 / latency.speedup(seconds["teacher"], seconds["student"]).value
        self.timed.append(Timed(blocks, medians["student"], medians["teacher"], share))
        return self.timed[-1]


def session(teacher: Teacher, network: nn.Module) -> onnxruntime.InferenceSession:
    """`network`, of the teacher's kind, behind the teacher's preprocessing and with a head for ten classes."""
    own = copy.deepcopy(network).cpu().to(memory_format=torch.contiguous_format)
    headed = HeadedNetwork.empty(own, teacher.embedding_dim, _CLASSES, scale=1.0, unit=True)
    graph = onnx_graph.build(headed, teacher.input_size, teacher.mean, teacher.std)
    return parity.session(onnx_graph.to_bytes(graph), threads=latency.THREADS)
