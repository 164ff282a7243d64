"""Drawing episodes, running them through a real method, and going on where a run stopped."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import local, students
from models.data import archive
from models.errors import DataError
from models.evaluation import episode_draws, episodes, variance_components
from models.evaluation.episodes import Answered, Costs, Setting
from models.evaluation.variance_components import Components, EpisodicAccuracy
from models.methods import METHODS
from models.teachers import TEACHERS

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "grey": (120, 120, 120)}
IMAGES = 9
QUICK = {"teacher": {"input_size": 32, "views": 2}, "distillation": {"steps": 40, "batch_size": 8}}


def fill(folder: Path, colour: tuple[int, int, int], count: int, random: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = random.integers(-40, 40, (32, 32, 3)) + np.array(colour)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        fill(root / name, colour, IMAGES, random)
    return root


@pytest.fixture(scope="module")
def pool(folder: Path) -> episode_draws.Pool:
    return episode_draws.read_pool(folder)


@pytest.fixture(scope="module")
def setting() -> Setting:
    params = METHODS["kd"].resolve("draft", QUICK)
    return Setting(2, 3, "kd", TEACHERS["efficientnet_lite0"], "conv4", params, seed=5)


def test_a_draw_depends_on_seed_and_number_only(pool):
    first = episode_draws.draw(pool, 3, 2, 9, seed=1, number=4)
    assert episode_draws.draw(pool, 3, 2, 9, seed=1, number=4) == first
    assert episode_draws.draw(pool, 3, 2, 9, seed=1, number=5).supports != first.supports
    assert episode_draws.draw(pool, 3, 2, 9, seed=2, number=4).supports != first.supports


def test_supports_and_queries_share_no_image_and_have_the_classes_in_turn(pool):
    for number in range(50):
        drawn = episode_draws.draw(pool, 3, 2, 11, seed=0, number=number)
        assert len(set(drawn.classes)) == 3
        assert len({*drawn.supports, *drawn.queries}) == 3 * 2 + 11
        assert [path.parent.name for path in drawn.supports] == [
            name for name in drawn.classes for _ in range(2)
        ]
        assert [path.parent.name for path in drawn.queries] == [drawn.classes[q % 3] for q in range(11)]


def test_every_class_and_image_is_drawn_alike(pool):
    """Of 1,200 draws: 600 a class, 133 an image as a support."""
    classes: Counter[str] = Counter()
    supports: Counter[Path] = Counter()
    for number in range(1200):
        drawn = episode_draws.draw(pool, 2, 2, 4, seed=0, number=number)
        classes.update(drawn.classes)
        supports.update(drawn.supports)
    assert all(abs(count - 600) < 80 for count in classes.values())
    assert len(supports) == len(COLOURS) * IMAGES
    assert all(abs(count - 1200 * 2 * 2 / 36) < 50 for count in supports.values())


def test_more_queries_keep_the_supports_and_the_queries_so_far(pool):
    few = episode_draws.draw(pool, 2, 3, 5, seed=0, number=0)
    many = episode_draws.draw(pool, 2, 3, 12, seed=0, number=0)
    assert (many.supports, many.queries[:5]) == (few.supports, few.queries)


def test_queries_come_from_test_where_there_is_one(tmp_path):
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        fill(tmp_path / name, (9, 9, 9), 2, random)
        fill(tmp_path / "test" / name, (9, 9, 9), 4, random)
    fill(tmp_path / "unlabelled", (9, 9, 9), 3, random)
    pool = episode_draws.read_pool(tmp_path)
    drawn = episode_draws.draw(pool, 2, 2, 8, seed=0, number=0)
    assert {path.parent.parent.name for path in drawn.queries} == {"test"}
    assert sorted(pool.supports) == ["a", "b"]
    assert (len(pool.unlabelled), pool.most_queries(2, 2)) == (3, 8)


@pytest.mark.parametrize(
    ("ways", "shots", "queries", "words"),
    [
        (5, 2, 20, "has 4 class folders; 5-way episodes need 5"),
        (2, 10, 4, "class 'blue' has 9 images; 10 are to be drawn"),
        (2, 6, 8, "class 'blue' has 3 images beside its 6 supports; 8 queries need 4 of each class"),
        (3, 1, 5, "5 queries are too few for 3 classes"),
        (1, 1, 5, "1-way 1-shot is no task"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_runs(pool, ways, shots, queries, words):
    with pytest.raises(DataError, match=words):
        episode_draws.check(pool, ways, shots, queries)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        episode_draws.read_pool(tmp_path / "nowhere")


class Halt(Exception):
    pass


def halt(answered: Answered) -> None:
    raise Halt


def test_a_stopped_run_goes_on_and_more_queries_train_no_student(pool, setting, tmp_path):
    stages: list[str] = []

    def note(stage, shard, step, total, metrics):
        stages.append(stage)

    with pytest.raises(Halt):
        episodes.evaluate(pool, setting, 2, 4, tmp_path, device="cpu", progress=note, on_episode=halt)
    assert "distill" in stages

    seen: list[Answered] = []
    started = []

    def count(stage, shard, step, total, metrics):
        if stage == "distill" and step == total:
            started.append(len(seen))

    found = episodes.evaluate(
        pool, setting, 2, 4, tmp_path, device="cpu", progress=count, on_episode=seen.append
    )
    assert set(started) == {1}  # only when the first episode had been handed out from the file
    assert [episode.number for episode in seen] == [0, 1]
    assert found.accuracy.components is not None

    stages.clear()
    wider = episodes.evaluate(pool, setting, 2, 10, tmp_path, device="cpu", progress=note)
    assert "distill" not in stages
    assert wider.path == found.path
    for before, after in zip(found.answered, wider.answered, strict=True):
        assert after.queries[:4] == before.queries
        assert after.right[:4] == before.right
        assert after.seconds == before.seconds is not None
    narrow = episodes.evaluate(pool, setting, 2, 4, tmp_path, device="cpu", progress=note)
    assert narrow.accuracy == found.accuracy

    document = json.loads(wider.path.read_text())
    assert document["setting"]["student"] == "conv4"
    assert [len(episode["right"]) for episode in document["episodes"]] == [10, 10]
    assert document["accuracy"]["value"] == pytest.approx(found.accuracy.value)
    _answers_are_the_students(pool, setting, wider.answered[1], tmp_path)


def _answers_are_the_students(pool, setting, answered, work):
    """The student, found again by its supports, asked one image at a time, prepared here by hand."""
    drawn = episode_draws.draw(pool, 2, 3, 10, setting.seed, 1)
    split = next(
        path for path in (work / "splits").iterdir() if _names_in(path / "support") == list(answered.supports)
    )
    made = local.run(
        "kd", {"support": split / "support"}, setting.teacher, "conv4", work,
        params=setting.params, seed=setting.seed + 1, device="cpu", wanted=["trained_student"],
    )  # fmt: skip
    assert not any(made.seconds.values())
    student = students.load(made.folder("trained_student"))
    for path, right in zip(drawn.queries, answered.right, strict=True):
        pixels = (np.asarray(Image.open(path), np.float32) / 255 - student.mean) / student.std
        with torch.no_grad():
            logits = student.network(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
        assert (student.classes[int(logits.argmax())] == path.parent.name) == right


def _names_in(split):
    return [image.name for image in archive.read_index(split / archive.FILE_NAME).images]


def test_another_setting_has_its_own_file(pool, setting):
    other = replace(setting, student="lenet5")
    assert episodes.file_name(pool, other) != episodes.file_name(pool, setting)
    assert episodes.file_name(pool, replace(setting, seed=6)) != episodes.file_name(pool, setting)


def test_a_file_of_results_that_cannot_be_read_is_named_and_kept(pool, setting, tmp_path):
    broken = tmp_path / episodes.file_name(pool, setting)
    broken.write_text('{"episodes": [{"number": 1}]}')
    with pytest.raises(DataError, match="holds no results of episodes"):
        episodes.evaluate(pool, setting, 2, 4, tmp_path, device="cpu")
    assert broken.exists()


def accuracy_with(components: Components, count: int = 4, queries: int = 50) -> EpisodicAccuracy:
    return EpisodicAccuracy(0.6, 0.5, 0.7, 0.1, "", count, queries, components)


def test_the_plan_gives_whole_rounds_of_queries_and_no_more_than_there_are():
    components = Components(0.003, 0.001, 0.04, 0.2, measured=0.007)
    planned = episodes.plan(accuracy_with(components), Costs(40.0, 0.05), 5, 1000, 0.02)
    best = variance_components.best_queries(components, 40.0, 0.05)
    assert planned.queries == pytest.approx(best, abs=5)
    assert planned.queries % 5 == 0
    assert planned.queries_low < planned.queries < planned.queries_high
    assert planned.episodes_low < planned.episodes < planned.episodes_high
    assert planned.episodes_then < planned.episodes
    assert episodes.plan(accuracy_with(components), Costs(40.0, 0.05), 5, 100, 0.02).queries == 100
    assert episodes.plan(accuracy_with(components), Costs(0.1, 9.0), 5, 1000, 0.02).queries == 10


def test_where_episodes_do_not_differ_the_plan_is_to_ask_all_images():
    components = Components(0.0, 0.0, 0.01, 0.2, measured=0.002)
    planned = episodes.plan(accuracy_with(components), Costs(40.0, 0.05), 5, 730, 0.02)
    assert (planned.queries, planned.queries_high) == (730, 730)


def test_without_costs_the_best_number_of_queries_is_not_known():
    components = Components(0.003, 0.001, 0.04, 0.2, measured=0.007)
    planned = episodes.plan(accuracy_with(components), Costs(None, 0.05), 5, 1000, 0.02)
    assert (planned.queries, planned.episodes_then) == (None, None)
    assert planned.episodes == variance_components.episodes_needed(components, 50, 0.02)


def test_nothing_is_planned_from_one_episode():
    alone = EpisodicAccuracy(0.6, None, None, None, "", 1, 50, None)
    assert episodes.plan(alone, Costs(40.0, 0.05), 5, 1000, 0.02) is None
