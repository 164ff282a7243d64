"""N-way K-shot episodes over a folder of images: draw, train, count right answers, plan what to do next.

An episode is a small classification task: N classes of the folder, K labelled images (supports) of each, and Q
other images of these classes (queries) that the student trained on the supports has to name. The draw depends on the
seed and the episode's number only, so two methods, or two students, are measured on the same episodes; more queries
keep the earlier ones and the supports, so students that were trained for fewer queries only answer the new ones.
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
import torch

from models import generators, local, students
from models.data import fewshot, images
from models.errors import DataError
from models.evaluation import variance_components
from models.evaluation.variance_components import EpisodicAccuracy
from models.generators import GeneratorSpec
from models.pipeline import Params, digest
from models.runtime import generator, resolve_device
from models.teachers import AnyTeacher
from models.training.cross_validation import predict

SCHEMA_VERSION = 1
#: Fewest queries of each class: from a single one the flips within a class cannot be told from the class.
FEWEST_QUERIES = 2


@dataclass(frozen=True)
class Pool:
    """What episodes are drawn from: image files by class.

    Queries come from `test/`, where the folder has one, else from the class folders, less the supports.
    `unlabelled` images are given to every episode.
    """

    root: Path
    supports: Mapping[str, tuple[Path, ...]]
    queries: Mapping[str, tuple[Path, ...]] | None
    unlabelled: tuple[Path, ...]

    def queries_left(self, name: str, shots: int) -> int:
        """How many images of a class can be asked about after `shots` have been drawn from it."""
        if self.queries is not None:
            return len(self.queries[name])
        return len(self.supports[name]) - shots

    def most_queries(self, ways: int, shots: int) -> int:
        """The largest Q that any `ways` of the classes can give."""
        return ways * min(self.queries_left(name, shots) for name in self.supports)


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
class Episode:
    """One draw. Query q is of class `classes[q % N]`, so any first part of the queries is balanced."""

    number: int
    classes: tuple[str, ...]  # in the order of their draw
    supports: tuple[Path, ...]  # K of the first class, then K of the second, ...
    queries: tuple[Path, ...]

    @property
    def seed(self) -> int:
        """Of the episode's training: it differs, too, so that the interval covers the luck of training."""
        return self.number


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


def read_pool(root: Path) -> Pool:
    """The images below `root`: class folders, with optional `test/` (class folders) and `unlabelled/`."""
    if not root.is_dir():
        raise DataError(f"there is no folder '{root}'", "Name a folder with one folder of images a class.")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = [name for name in names if name not in ("test", "unlabelled")]
    return Pool(
        root,
        {name: _files(root / name) for name in classes},
        {name: _files(root / "test" / name) for name in classes} if "test" in names else None,
        _files(root / "unlabelled"),
    )


def check(pool: Pool, ways: int, shots: int, queries: int) -> None:
    """Raise `DataError` unless every episode of that shape can be drawn."""
    if ways < 2 or shots < 1:
        raise DataError(
            f"{ways}-way {shots}-shot is no task: it takes 2 classes and 1 labelled image of each"
        )
    if queries < FEWEST_QUERIES * ways:
        raise DataError(
            f"{queries} queries are too few for {ways} classes",
            f"Ask {FEWEST_QUERIES} of each class at least: {FEWEST_QUERIES * ways} queries.",
        )
    if len(pool.supports) < ways:
        raise DataError(
            f"'{pool.root}' has {len(pool.supports)} class folders; {ways}-way episodes need {ways}",
            "Ask for fewer ways, or add classes.",
        )
    each = -(-queries // ways)
    for name, files in pool.supports.items():
        if len(files) < shots:
            raise DataError(f"class '{name}' has {len(files)} images; {shots} are to be drawn", _MEND)
        if pool.queries_left(name, shots) < each:
            raise DataError(
                f"class '{name}' has {pool.queries_left(name, shots)} images"
                f"{' in test/' if pool.queries is not None else f' beside its {shots} supports'};"
                f" {queries} queries need {each} of each class",
                _MEND,
            )


_MEND = "Ask for fewer shots or queries, add images to the class, or remove it."


def draw(pool: Pool, ways: int, shots: int, queries: int, seed: int, number: int) -> Episode:
    """Episode `number` of a seed; no image is both support and query, and none is asked about twice."""
    names = tuple(pool.supports)
    order = torch.randperm(len(names), generator=generator(seed, "episode", number))
    classes = tuple(names[at] for at in order[:ways].tolist())
    supports: list[Path] = []
    asked: list[list[Path]] = []
    for name in classes:
        files = _shuffled(pool.supports[name], seed, number, "supports", name)
        supports += files[:shots]
        asked.append(
            files[shots:]
            if pool.queries is None
            else _shuffled(pool.queries[name], seed, number, "queries", name)
        )
    in_turn = tuple(asked[place % ways][place // ways] for place in range(queries))
    return Episode(number, classes, tuple(supports), in_turn)


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
        seed=setting.seed + episode.seed,
        device=device,
        wanted=["trained_student"],
        progress=progress,
        generator=setting.generator or generators.DEFAULT,
    )
    student = students.load(made.folder("trained_student"), str(resolve_device(device)))
    started = time.monotonic()
    contents = ((path.name, path.read_bytes()) for path in episode.queries)
    answers = predict(student.network, images.squares(contents, student.input_size)).argmax(1).tolist()
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


def _shuffled(files: Sequence[Path], seed: int, number: int, *path: str) -> list[Path]:
    order = torch.randperm(len(files), generator=generator(seed, "episode", number, *path))
    return [files[at] for at in order.tolist()]


def _names(pool: Pool, files: Sequence[Path]) -> tuple[str, ...]:
    return tuple(path.relative_to(pool.root).as_posix() for path in files)


def _files(folder: Path) -> tuple[Path, ...]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in fewshot.IMAGE_SUFFIXES)
    return tuple(sorted(found)) if folder.is_dir() else ()
