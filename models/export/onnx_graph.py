"""The student as one ONNX file: pixels in, class probabilities out, preprocessing inside the graph.

    image  uint8 [batch, height, width, 3], RGB, any height and width
      -> Cast, Transpose, Resize (linear, antialias, half_pixel) to S x S, scale and shift, network, Softmax
    probabilities  float [batch, classes]

Only standard operators of opset 18 are used, so every ONNX Runtime (web, mobile, C#) runs the file. Scores
that differ between trainer and product nearly always come from resizing or normalising twice or otherwise;
here the caller can do neither.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from models import students, teachers
from models.errors import ExportError
from models.export import parity, quantise, samples
from models.pipeline import StageContext
from models.stages import ExportParams
from models.teachers import black_box_questions

OPSET = 18
#: Opset 18 came with IR 8; newer IRs only add types and fields that these graphs do not have.
IR_VERSION = 8
INPUT = "image"
OUTPUT = "probabilities"
FILE_NAME = "model.onnx"
INT8_FILE_NAME = "model.int8.onnx"
EXPORT_FILE_NAME = "export.json"

#: Images that the parity check looks at; the first `parity.GOLDEN_IMAGES` of them travel in the bundle.
PARITY_IMAGES = 64
CALIBRATION_IMAGES = 256
#: Integer kernels round differently from processor to processor.
INT8_TOLERANCE = {"rtol": 0.0, "atol": 0.05}


class PixelNetwork(nn.Module):
    """A network with what comes before it: image uint8 [B, H, W, 3] -> what it answers to S x S pixels, normalised.

    `network` takes float [B, 3, S, S]. `mean` and `std` hold for pixels in 0..1.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, input_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.network = network
        self.input_size = input_size
        # (x / 255 - mean) / std as one multiplication and one addition
        deviation = torch.tensor(std, dtype=torch.float64)
        centre = torch.tensor(mean, dtype=torch.float64)
        self.register_buffer("scale", (1 / (255 * deviation)).float().reshape(1, 3, 1, 1))
        self.register_buffer("shift", (-centre / deviation).float().reshape(1, 3, 1, 1))

    def logits(self, image: Tensor) -> Tensor:
        pixels = image.permute(0, 3, 1, 2).float()
        size = (self.input_size, self.input_size)
        pixels = functional.interpolate(
            pixels, size=size, mode="bilinear", antialias=True, align_corners=False
        )
        logits: Tensor = self.network(pixels * self.scale + self.shift)
        return logits


class PixelClassifier(PixelNetwork):
    """image uint8 [B, H, W, 3] -> probabilities float [B, classes], of a network that gives logits [B, classes]."""

    def forward(self, image: Tensor) -> Tensor:
        return self.logits(image).softmax(dim=1)


def build(
    network: nn.Module,
    input_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    properties: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """The graph of `network` behind its preprocessing, checked by `onnx.checker`.

    Equal inputs give equal bytes. Raises `ExportError` if the network cannot be written with standard operators.
    """
    return graph_of(PixelClassifier(network, input_size, mean, std), input_size, [OUTPUT], properties)


def graph_of(
    module: nn.Module, input_size: int, outputs: Sequence[str], properties: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """As `build`, of a module that has its preprocessing inside: image uint8 [B, H, W, 3] -> tensors of these names."""
    ready = module.eval().cpu().float()
    sample = torch.zeros(2, input_size + 3, input_size + 5, 3, dtype=torch.uint8)
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                ready,
                (sample,),
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                input_names=[INPUT],
                output_names=list(outputs),
                dynamic_shapes={INPUT: {0: batch, 1: height, 2: width}},
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(f"the network cannot be written as an ONNX graph: {reason}") from error
    if program is None:
        raise ExportError("the exporter gave no ONNX graph")
    graph = _tidied(program.model_proto)
    set_properties(graph, properties or {})
    require_standard_operators(graph)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def parameter_count(network: nn.Module) -> int:
    """Learned numbers of a network (buffers such as running means are none)."""
    return sum(parameter.numel() for parameter in network.parameters())


def set_properties(graph: onnx.ModelProto, properties: Mapping[str, str]) -> None:
    """Replace the graph's metadata by `properties`, in sorted order."""
    del graph.metadata_props[:]
    onnx.helper.set_model_props(graph, dict(sorted(properties.items())))


def require_standard_operators(graph: onnx.ModelProto) -> None:
    """Raise `ExportError` if a node needs operators that a plain ONNX Runtime build may lack."""
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in graph.graph.node if node.domain})
    if foreign:
        raise ExportError(f"the graph uses operators outside the ONNX standard: {', '.join(foreign)}")
    quantise.keep_used_operator_sets(graph)


def to_bytes(graph: onnx.ModelProto) -> bytes:
    content: bytes = graph.SerializeToString(deterministic=True)
    return content


def properties_of(
    classes: Sequence[str],
    input_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    teacher: Mapping[str, str],
) -> dict[str, str]:
    """What a stranger needs to use the file, as ONNX metadata (names and values are strings)."""
    return {
        "labels": json.dumps(list(classes), ensure_ascii=False),
        "input_size": str(input_size),
        "input_layout": "NHWC uint8",
        "colour_order": "RGB",
        "mean": json.dumps([round(value, 8) for value in mean]),
        "std": json.dumps([round(value, 8) for value in std]),
        "preprocessing": "inside the graph: resize (linear, antialias), divide by 255, normalise",
        "torch_version": metadata.version("torch"),
        "onnx_version": metadata.version("onnx"),
        **teacher,
    }


