"""Does ONNX Runtime answer as PyTorch does? Checked on real images before a student may leave the house.

The reference takes the training path (`models.data.images`: resize, normalise; then the network), not the
graph's own preprocessing, so that a wrong mean, a swapped colour or another resize shows as a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from models.data import images
from models.errors import ExportError
from models.export.samples import Sample

RTOL, ATOL = 1e-3, 1e-4
#: Where the two best scores lie closer than this, either may come first.
TIE = 10 * ATOL
BATCHES = (1, 2, 7)
#: Images that travel in the bundle with their expected scores.
GOLDEN_IMAGES = 8

LEVELS = {
    "optimisations off": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "optimisations on": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


#: Asks a graph for the scores of uint8 [B, height, width, 3].
Answer = Callable[[onnxruntime.InferenceSession, NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Parity:
    """`largest_difference` of any two scores over all comparisons; `images` distinct images looked at."""

    images: int
    comparisons: int
    largest_difference: float
    rtol: float
    atol: float
    batches: tuple[int, ...]
    levels: tuple[str, ...]


@dataclass(frozen=True)
class Reference:
    """The trained network with its input's size and normalisation, on the CPU."""

    network: nn.Module
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @torch.inference_mode()
    def probabilities(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float [B, classes] from uint8 [B, height, width, 3], as in training."""
        resized = images.resize(torch.from_numpy(batch).permute(0, 3, 1, 2), self.input_size)
        logits = self.network(images.normalise(resized, self.mean, self.std))
        scores: NDArray[np.float32] = logits.float().softmax(1).numpy()
        return scores


def session(
    graph: bytes,
    level: onnxruntime.GraphOptimizationLevel = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    threads: int = 0,
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU; `threads` 0 leaves the count to ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Judge(Protocol):
    """What a graph is compared with."""

    def probabilities(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float [B, classes, ...] from uint8 [B, height, width, 3], without the graph."""


def _only_output(runtime: onnxruntime.InferenceSession, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
    scores: NDArray[np.float32]
    (scores,) = runtime.run(None, {"image": batch})
    return scores


def check(
    graph: bytes, reference: Judge, samples: Sequence[Sample], probabilities: Answer = _only_output
) -> Parity:
    """Compare the graph with `reference` on `samples`, in batches of 1, 2 and 7, optimisations off and on.

    `probabilities` asks the graph for what the reference gives, [B, classes, ...].
    Raises `ExportError` at the first score off by more than ATOL + RTOL * score, or another best class.
    """
    if not samples:
        raise ExportError("there is no image to compare the exported graph with PyTorch on")
    sessions = {name: session(graph, level) for name, level in LEVELS.items()}
    comparisons, largest = 0, 0.0
    for size in BATCHES:
        for names, batch in _batches(samples, size):
            expected = reference.probabilities(batch)
            for level, runtime in sessions.items():
                scores = probabilities(runtime, batch)
                largest = max(largest, _compare(scores, expected, names, f"batch {size}, {level}"))
                comparisons += 1
    return Parity(len(samples), comparisons, largest, RTOL, ATOL, BATCHES, tuple(LEVELS))


def _batches(samples: Sequence[Sample], size: int) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
    """The samples in batches of exactly `size`; in each, all are stretched to the first one's size."""
    endless = cycle(samples)
    for _ in range(max(1, len(samples) // size)):
        group = list(islice(endless, size))
        height, width = group[0].pixels.shape[:2]
        rows = [_stretched(sample.pixels, height, width) for sample in group]
        yield [sample.name for sample in group], np.stack(rows)


def _stretched(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _compare(
    scores: NDArray[np.float32], expected: NDArray[np.float32], names: Sequence[str], where: str
) -> float:
    """The largest difference; raises `ExportError` where it is too large."""
    if scores.shape != expected.shape:
        raise ExportError(
            f"the graph answers {list(scores.shape)} scores, PyTorch {list(expected.shape)} ({where})"
        )
    if not np.isfinite(expected).all():
        raise ExportError(f"the network's scores of '{names[0]}' are no numbers", "Train with a lower rate.")
    difference = np.abs(scores - expected)
    wrong = ~(difference <= ATOL + RTOL * np.abs(expected))  # true for NaN too
    if wrong.any():
        row = int(np.argwhere(wrong)[0][0])
        raise ExportError(
            f"ONNX Runtime and PyTorch differ by {difference[row].max():.2g} on '{names[row]}' ({where}); "
            f"at most {ATOL:g} + {RTOL:g} x score is allowed"
        )
    best = np.sort(expected, axis=1)[:, ::-1]
    margin = best[:, 0] - best[:, 1] if expected.shape[1] > 1 else np.ones_like(best[:, 0])
    swapped = (scores.argmax(1) != expected.argmax(1)) & (margin > TIE)
    if swapped.any():
        row = int(np.argwhere(swapped)[0][0])
        raise ExportError(f"ONNX Runtime and PyTorch name different classes for '{names[row]}' ({where})")
    return float(difference.max())
