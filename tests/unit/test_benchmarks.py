"""What the benchmarks share: results that name no folder of a machine, targets, draws in order, intervals."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import command, record
from benchmarks.kd_cifar10 import interval


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "benchmarks/made_up.py",
            "--data",
            "/some/where",
            "--rows",
            "3",
            "--work=/tmp/x",
            "--teacher",
            "/my/vit",
        ],
    )
    return tmp_path


def test_a_result_tells_how_to_run_it_again_without_the_folders_of_a_machine(results: Path) -> None:
    record.write("made_up", rows=[{"row": "a", "accuracy": 0.5}], checks=[], seeds=[0, 1], quick=False)
    found = json.loads((results / "made_up.json").read_text())
    assert found["command"] == "python -m benchmarks.made_up --rows 3 --teacher vit"
    assert found["rows"] == [{"row": "a", "accuracy": 0.5}]
    assert found["seeds"] == [0, 1]
    assert found["versions"]["torch"][0].isdigit()


def test_the_quick_version_shows_its_rows_and_writes_no_result(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record.write("made_up", rows=[{"row": "a", "accuracy": 0.51239}], checks=[], seeds=[0], quick=True)
    assert "0.5124" in capsys.readouterr().out
    assert not list(results.iterdir())


@pytest.mark.parametrize(
    ("value", "target", "holds"),
    [
        (0.4, {"at_least": 0.4}, True),
        (0.39, {"at_least": 0.4}, False),
        (16.0, {"at_most": 15.0}, False),
        (15.0, {"at_most": 15.0}, True),
    ],
)
def test_a_check_holds_where_the_value_reaches_its_target(
    value: float, target: dict[str, float], holds: bool
) -> None:
    made = record.check("a target", value, (value - 1, value + 1), **target)
    assert (made["holds"], made["target"]) == (holds, target)


def test_draws_measured_at_once_come_back_in_their_order() -> None:
    assert command.at_once(abs, [-3, 2, -1], 2) == [3, 2, 1]


def test_a_benchmark_without_its_data_says_what_to_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not command.has_data(Namespace(data=tmp_path))
    assert "name its folder with --data" in capsys.readouterr().out
    (tmp_path / command.CIFAR10).touch()
    assert command.has_data(Namespace(data=tmp_path))


def test_an_interval_over_draws_is_students_t() -> None:
    reach = 4.3027 * 0.02 / 3**0.5  # two degrees of freedom; a standard deviation of 0.02
    assert interval([0.50, 0.52, 0.54], 10_000) == pytest.approx((0.52 - reach, 0.52 + reach), rel=1e-4)
