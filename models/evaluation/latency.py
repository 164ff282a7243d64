"""How long one image takes, student beside teacher: same runtime, same threads, same image, turn by turn.

Timing one after the other would give whichever ran in a quieter minute the better number; here every round times
each network once, in an order that turns from round to round. Decoding the file is not counted.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

WARM_UP = 5
#: One thread: the number that compares best between machines, and what a busy server gives a request.
THREADS = 1


class Runtime(Protocol):
    """The part of `onnxruntime.InferenceSession` that timing needs."""

    def run(self, outputs: None, inputs: dict[str, NDArray[np.uint8]]) -> Sequence[NDArray[np.float32]]: ...


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one image."""

    median_ms: float
    p95_ms: float
    runs: int


@dataclass(frozen=True)
class Speedup:
    """How many times faster: ratio of medians, with a 95 % bootstrap interval over rounds."""

    value: float
    low: float
    high: float


def interleaved(
    runtimes: Mapping[str, Runtime], image: NDArray[np.uint8], runs: int
) -> dict[str, NDArray[np.float64]]:
    """Seconds [runs] of each runtime for one image, uint8 [height, width, 3]."""
    feed = {"image": image[None]}
    names = list(runtimes)
    for _ in range(WARM_UP):
        for name in names:
            runtimes[name].run(None, feed)
    seconds = {name: np.empty(runs) for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(runs):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                runtimes[name].run(None, feed)
                seconds[name][turn] = time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    return seconds


def alone(answer: Callable[[], object], runs: int, most_s: float) -> NDArray[np.float64]:
    """Seconds [at most `runs`] of each call of `answer`, for about `most_s` seconds; the first call is not counted."""
    answer()
    seconds: list[float] = []
    while len(seconds) < runs and (not seconds or sum(seconds) < most_s):
        start = time.perf_counter()
        answer()
        seconds.append(time.perf_counter() - start)
    return np.array(seconds)


def summary(seconds: NDArray[np.float64]) -> Latency:
    median, high = np.percentile(seconds * 1e3, (50, 95))
    return Latency(float(median), float(high), len(seconds))


def speedup(slow: NDArray[np.float64], fast: NDArray[np.float64]) -> Speedup:
    """How many times `fast` is faster than `slow`; rounds are drawn in pairs, as both share a moment's load."""
    value = float(np.median(slow) / np.median(fast))
    found = stats.bootstrap(
        (slow, fast),
        lambda first, second, axis: np.median(first, axis=axis) / np.median(second, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Speedup(value, float(found.low), float(found.high))
