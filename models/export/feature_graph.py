"""A shortened vision transformer without a head as one ONNX file: pixels in, features out.

    image  uint8 [batch, height, width, 3], RGB, any height and width
      -> Resize to S x S, scale and shift, network (as in `onnx_graph`)
    features  float [batch, width]

The teacher is written in the same way to be compared with the student; it is never shipped.
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
from models.arrays import Features
from models.data import images
from models.export import onnx_graph, parity, samples, teacher_graph
from models.export.samples import Sample
from models.pipeline import StageContext
from models.students import shortened_vit

OUTPUT = "features"


class PixelFeatures(onnx_graph.PixelNetwork):
    """image uint8 [B, H, W, 3] -> features float [B, D], of a network that gives features."""

    def forward(self, image: Tensor) -> Tensor:
        return self.logits(image)


@dataclass(frozen=True)
class Reference:
    """The network on the CPU behind the preprocessing of training, not the graph's own."""

    network: nn.Module
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.inference_mode()
    def features(self, batch: NDArray[np.uint8]) -> Features:
        """[B, D] of uint8 [B, H, W, 3]."""
        resized = images.resize(torch.from_numpy(batch).permute(0, 3, 1, 2), self.input_size)
        found: Features = self.network(images.normalise(resized, self.mean, self.std)).float()
        return found


@dataclass(frozen=True)
class Scaled:
    """Features over their usual size, so that `parity` can compare them as it compares scores."""

    reference: Reference
    size: float

    @classmethod
    def on(cls, reference: Reference, sample: Sample) -> Scaled:
        return cls(reference, float(reference.features(sample.pixels[None]).square().mean().sqrt()))

    def probabilities(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        scaled: NDArray[np.float32] = (self.reference.features(batch) / self.size).numpy()
        return scaled

    def of_graph(
        self, runtime: onnxruntime.InferenceSession, batch: NDArray[np.uint8]
    ) -> NDArray[np.float32]:
        return features(runtime, batch) / np.float32(self.size)


def export_student(context: StageContext) -> None:
    """EXPORT: the student as `model.onnx`, checked against PyTorch on images that it learnt from.

    Writes besides: `parity.json`, `golden/` and `golden.json` (images with the features they must get), `export.json`.
    Raises `ExportError` if ONNX Runtime does not answer as PyTorch does.
    """
    backbone = shortened_vit.load_backbone(context.folder("trained_student"))
    own = (backbone.input_size, backbone.mean, backbone.std)
    properties = onnx_graph.properties_of((), *own, onnx_graph.teacher_properties(context))
    content = build(backbone.network, *own, {**properties, "task": "features"})
    (context.output / onnx_graph.FILE_NAME).write_bytes(content)
    context.report(1, 2)

    shown, *_ = samples.learned_from(context.inputs)
    chosen = samples.stratified(shown, onnx_graph.PARITY_IMAGES)
    golden = [samples.shrunk(sample) for sample in chosen[: parity.GOLDEN_IMAGES]]
    scaled = Scaled.on(Reference(backbone.network.eval(), *own), golden[0])
    compared = [*golden, *chosen[parity.GOLDEN_IMAGES :]]
    checked = parity.check(content, scaled, compared, scaled.of_graph)
    onnx_graph.write_json(
        context.output / "parity.json", {**asdict(checked), "size_of_features": scaled.size}
    )
    _write_golden(context.output, golden, parity.session(content))
    onnx_graph.write_export(context.output, backbone.network, content, width=backbone.embedding_dim)
    context.report(2, 2, largest_difference=checked.largest_difference)


def export_teacher(context: StageContext) -> None:
    """TEACHER_GRAPH: the whole teacher, at the size of the student's images."""
    backbone = shortened_vit.load_backbone(context.folder("trained_student"))
    spec = teachers.read_spec(context.folder("teacher"))
    teacher = teachers.load(spec, "cpu", backbone.input_size)
    network = teacher.network.to(memory_format=torch.contiguous_format)
    content = build(network, teacher.input_size, teacher.mean, teacher.std, {})
    teacher_graph.write(context, spec.name, content, network, teacher.input_size)


def build(
    network: nn.Module,
    input_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    properties: dict[str, str],
) -> bytes:
    """The ONNX file of a network that gives features [B, D]."""
    module = PixelFeatures(network, input_size, mean, std)
    return onnx_graph.to_bytes(onnx_graph.graph_of(module, input_size, [OUTPUT], properties))


def features(runtime: onnxruntime.InferenceSession, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What a graph gives for uint8 [B, H, W, 3]: float [B, D]."""
    found: NDArray[np.float32]
    (found,) = runtime.run([OUTPUT], {onnx_graph.INPUT: batch})
    return found


def _write_golden(folder: Path, golden: Sequence[Sample], runtime: onnxruntime.InferenceSession) -> None:
    """`golden/NN.png`, and `golden.json` with the features that each must get."""
    (folder / "golden").mkdir()
    entries = []
    for number, sample in enumerate(golden):
        file = f"golden/{number:02d}.png"
        Image.fromarray(sample.pixels).save(folder / file, optimize=True)
        given = features(runtime, sample.pixels[None])[0]
        entries.append({"file": file, "features": [round(float(value), 6) for value in given]})
    onnx_graph.write_json(folder / "golden.json", {"tolerance": parity.RTOL, "images": entries})
