"""The student of a segmentation as one ONNX file: pixels in, the class of each pixel out.

    image  uint8 [batch, height, width, 3], RGB, any height and width
      -> Resize to S x S, scale and shift, network (as in `onnx_graph`), Resize to height x width (linear), ArgMax
    logits   float [batch, classes, height, width]
    classes  uint8 [batch, height, width]

The teacher, with the head that was fitted to its own tokens, is written in the same way to be timed and judged beside
the student; it is never shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from models import teachers
from models.data import images
from models.errors import ExportError
from models.export import onnx_graph, parity, samples, teacher_graph
from models.export.samples import Sample
from models.pipeline import StageContext
from models.students import dense_vit
from models.students.dense_vit import DenseNetwork

LOGITS, CLASSES = "logits", "classes"
OUTPUTS = (LOGITS, CLASSES)
#: Share of a golden image's pixels that must get the class they got here: at edges two classes may be as good.
GOLDEN_AGREEMENT = 0.999


class PixelSegmenter(onnx_graph.PixelNetwork):
    """image uint8 [B, H, W, 3] -> logits float [B, C, H, W] and classes uint8 [B, H, W].

    `network`: normalised float [B, 3, S, S] -> logits [B, C, h, w] of patches.
    """

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = dense_vit.upsampled(self.logits(image), image.shape[1], image.shape[2])
        return logits, logits.argmax(1).to(torch.uint8)


@dataclass(frozen=True)
class Reference:
    """The network on the CPU behind the preprocessing of training, not the graph's own."""

    network: nn.Module
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.inference_mode()
    def probabilities(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float [B, C, H, W] from uint8 [B, H, W, 3]."""
        resized = images.resize(torch.from_numpy(batch).permute(0, 3, 1, 2), self.input_size)
        logits = self.network(images.normalise(resized, self.mean, self.std)).float()
        of_pixels = dense_vit.upsampled(logits, *batch.shape[1:3]).softmax(1)
        scores: NDArray[np.float32] = of_pixels.numpy()
        return scores


def export_student(context: StageContext) -> None:
    """EXPORT: the student as `model.onnx`, checked against PyTorch on labelled images.

    Writes besides: `parity.json`, `export.json`, `golden/` and `golden.json` (images and the class maps they must get).
    Raises `ExportError` if ONNX Runtime does not answer as PyTorch does.
    """
    student = dense_vit.load(context.folder("trained_student"))
    backbone = student.backbone
    own = (backbone.input_size, backbone.mean, backbone.std)
    properties = {
        **onnx_graph.properties_of(student.classes, *own, onnx_graph.teacher_properties(context)),
        "task": "segmentation",
    }
    content = build(student.network, *own, properties)
    (context.output / onnx_graph.FILE_NAME).write_bytes(content)
    context.report(1, 2)

    chosen = samples.stratified(context.folder("support"), parity.GOLDEN_IMAGES)
    golden = [samples.shrunk(sample) for sample in chosen]
    checked = parity.check(content, Reference(student.network.eval(), *own), golden, probabilities)
    onnx_graph.write_json(context.output / "parity.json", asdict(checked))
    _write_golden(context.output, golden, parity.session(content))
    onnx_graph.write_export(context.output, student.network, content)
    context.report(2, 2, largest_difference=checked.largest_difference)


def export_teacher(context: StageContext) -> None:
    """TEACHER_GRAPH: the whole teacher with its own head, as `teacher_graph` writes those of classifiers."""
    student = dense_vit.load(context.folder("trained_student"))
    spec = teachers.read_spec(context.folder("teacher"))
    teacher = teachers.load(spec, "cpu", student.backbone.input_size)
    network = DenseNetwork(teacher.network.to(memory_format=torch.contiguous_format), student.teacher_head)
    content = build(network, teacher.input_size, teacher.mean, teacher.std, {})
    teacher_graph.write(context, spec.name, content, network, teacher.input_size)


def build(
    network: nn.Module,
    input_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    properties: dict[str, str],
) -> bytes:
    """The ONNX file of a network that gives logits [B, C, h, w] of patches."""
    segmenter = PixelSegmenter(network, input_size, mean, std)
    return onnx_graph.to_bytes(onnx_graph.graph_of(segmenter, input_size, OUTPUTS, properties))


def probabilities(runtime: onnxruntime.InferenceSession, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What a graph gives for uint8 [B, H, W, 3], as float [B, C, H, W]. Raises `ExportError` for a wrong class map."""
    logits, classes = runtime.run(list(OUTPUTS), {onnx_graph.INPUT: batch})
    if not np.array_equal(classes, logits.argmax(1)):
        raise ExportError("the graph's class map does not name the classes with the highest logits")
    scores: NDArray[np.float32] = torch.from_numpy(logits).softmax(1).numpy()
    return scores


def class_map(runtime: onnxruntime.InferenceSession, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [H, W] of one image uint8 [H, W, 3]."""
    (classes,) = runtime.run([CLASSES], {onnx_graph.INPUT: pixels[None]})
    found: NDArray[np.uint8] = classes[0]
    return found


def _write_golden(folder: Path, golden: Sequence[Sample], runtime: onnxruntime.InferenceSession) -> None:
    """`golden/NN.png`, the class map it must get as `golden/NN.classes.png`, and `golden.json`, which lists them."""
    (folder / "golden").mkdir()
    entries = []
    for number, sample in enumerate(golden):
        file, expected = f"golden/{number:02d}.png", f"golden/{number:02d}.classes.png"
        Image.fromarray(sample.pixels).save(folder / file, optimize=True)
        Image.fromarray(class_map(runtime, sample.pixels)).save(folder / expected, optimize=True)
        entries.append({"file": file, "classes": expected})
    onnx_graph.write_json(folder / "golden.json", {"agreement": GOLDEN_AGREEMENT, "images": entries})
