"""Few-shot accuracy over episodes: make a student for each, count its right answers, plan what to do next.

Each query asks the student that was trained on the episode's supports for an image's class. What has been run stays in
a folder: students that were made for fewer queries only answer the new ones.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from models import generators, local, students
from models.data import fewshot, images
from models.errors import DataError
from models.evaluation import variance_components
from models.evaluation.episode_draws import FEWEST_QUERIES, Episode, Pool, check, draw
from models.evaluation.variance_components import EpisodicAccuracy
from models.generators import GeneratorSpec
from models.pipeline import Params, digest
from models.runtime import resolve_device
from models.teachers import AnyTeacher
from models.training.cross_validation import predict

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Setting:
    """What is measured: everything but how many episodes and queries it is measured with.

    `generator`: of methods that read one, None for others.
    """

    ways: int
    shots: int
    method: str
    teacher: AnyTeacher
    student: str
    params: Params
    seed: int = 0
    generator: GeneratorSpec | None = None


@dataclass(frozen=True)
class Answered:
    """An episode that has been run. `right`: one entry a query; paths are relative to the folder of images.

    `seconds` is what the student took to make, None where a part was there from an earlier run.
    """

    number: int
    classes: tuple[str, ...]
    supports: tuple[str, ...]
    queries: tuple[str, ...]
    right: tuple[bool, ...]
    seconds: float | None
    query_seconds: float  # of each query

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.right)

    def first(self, queries: int) -> Answered:
        """The same with the first `queries` queries only."""
        return replace(self, queries=self.queries[:queries], right=self.right[:queries])


@dataclass(frozen=True)
class Costs:
    """Of making one episode's student and of one query, in any one unit; None: not known."""

    episode: float | None
    query: float | None


@dataclass(frozen=True)
class Plan:
    """What would bring the interval to plus or minus `half_width`, from the components as estimated.

    `episodes`: as many as needed in all with the present queries, and what the ends of the interval of s_b^2 say.
    `queries`: Q*, the best number an episode for the costs, in whole rounds over the classes and no more than there
    are images; with its ends alike. `episodes_then`: as many episodes as that many queries need. None: not known.
    """

    half_width: float
    episodes: int
    episodes_low: int
    episodes_high: int
    queries: int | None
    queries_low: int | None
    queries_high: int | None
    episodes_then: int | None


@dataclass(frozen=True)
class Evaluation:
    """The result, and the file that keeps it."""

    path: Path
    answered: tuple[Answered, ...]
    accuracy: EpisodicAccuracy
    costs: Costs
    plan: Plan | None  # None: nothing can be planned from episodes that do not differ, or from one


def evaluate(
    pool: Pool,
    setting: Setting,
    episodes: int,
    queries: int,
    work: Path,
    *,
    wanted: float = 0.02,
    costs: Costs = Costs(None, None),
    device: str = "auto",
    progress: local.Progress | None = None,
    on_episode: Callable[[Answered], None] = lambda answered: None,
) -> Evaluation:
    """Run what is still missing of `episodes` episodes of `queries` queries each, then estimate and plan.

    After every episode the file under `work` is whole, so a stopped run goes on; students are kept there, too.
    `wanted` is the half-width to plan for; `costs` that are not given are measured in seconds. Calls `on_episode`
    for each episode, those of earlier runs as well. Raises `ModelsError`.
    """
    if episodes < 1:
        raise DataError(f"{episodes} episodes measure nothing")
    check(pool, setting.ways, setting.shots, queries)
    path = work / file_name(pool, setting)
    known = read(path)
    unlabelled = _packed_unlabelled(pool, work)
    for number in range(episodes):
        before = known.get(number)
        if before is None or len(before.right) < queries:
            episode = draw(pool, setting.ways, setting.shots, queries, setting.seed, number)
            answered = run(episode, pool, setting, work, unlabelled, device=device, progress=progress)
            if before is not None and answered.seconds is None:
                answered = replace(answered, seconds=before.seconds)
            known[number] = answered
            _write(path, setting, known, {})
        on_episode(known[number].first(queries))
    used = tuple(known[number].first(queries) for number in range(episodes))
    most = pool.most_queries(setting.ways, setting.shots)
    found = evaluation(path, used, most, wanted, costs)
    result = {
        "accuracy": asdict(found.accuracy),
        "costs": asdict(found.costs),
        "plan": asdict(found.plan) if found.plan else None,
    }
    _write(path, setting, known, result)
    return found


