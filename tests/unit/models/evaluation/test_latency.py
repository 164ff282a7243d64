import time

import numpy as np
import pytest

from models.evaluation import latency


class Sleeper:
    """A runtime that takes a known time and notes when it was asked."""

    def __init__(self, name, seconds, calls):
        self.name, self.seconds, self.calls = name, seconds, calls

    def run(self, outputs, inputs):
        assert inputs["image"].shape == (1, 4, 5, 3)
        self.calls.append(self.name)
        time.sleep(self.seconds)
        return [np.zeros((1, 2), dtype=np.float32)]


def test_networks_are_timed_in_turn_and_the_first_changes():
    calls = []
    runtimes = {"student": Sleeper("student", 0.001, calls), "teacher": Sleeper("teacher", 0.004, calls)}
    seconds = latency.interleaved(runtimes, np.zeros((4, 5, 3), dtype=np.uint8), runs=10)
    timed = calls[latency.WARM_UP * 2 :]
    assert timed[:4] == ["student", "teacher", "teacher", "student"]
    assert timed.count("student") == timed.count("teacher") == 10
    assert seconds["student"].min() >= 0.001
    assert seconds["teacher"].min() >= 0.004


def test_a_teacher_that_cannot_be_timed_in_turn_is_timed_alone_and_not_for_long():
    calls = []
    alone = Sleeper("alone", 0.004, calls)
    seconds = latency.alone(lambda: alone.run(None, {"image": np.zeros((1, 4, 5, 3))}), runs=6, most_s=9.0)
    assert (len(calls), len(seconds)) == (7, 6)
    assert seconds.min() >= 0.004
    assert 1 <= len(latency.alone(lambda: time.sleep(0.02), runs=50, most_s=0.05)) <= 3


def test_the_summary_is_in_milliseconds():
    found = latency.summary(np.arange(1, 101) / 1000)
    assert (found.median_ms, found.p95_ms, found.runs) == (pytest.approx(50.5), pytest.approx(95.05), 100)


def test_the_speedup_is_a_ratio_of_medians_inside_its_interval():
    random = np.random.default_rng(0)
    slow, fast = 6 + random.random(60), 2 + random.random(60)
    found = latency.speedup(slow, fast)
    assert found.value == pytest.approx(np.median(slow) / np.median(fast))
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.5


def test_a_speedup_of_constant_times_has_no_spread():
    found = latency.speedup(np.full(10, 4.0), np.full(10, 2.0))
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
