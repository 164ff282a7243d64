"""`dram evaluate`: how well a method does on few-shot tasks drawn from a folder. Computes on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from app import console
from app.connect import HERE, HomeFolder
from app.errors import Unavailable
from app.order_options import DEFAULT_STUDENT, Param, Preset, Seed, Student, nested_params
from models import generators, students
from models import teachers as known_teachers
from models.errors import ModelsError, TeacherError
from models.methods import METHODS
from models.pipeline import JobShape, Method, Params

if TYPE_CHECKING:
    from models.evaluation.episode_draws import Pool
    from models.evaluation.episodes import Answered, Evaluation, Plan, Setting

_POINTS = 100.0  # accuracy is told in percentage points
#: Numbers of queries that differ by less than this factor are about as good.
_ABOUT = 1.5


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="One folder of images for each class.")],
    ways: Annotated[int, typer.Option(min=2, help="Classes of each episode.")] = 5,
    shots: Annotated[int, typer.Option(min=1, help="Labelled images of each class.")] = 5,
    episodes: Annotated[int, typer.Option(min=1, help="Tasks to draw, each with a student of its own.")] = 4,
    queries: Annotated[int, typer.Option(min=4, help="Images that each student is asked about.")] = 50,
    method: Annotated[str, typer.Option(help="How; `dram methods` lists them.")] = "kd",
    student: Student = None,
    teacher: Annotated[
        str | None, typer.Option(help="Who teaches, of the catalogue. Left out: the first to be had here.")
    ] = None,
    generator: Annotated[
        str | None, typer.Option(help="Who makes images, for methods that need one.")
    ] = None,
    preset: Preset = "balanced",
    param: Param = None,
    seed: Seed = 0,
    within: Annotated[
        float,
        typer.Option(min=0.01, max=50, metavar="POINTS", help="Half-width of the interval to plan for."),
    ] = 2.0,
    episode_cost: Annotated[
        float | None,
        typer.Option(min=1e-9, help="Of one episode, in any unit. Left out: measured, in seconds."),
    ] = None,
    query_cost: Annotated[
        float | None, typer.Option(min=1e-9, help="Of one query, in the same unit. Left out: measured.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    work: Annotated[
        Path | None,
        typer.Option(help="Keeps results and students, so that a stopped run goes on. Empty: below --home."),
    ] = None,
    home: HomeFolder = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the file of results.")] = False,
) -> None:
    """Measure a method on few-shot tasks drawn from a folder, and say how sure the figure is.

    Runs on this machine, without a service. Queries come from the folder's `test/`, if it has one.
    """
    if (episode_cost is None) != (query_cost is None):
        raise typer.BadParameter("--episode-cost and --query-cost are in one unit: give both, or neither")
    from models.evaluation import episode_draws  # noqa: PLC0415 - it loads torch
    from models.evaluation import episodes as few_shot  # noqa: PLC0415

    try:
        pool = episode_draws.read_pool(folder)
        episode_draws.check(pool, ways, shots, queries)
        chosen = _method(method)
        params = _params(chosen, preset, param)
        setting = few_shot.Setting(
            ways=ways,
            shots=shots,
            method=chosen.name,
            teacher=_teacher(teacher, chosen),
            student=students.checked(student or chosen.student or DEFAULT_STUDENT, chosen.student),
            params=params,
            seed=seed,
            generator=_generator(generator, chosen, params),
        )
        _check_sources(chosen, setting, pool, queries)
        console.note(
            f"{ways}-way {shots}-shot: {method}, {setting.student} taught by {setting.teacher.name}, preset {preset};"
            f" {episodes} x {queries} queries"
        )
        with _Display(episodes) as display:
            found = few_shot.evaluate(
                pool,
                setting,
                episodes,
                queries,
                work or home / "evaluate",
                wanted=within / _POINTS,
                costs=few_shot.Costs(episode_cost, query_cost),
                device=device,
                progress=display.progress,
                on_episode=display.episode,
            )
    except (ModelsError, Unavailable) as failure:
        console.error(failure)
        if isinstance(failure, ModelsError) and failure.hint:
            console.note(f"  {failure.hint}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.note("\nStopped. The same command goes on from here.")
        raise typer.Exit(130) from None
    if as_json:
        console.print_json(json.loads(found.path.read_text(encoding="utf-8")))
        return
    _show(found, seconds=episode_cost is None)


def _method(name: str) -> Method:
    if name not in METHODS:
        raise typer.BadParameter(f"there is no method '{name}'; there are: {', '.join(sorted(METHODS))}")
    if METHODS[name].task != "classification":
        raise typer.BadParameter(f"method '{name}' makes no student that tells classes of images")
    return METHODS[name]


def _teacher(name: str | None, method: Method) -> known_teachers.TeacherSpec:
    """The teacher of that name, else the first that can be had on this machine."""
    from app.settings import Settings  # noqa: PLC0415
    from app.teachers.service import catalogue  # noqa: PLC0415 - it loads the database's library

    known = catalogue(Settings())  # with the operator's own
    if name is None:
        able = (spec for spec in known.values() if method.needs <= spec.offers)
        here = (spec for spec in able if known_teachers.availability(spec).available)
        spec = next(here, None)
        if spec is None:
            raise TeacherError(
                "no teacher of the catalogue can be had on this machine", "Name one with --teacher."
            )
    elif name in known:
        spec = known[name]
    else:
        raise typer.BadParameter(
            f"there is no teacher '{name}' in the catalogue; there are: {', '.join(sorted(known))}"
        )
    lacking = method.needs - spec.offers
    if lacking:
        raise TeacherError(
            f"method '{method.name}' needs {', '.join(sorted(lacking))} of teacher '{spec.name}'"
        )
    state = known_teachers.availability(spec)
    if not state.available:
        raise TeacherError(f"teacher '{spec.name}' cannot be had: {state.reason}", "Choose another teacher.")
    return spec


def _generator(name: str | None, method: Method, params: Params) -> generators.GeneratorSpec | None:
    """The generator of that name, else the usual one; None where such a job of the method needs none."""
    if not method.draws(params):
        if name is not None:
            raise typer.BadParameter(f"method '{method.name}' makes no use of a generator")
        return None
    from app.catalogue.generators import catalogue  # noqa: PLC0415 - it loads the database's library
    from app.settings import Settings  # noqa: PLC0415

    known = catalogue(Settings())  # with the operator's own
    if (name or generators.DEFAULT) not in known:
        raise typer.BadParameter(f"there is no generator '{name}'; there are: {', '.join(sorted(known))}")
    spec = known[name or generators.DEFAULT]
    state = generators.availability(spec)
    if not state.available:
        raise ModelsError(
            f"generator '{spec.name}' cannot be had: {state.reason}", "Choose another with --generator."
        )
    return spec


def _params(method: Method, preset: str, given: list[str] | None) -> Params:
    try:
        return method.resolve(preset, nested_params(given))
    except ValidationError as wrong:
        found = (f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in wrong.errors())
        raise typer.BadParameter("; ".join(found)) from None
    except ValueError as wrong:
        raise typer.BadParameter(str(wrong)) from None


def _check_sources(method: Method, setting: Setting, pool: Pool, queries: int) -> None:
    shape = JobShape(
        classes=setting.ways,
        support=setting.ways * setting.shots,
        smallest_class=setting.shots,
        unlabelled=len(pool.unlabelled),
        test=queries,
    )
    given = {"support", "test", "teacher", "student", "generator"}
    missing = method.missing_sources(
        shape, given | ({"unlabelled"} if pool.unlabelled else set()), setting.params
    )
    if missing:
        raise ModelsError(
            f"method '{method.name}' needs {', '.join(sorted(missing))} images",
            f"Put them into {pool.root}/unlabelled/.",
        )


class _Display:
    """Progress on stderr: a bar where it can be redrawn, else a line for each episode."""

    def __init__(self, episodes: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console.err, disable=not console.err.is_terminal)
        self._bar = self._progress.add_task("episodes", total=episodes)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def progress(self, stage: str, shard: int, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._progress.update(self._bar, description=f"{stage} {step}/{total}")

    def episode(self, answered: Answered) -> None:
        took = "" if answered.seconds is None else f", {_duration(answered.seconds)}"
        right, asked = sum(answered.right), len(answered.right)
        self._progress.console.print(
            Text(
                f"  episode {answered.number + 1}: {right / asked:.1%} ({right} of {asked}){took}",
                style="dim",
            )
        )
        self._progress.update(self._bar, advance=1)


def _show(found: Evaluation, *, seconds: bool) -> None:
    """Accuracy, where the doubt comes from, what to do next. `seconds`: the costs were measured."""
    accuracy = found.accuracy
    counted = (
        f"{accuracy.episodes} episode{'s' if accuracy.episodes > 1 else ''} of {accuracy.queries} queries"
    )
    if accuracy.components is None:
        console.out.print(Text(f"accuracy {accuracy.value:.1%}, {counted}"))
        console.note(
            "One episode has no interval: it cannot tell how much episodes differ. Ask for more: --episodes 4."
        )
        return
    assert accuracy.low is not None
    assert accuracy.high is not None
    console.out.print(
        Text(f"accuracy {accuracy.value:.1%} [{accuracy.low:.1%}, {accuracy.high:.1%}], {counted}"),
        highlight=False,
    )
    console.out.print(Text(f"95 % interval: {accuracy.interval}", style="dim"))
    parts, flips = accuracy.components, accuracy.components.within / accuracy.queries
    total = parts.between + flips
    if total > 0:
        low, high = (_points(variance) for variance in (parts.between_low, parts.between_high))
        rows = [
            ("episodes: their classes, supports and training",
             f"{_points(parts.between)} [{low}, {high}]", f"{parts.between / total:.0%}"),
            (f"queries: only {accuracy.queries} of each episode", _points(flips), f"{flips / total:.0%}"),
        ]  # fmt: skip
        console.table(("where the doubt comes from", "points", "share"), rows)
    for line in _advice(found, seconds=seconds):
        console.out.print(Text(line))
    console.note(f"Results: {found.path}")


def _advice(found: Evaluation, *, seconds: bool) -> list[str]:
    """What to do next, in sentences."""
    accuracy, plan = found.accuracy, found.plan
    if plan is None:
        return ["Nothing can be planned from episodes that do not differ: ask more queries (--queries)."]
    goal = f"±{plan.half_width * _POINTS:.3g} points"
    lines = [_more_episodes(found, plan, goal, seconds)]
    if plan.queries is None or plan.episodes_then is None:
        lines.append(
            "How many queries an episode are best is not known, as all students were there from an earlier run:"
            " give --episode-cost and --query-cost."
        )
    elif plan.queries_low is not None and 1 / _ABOUT <= plan.queries / accuracy.queries <= _ABOUT:
        lines.append(f"{accuracy.queries} queries an episode are about the best use of {_of_what(seconds)}.")
    else:
        lines.append(
            f"The best use of {_of_what(seconds)} is {plan.queries:,} queries an episode"
            f" ({plan.queries_low:,} to {plan.queries_high:,}): with --queries {plan.queries},"
            f" {plan.episodes_then:,} episodes in all would bring it to {goal}. Students made so far are kept."
        )
    return lines


def _more_episodes(found: Evaluation, plan: Plan, goal: str, seconds: bool) -> str:
    accuracy, costs = found.accuracy, found.costs
    more, fewest, most = (
        max(0, needed - accuracy.episodes)
        for needed in (plan.episodes, plan.episodes_low, plan.episodes_high)
    )
    if more == 0:
        return f"The interval is within {goal} already."
    noun = "episode" if more == 1 else "episodes"
    took = ""
    if seconds and costs.episode is not None and costs.query is not None:
        took = f", about {_duration(more * (costs.episode + accuracy.queries * costs.query))}"
    unsure = (
        f" ({fewest:,} to {most:,} more: {accuracy.episodes} episodes say little of how much they differ.)"
        if most > _ABOUT * more or more > _ABOUT * fewest
        else ""
    )
    return f"{more:,} more {noun} would bring it to {goal}: --episodes {plan.episodes}{took}.{unsure}"


def _of_what(seconds: bool) -> str:
    return "time" if seconds else "the costs given"


def _points(variance: float) -> str:
    """The standard deviation in percentage points."""
    return f"{variance**0.5 * _POINTS:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