def run(
    episode: Episode,
    pool: Pool,
    setting: Setting,
    work: Path,
    unlabelled: Path | None = None,
    *,
    device: str = "auto",
    progress: local.Progress | None = None,
) -> Answered:
    """Train the episode's student below `work`, where what is there is used again, and ask it every query."""
    supports, queries = _names(pool, episode.supports), _names(pool, episode.queries)
    folder = work / "splits" / digest([supports, queries])
    count = len(episode.classes)
    support_labels = [place // setting.shots for place in range(len(episode.supports))]
    query_labels = [place % count for place in range(len(episode.queries))]
    splits = {
        "support": fewshot.pack(folder / "support", episode.classes, episode.supports, support_labels),
        "test": fewshot.pack(folder / "test", episode.classes, episode.queries, query_labels),
    }
    if unlabelled is not None:
        splits["unlabelled"] = unlabelled
    made = local.run(
        setting.method,
        splits,
        setting.teacher,
        setting.student,
        work,
        params=setting.params,
        seed=setting.seed + episode.number,  # the interval is to cover the luck of training, too
        device=device,
        wanted=["trained_student"],
        progress=progress,
        generator=setting.generator or generators.DEFAULT,
    )
    student = students.load(made.folder("trained_student"), str(resolve_device(device)))
    started = time.monotonic()
    contents = ((path.name, path.read_bytes()) for path in episode.queries)
    pixels = images.squares(contents, student.input_size)
    answers = predict(student.network, pixels, student.mean, student.std).argmax(1).tolist()
    query_seconds = (time.monotonic() - started) / len(episode.queries)
    right = [
        student.classes[answer] == episode.classes[label]
        for answer, label in zip(answers, query_labels, strict=True)
    ]
    return Answered(
        number=episode.number,
        classes=episode.classes,
        supports=supports,
        queries=queries,
        right=tuple(right),
        seconds=sum(made.seconds.values()) if all(made.seconds.values()) else None,
        query_seconds=query_seconds,
    )


def evaluation(
    path: Path, answered: Sequence[Answered], most_queries: int, wanted: float, costs: Costs
) -> Evaluation:
    """Accuracy, costs and plan from episodes with equally many queries."""
    ways = len(answered[0].classes)
    right = np.array([episode.right for episode in answered])
    classes = np.tile(np.arange(right.shape[1]) % ways, (len(right), 1))
    accuracy = variance_components.estimate(right, classes)
    timed = [episode.seconds for episode in answered if episode.seconds is not None]
    costs = Costs(
        statistics.fmean(timed) if costs.episode is None and timed else costs.episode,
        statistics.fmean(episode.query_seconds for episode in answered)
        if costs.query is None
        else costs.query,
    )
    return Evaluation(
        path, tuple(answered), accuracy, costs, plan(accuracy, costs, ways, most_queries, wanted)
    )


def plan(
    accuracy: EpisodicAccuracy, costs: Costs, ways: int, most_queries: int, wanted: float
) -> Plan | None:
    """What would bring the interval to plus or minus `wanted`; None where there are no components to plan from."""
    components = accuracy.components
    if components is None or components.variance(accuracy.queries) == 0:
        return None
    low = replace(components, between=components.between_low)
    high = replace(components, between=components.between_high)
    queries = fewest = most = then = None
    if costs.episode and costs.query:
        # Episodes that differ more leave less to gain from further queries: the ends change places.
        queries, fewest, most = (
            _rounded(variance_components.best_queries(of, costs.episode, costs.query), ways, most_queries)
            for of in (components, high, low)
        )
        then = variance_components.episodes_needed(components, queries, wanted)
    now, if_low, if_high = (
        variance_components.episodes_needed(of, accuracy.queries, wanted) for of in (components, low, high)
    )
    return Plan(wanted, now, if_low, if_high, queries, fewest, most, then)


def read(path: Path) -> dict[int, Answered]:
    """The episodes that a file of results holds, by number; none where there is no file."""
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["episodes"]
        listed = ("classes", "supports", "queries", "right")
        episodes = [Answered(**{**row, **{name: tuple(row[name]) for name in listed}}) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{path}' holds no results of episodes", "Remove it, or name another --work."
        ) from error
    return {episode.number: episode for episode in episodes}


def _write(path: Path, setting: Setting, known: Mapping[int, Answered], result: Mapping[str, Any]) -> None:
    """The whole file or nothing."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "setting": _described(setting),
        **result,
        "episodes": [asdict(known[number]) for number in sorted(known)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def file_name(pool: Pool, setting: Setting) -> str:
    """One file for each setting and folder of images, told apart by the images' names and sizes."""
    listed = [*pool.supports.values(), *(pool.queries or {}).values(), pool.unlabelled]
    files = [(str(path.relative_to(pool.root)), path.stat().st_size) for part in listed for path in part]
    key = digest([_described(setting), files])[:12]
    return f"{setting.method}-{setting.student}-{setting.ways}way-{setting.shots}shot-{key}.json"


def _described(setting: Setting) -> dict[str, Any]:
    return {
        "ways": setting.ways,
        "shots": setting.shots,
        "method": setting.method,
        "teacher": setting.teacher.model_dump(mode="json"),
        "student": setting.student,
        "generator": setting.generator.model_dump(mode="json") if setting.generator else None,
        "params": setting.params.model_dump(mode="json"),
        "seed": setting.seed,
    }


def _packed_unlabelled(pool: Pool, work: Path) -> Path | None:
    if not pool.unlabelled:
        return None
    return fewshot.pack(work / "splits" / "unlabelled", (), pool.unlabelled, [None] * len(pool.unlabelled))


def _rounded(queries: float, ways: int, most: int) -> int:
    """Whole rounds over the classes, at least as many as an estimate needs, at most as there are images."""
    if math.isinf(queries):
        return most
    return min(max(FEWEST_QUERIES * ways, math.ceil(queries / ways) * ways), most)


def _names(pool: Pool, files: Sequence[Path]) -> tuple[str, ...]:
    return tuple(path.relative_to(pool.root).as_posix() for path in files)
