"""Static int8 quantisation of an exported student, calibrated on real images.

Follows ONNX Runtime's own guidance ("Quantize ONNX models", and `quantize_static` on CPU inference): the graph
is first optimised and its shapes inferred (`quant_pre_process`), then QuantizeLinear/DequantizeLinear pairs
(QDQ) are placed, weights per output channel.

Three choices for small students that run on unknown machines:
- activations are unsigned, weights signed (U8S8): on x86 its kernels ran 2.5 times as fast as S8S8 on ResNet-10
  and MobileNetV3, at equal accuracy; ARM runs both;
- weights use 7 of their 8 bits (`reduce_range`): x86 processors without VNNI add pairs of 8-bit products in
  16 bits and saturate, so that a file measured here would score otherwise there;
- preprocessing, logits and softmax stay in float: they cost little, and 8-bit scores cannot say 0.999.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from models.errors import ExportError

#: Operators whose arguments are weights: what lies before the first of them is preprocessing.
_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})


def static_int8(
    graph: onnx.ModelProto,
    images: Iterable[NDArray[np.uint8]],
    method: CalibrationMethod = CalibrationMethod.MinMax,
) -> onnx.ModelProto:
    """`graph` with int8 weights and activations; its inputs, outputs and metadata stay as they are.

    `images`: uint8 [height, width, 3] each, real ones of every class; they set the activations' ranges.
    Raises `ExportError` if ONNX Runtime cannot quantise the graph.
    """
    with tempfile.TemporaryDirectory() as name:
        float_path, prepared_path, quantised_path = (
            Path(name, stem + ".onnx") for stem in ("float", "prepared", "quantised")
        )
        try:
            # saved, as quant_pre_process would move the weights of a graph in memory to a file
            onnx.save(graph, float_path)
            quant_pre_process(float_path, prepared_path, skip_symbolic_shape=True)
            prepared = onnx.load(prepared_path)
            _name_nodes(prepared)
            with _silenced():
                quantize_static(
                    prepared,
                    quantised_path,
                    _Images(images),
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                    reduce_range=True,
                    nodes_to_exclude=kept_in_float(prepared),
                    calibrate_method=method,
                    extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},  # the logits
                )
        except (RuntimeError, ValueError, TypeError) as error:
            raise ExportError(
                f"the graph cannot be quantised: {error}", "Set export.int8 to false."
            ) from error
        quantised = onnx.load(quantised_path)
    keep_used_operator_sets(quantised)
    return quantised


def keep_used_operator_sets(graph: onnx.ModelProto) -> None:
    """Drop operator sets that no node uses: the quantiser lists all that it knows."""
    used = {node.domain for node in graph.graph.node}
    kept = [entry for entry in graph.opset_import if entry.domain in used]
    del graph.opset_import[:]
    graph.opset_import.extend(kept)


def kept_in_float(graph: onnx.ModelProto) -> list[str]:
    """Names of the nodes that stay in float: everything before the first weighted operator, and softmax."""
    producers = {output: node for node in graph.graph.node for output in node.output}
    first = next((node for node in graph.graph.node if node.op_type in _WEIGHTED), None)
    if first is None:
        raise ExportError("the graph has no convolution and no matrix product, so nothing to quantise")
    before: set[str] = set()
    waiting = [first.input[0]]
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and node.name not in before:
            before.add(node.name)
            waiting.extend(node.input)
    softmax = (node.name for node in graph.graph.node if node.op_type == "Softmax")
    return sorted({*before, *softmax})


def int8_weight_share(graph: onnx.ModelProto) -> float:
    """The share of a graph's stored numbers that are 8-bit: tells a quantised file from a renamed one."""
    sizes = {True: 0, False: 0}
    for tensor in graph.graph.initializer:
        is_int8 = tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
        sizes[is_int8] += int(np.prod(tensor.dims, dtype=np.int64))
    return sizes[True] / max(1, sizes[True] + sizes[False])


class _Images(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """Feeds the calibrator one image at a time, as their sizes differ."""

    def __init__(self, images: Iterable[NDArray[np.uint8]]) -> None:
        self._images: Iterator[NDArray[np.uint8]] = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._images, None)
        return None if image is None else {"image": image[None]}


def _name_nodes(graph: onnx.ModelProto) -> None:
    """Give every node a name of its own: exclusion goes by name."""
    for index, node in enumerate(graph.graph.node):
        node.name = f"{node.op_type}_{index}"


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Without the quantiser's advice in the log, which was followed already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