def _tidied(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Without what the exporter notes about this machine: stack traces, module paths, file names."""
    tidy = onnx.ModelProto()
    tidy.CopyFrom(graph)
    tidy.ir_version = IR_VERSION
    tidy.doc_string = ""
    tidy.graph.name = "dram_student"
    tidy.graph.doc_string = ""
    del tidy.graph.metadata_props[:]
    del tidy.graph.value_info[:]  # inferred shapes; every reader infers them anew
    for node in tidy.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*tidy.graph.input, *tidy.graph.output, *tidy.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    return tidy


def run(context: StageContext, params: ExportParams) -> None:
    """EXPORT: the trained student as `model.onnx`, if asked as `model.int8.onnx` too, checked against PyTorch.

    Writes besides: `parity.json` (how far ONNX Runtime and PyTorch are apart), `golden/` and `golden.json`
    (images with expected scores), `export.json` (sizes, versions, what the report must know to judge int8).
    Raises `ExportError` if ONNX Runtime does not answer as PyTorch does.
    """
    student = students.load(context.folder("trained_student"), device="cpu")
    reference = parity.Reference(student.network.eval(), student.input_size, student.mean, student.std)
    steps = 3 if params.int8 else 2
    properties = properties_of(
        student.classes, student.input_size, student.mean, student.std, teacher_properties(context)
    )
    graph = build(student.network, student.input_size, student.mean, student.std, properties)
    content = to_bytes(graph)
    (context.output / FILE_NAME).write_bytes(content)
    context.report(1, steps)

    shown, *_ = samples.learned_from(context.inputs)
    chosen = samples.stratified(shown, PARITY_IMAGES, student.classes)
    golden = [samples.shrunk(sample) for sample in chosen[: parity.GOLDEN_IMAGES]]
    checked = parity.check(content, reference, [*golden, *chosen[parity.GOLDEN_IMAGES :]])
    write_json(context.output / "parity.json", asdict(checked))
    context.report(2, steps, largest_difference=checked.largest_difference)

    int8: dict[str, Any] = {"asked": params.int8, "made": False, "reason": ""}
    expected = {FILE_NAME: [reference.probabilities(sample.pixels[None])[0] for sample in golden]}
    if params.int8:
        support, unlabelled = (
            context.folder(name) if name in context.inputs else None for name in ("support", "unlabelled")
        )
        calibration = samples.calibration(support, unlabelled, CALIBRATION_IMAGES, _held_out(context))
        try:
            quantised = to_bytes(quantise.static_int8(graph, calibration))
        except ExportError as error:
            int8["reason"] = error.detail
        else:
            (context.output / INT8_FILE_NAME).write_bytes(quantised)
            int8 |= {"made": True, "bytes": len(quantised), "calibration_images": len(calibration)}
            runtime = parity.session(quantised)
            expected[INT8_FILE_NAME] = [
                runtime.run(None, {INPUT: sample.pixels[None]})[0][0] for sample in golden
            ]
        context.report(3, steps)
    _write_golden(context.output, golden, student.classes, expected)
    drop = params.max_accuracy_drop
    write_export(context.output, student.network, content, max_accuracy_drop=drop, int8=int8)


def write_export(folder: Path, network: nn.Module, content: bytes, **more: Any) -> None:
    """`export.json`: size and versions of the ONNX file of a network, and what `more` the report must know."""
    facts = {
        "parameters": parameter_count(network),
        "bytes": len(content),
        "opset": OPSET,
        "ir_version": IR_VERSION,
    }
    write_json(folder / EXPORT_FILE_NAME, {**facts, **more})


def _held_out(context: StageContext) -> tuple[int, ...]:
    """The images that the student of a black box is judged by: its int8 file must not be fitted to them."""
    if "black_box" not in context.inputs:
        return ()
    return black_box_questions.read(context.folder("black_box")).held_out


def teacher_properties(context: StageContext) -> dict[str, str]:
    """The teacher's name and licence as graph metadata, where the stage is given the teacher.

    Of a black box nothing else goes out: its name is an id of this service, its source may be a private address.
    """
    if "teacher" not in context.inputs:
        return {}
    spec = teachers.read_any(context.folder("teacher"))
    return {
        "teacher": spec.name if isinstance(spec, teachers.TeacherSpec) else spec.title,
        "teacher_licence": spec.licence,
        "teacher_licence_url": spec.licence_url,
    }


def _write_golden(
    folder: Path,
    golden: Sequence[samples.Sample],
    classes: Sequence[str],
    expected: Mapping[str, Sequence[NDArray[np.float32]]],
) -> None:
    """`golden/NN.png` and, in `golden.json`, each image's scores by every file that was made."""
    (folder / "golden").mkdir()
    entries = []
    for number, sample in enumerate(golden):
        file = f"golden/{number:02d}.png"
        Image.fromarray(sample.pixels).save(folder / file, optimize=True)
        label = None if sample.label is None else classes[sample.label]
        scores = {name: [round(float(score), 7) for score in rows[number]] for name, rows in expected.items()}
        entries.append({"file": file, "label": label, "scores": scores})
    tolerance = {FILE_NAME: {"rtol": parity.RTOL, "atol": parity.ATOL}, INT8_FILE_NAME: INT8_TOLERANCE}
    document = {"tolerance": {name: tolerance[name] for name in expected}, "images": entries}
    write_json(folder / "golden.json", document)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
