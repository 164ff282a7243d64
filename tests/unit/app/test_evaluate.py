"""`dram evaluate` as a person meets it: figures, where the doubt comes from, what to do next, what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from app import evaluate_command
from app.cli import cli
from models.evaluation import episodes
from models.evaluation.episodes import Answered, Costs, Evaluation
from models.evaluation.variance_components import Components, EpisodicAccuracy

QUICK = ("--student", "conv4", "--teacher", "efficientnet_lite0", "--preset", "draft", "--device", "cpu")
QUICK_PARAMS = (
    "--param",
    "teacher.input_size=32",
    "--param",
    "teacher.views=2",
    "--param",
    "distillation.steps=20",
)

USUAL = ("--ways", 2, "--shots", 2, "--queries", 8, "--student", "conv4", "--teacher", "efficientnet_lite0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 8 noisy images in two shades that overlap, so that not every answer is right."""
    root = tmp_path_factory.mktemp("shades")
    random = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light", "middle")):
        (root / name).mkdir()
        for index in range(8):
            level = random.normal(90 + 60 * number, 45)
            pixels = (random.integers(-60, 60, (32, 32, 3)) + level).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app.cli", "evaluate", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_it_prints_accuracy_the_sources_of_doubt_and_the_next_step(folder, tmp_path):
    shape = ("--ways", 2, "--shots", 2, "--queries", 12, "--work", tmp_path)
    one = evaluate(folder, *shape, "--episodes", 1, *QUICK, *QUICK_PARAMS)
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("accuracy ")
    assert "[" not in one.stdout
    assert "One episode has no interval" in one.stderr

    three = evaluate(folder, *shape, "--episodes", 3, *QUICK, *QUICK_PARAMS, "--json")
    assert three.returncode == 0, three.stderr
    document = json.loads(three.stdout)
    (kept,) = tmp_path.glob("kd-conv4-2way-2shot-*.json")
    assert json.loads(kept.read_text()) == document
    right = [episode["right"] for episode in document["episodes"]]
    assert document["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert f"accuracy {np.mean(right[0]):.1%}, 1 episode of 12 queries" in one.stdout
    assert (
        "2-way 2-shot: kd, conv4 taught by efficientnet_lite0, preset draft; 3 x 12 queries" in three.stderr
    )
    assert "episode 3: " in three.stderr


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and everything said, in this process and with the frames of messages undone."""
    ran = CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])
    return ran.exit_code, " ".join(ran.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--ways", 5, "--queries", 10), 1, "has 3 class folders; 5-way episodes need 5 Ask for fewer ways, or add"),
        (("--ways", 3, "--shots", 5, "--queries", 50), 1, "beside its 5 supports; 50 queries need 17 of each class"),
        (("--ways", 3, "--shots", 9, "--queries", 6), 1, "class 'dark' has 8 images; 9 are to be drawn"),
        (("--ways", 3, "--shots", 2, "--queries", 5), 1, "5 queries are too few for 3 classes"),
        (("--method", "magic"), 2, "there is no method 'magic'; there are: fsbbt, kd"),
        (("--teacher", "oracle"), 2, "there is no teacher 'oracle' in the catalogue; there are: dinov2_base"),
        (("--student", "giant"), 1, "there is no student 'giant'"),
        (("--generator", "embedded"), 2, "method 'kd' makes no use of a generator"),
        (("--preset", "hasty"), 2, "there is no preset 'hasty'"),
        (("--param", "distillation.steps=0"), 2, "distillation.steps: Input should be greater than or equal to 1"),
        (("--param", "steps=4"), 2, "should read GROUP.NAME=VALUE"),
        (("--episode-cost", 4), 2, "give both, or neither"),
        (("--episodes", 0), 2, "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_with_the_way_out(folder, tmp_path, arguments, code, words):
    found, said = run(folder, *USUAL, *arguments, "--work", tmp_path / "work")
    assert found == code
    assert words in said
    assert not (tmp_path / "work").exists()


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    code, said = run(tmp_path / "nowhere")
    assert code == 1
    assert "there is no folder" in said


def test_an_operators_file_of_teachers_that_is_missing_is_an_error(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DRAM_TEACHERS_FILE", str(tmp_path / "none.toml"))
    code, said = run(folder, "--ways", 2, "--shots", 2, "--queries", 8)
    assert code == 1
    assert "DRAM_TEACHERS_FILE" in said


def test_a_generator_of_the_operators_file_is_known(folder, tmp_path, monkeypatch):
    (tmp_path / "own.toml").write_text(
        f"""
        [[generator]]
        name = "mine"
        title = "Bolts"
        kind = "local"
        source = "{tmp_path / "bolts"}"
        resolution = 64
        licence = "proprietary"
        licence_url = "https://example.org/licence"
        """
    )
    monkeypatch.setenv("DRAM_TEACHERS_FILE", str(tmp_path / "own.toml"))
    order = (folder, *USUAL, "--method", "tint", "--work", tmp_path / "work")
    code, said = run(*order, "--generator", "mine")
    assert code == 1
    assert "generator 'mine' cannot be had" in said  # its folder is not there
    code, said = run(*order, "--generator", "another")
    assert code == 2
    assert "there is no generator 'another'; there are: embedded, mine" in said


def evaluation(components: Components, costs: Costs, wanted: float = 0.02) -> Evaluation:
    accuracy = EpisodicAccuracy(0.6, 0.5, 0.7, 0.1, "", 4, 50, components)
    answered = Answered(0, ("a", "b"), (), (), (True,), 40.0, 0.05)
    planned = episodes.plan(accuracy, costs, 5, 1000, wanted)
    return Evaluation(Path("results.json"), (answered,), accuracy, costs, planned)


VARIED = Components(0.003, 0.001, 0.04, 0.2, measured=0.007)


def test_the_next_step_names_episodes_time_and_the_best_number_of_queries():
    found = evaluation(VARIED, Costs(40.0, 0.05))
    assert found.plan is not None
    more, best = evaluate_command._advice(found, seconds=True)
    added = found.plan.episodes - 4
    minutes = round(added * 42.5 / 60)
    assert more.startswith(
        f"{added} more episodes would bring it to ±2 points: --episodes {added + 4}, about {minutes} min."
    )
    assert f"({found.plan.episodes_low - 4} to {found.plan.episodes_high - 4:,} more" in more
    assert f"--queries {found.plan.queries}" in best
    assert f"{found.plan.episodes_then} episodes in all" in best


def test_the_next_step_does_not_take_costs_in_another_unit_for_time():
    more, best = evaluate_command._advice(evaluation(VARIED, Costs(4.0, 0.005)), seconds=False)
    assert " min" not in more
    assert "the costs given" in best


def test_an_interval_that_is_narrow_enough_asks_for_nothing_more():
    lines = evaluate_command._advice(evaluation(VARIED, Costs(40.0, 0.8), wanted=0.5), seconds=True)
    assert lines == [
        "The interval is within ±50 points already.",
        "50 queries an episode are about the best use of time.",
    ]


def test_where_episodes_do_not_differ_more_queries_are_asked_for():
    alike = replace(VARIED, between=0.0, within=0.0)
    (line,) = evaluate_command._advice(evaluation(alike, Costs(40.0, 0.05)), seconds=True)
    assert "ask more queries" in line


def test_without_a_measured_cost_the_costs_are_asked_for():
    lines = evaluate_command._advice(evaluation(VARIED, Costs(None, 0.05)), seconds=True)
    assert "--episode-cost" in lines[1]
    assert "about" not in lines[0].split("(")[0]
