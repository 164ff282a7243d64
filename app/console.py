"""What the command line shows: tables, progress, errors. People read it; scripts use --json."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from app.client import Dataset, DramApiError, Job, JobEvent, Plan, Prediction
from app.client.answers import Answer

#: Into a pipe nothing is folded: each line stays whole.
_PIPED_WIDTH = 500

out = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
err = Console(stderr=True, soft_wrap=True)

#: Remarks of one kind about a data set that are printed in full.
_SHOWN_OF_A_KIND = 3

#: Where nothing can be redrawn, a line is printed each time the job has come so much further.
_LINE_EVERY_PERCENT = 10.0


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]], title: str | None = None) -> None:
    """Print rows; columns whose cells are all numbers are set flush right."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for position, name in enumerate(columns):
        numeric = bool(cells) and all(row[position][:1].isdigit() or not row[position] for row in cells)
        grid.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=position == 0)
    for row in cells:
        grid.add_row(*(Text(cell) for cell in row))
    out.print(grid)


def note(text: str) -> None:
    """A remark beside the result, on stderr."""
    err.print(Text(text))


def print_json(document: Any) -> None:
    """The service's answer, for a script."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def listing(
    items: Iterable[Answer],
    as_json: bool,
    columns: Sequence[str],
    row: Callable[[dict[str, Any]], Sequence[Any]],
) -> None:
    """Items as the service answered them for a script, or as a table for people: `row` gives one item's cells."""
    answered = [item.model_dump(mode="json") for item in items]
    if as_json:
        print_json(answered)
    else:
        table(columns, map(row, answered))


def millions(number: Any) -> str:
    """A count as millions; empty where there is none."""
    return f"{number / 1e6:.2f} M" if isinstance(number, int | float) and number else ""


def error(failure: Exception) -> None:
    """An error with everything the service said about it."""
    if not isinstance(failure, DramApiError):
        err.print(Text.assemble(("Error: ", "bold red"), f"{str(failure) or type(failure).__name__}"))
        return
    err.print(Text.assemble(("Error: ", "bold red"), failure.detail, (f" [{failure.code}]", "dim")))
    only = failure.errors[0].get("detail") if len(failure.errors) == 1 else None
    for number, finding in enumerate(failure.errors):
        where = finding.get("pointer")
        said = f"{where + ': ' if where else ''}{finding.get('detail', '')}"
        told = failure.detail == only or (number == 0 and failure.detail.startswith(said))
        if not told:
            err.print(Text(f"  {said}"))
    if failure.status == 401:
        err.print(
            Text("  The key of a local service lies in its folder (--home); others: --key or DRAM_API_KEY.")
        )
    if failure.request_id:
        err.print(Text(f"  request {failure.request_id}", style="dim"))


def job_failure(job: Job) -> None:
    """Why a job did not succeed, and what to do."""
    if job.error is None:
        err.print(Text(f"{job.id} was {job.status}.", style="bold yellow"))
        return
    stage = f" in stage '{job.error.stage}'" if job.error.stage else ""
    err.print(Text.assemble((f"{job.id} {job.status}{stage}: ", "bold red"), job.error.detail))
    err.print(Text(f"  code  {job.error.code}"))
    if job.error.hint:
        err.print(Text(f"  hint  {job.error.hint}"))
    if job.error.retryable:
        err.print(Text(f"  It may work another time: dram retry {job.id}"))


def dataset(made: Dataset) -> None:
    """A data set and what was found in it."""
    splits = ", ".join(f"{split.get('images', '?')} {name}" for name, split in made.splits.items())
    classes = f"{len(made.classes)} classes" if made.classes else "no classes"
    classes += " in masks" if made.task == "segmentation" else ""
    out.print(Text(f"{made.id}  {made.name}: {classes} ({splits})"))
    remarks = made.report.get("warnings", [])
    kinds = Counter(remark["code"] for remark in remarks)
    shown: Counter[str] = Counter()
    for remark in remarks:
        shown[remark["code"]] += 1
        if shown[remark["code"]] <= _SHOWN_OF_A_KIND:
            note(f"  {remark['detail']}")
        elif shown[remark["code"]] == kinds[remark["code"]]:
            rest = kinds[remark["code"]] - _SHOWN_OF_A_KIND
            note(f"  and {rest} more like the last ({remark['code']}).")


def prediction(seen: Prediction) -> None:
    table(("label", "score"), [(score.label, f"{score.score:.3f}") for score in seen.predictions])


def class_map(path: Path, classes: Sequence[str]) -> None:
    """Where a class map was written, and which class each of its values stands for."""
    out.print(Text(str(path)))
    table(("value", "class"), enumerate(classes))


def report(found: dict[str, Any]) -> None:
    """Student beside teacher: how alike their features are, accuracy, size, speed, as far as they are known."""
    student, teacher, latency = found["student"], found["teacher"], found["latency"]
    segments = found.get("task") == "segmentation"
    how_good = (
        {"mean IoU": "miou", "pixel accuracy": "pixel_accuracy"} if segments else {"accuracy": "accuracy"}
    )
    alike = {"cosine to the teacher's": "cosine", "CKA with the teacher's": "cka"}
    rows = [
        *((title, _likeness(found[name]), "") for title, name in alike.items() if name in found),
        *(
            (title, *(_known(network[name], _interval) for network in (student, teacher)))
            for title, name in how_good.items()
        ),
        ("parameters", *(_known(network["parameters"], "{:,}".format) for network in (student, teacher))),
        ("file", *(_known(network["bytes"], _size) for network in (student, teacher))),
        ("one image", *(_known(latency[name], _median) for name in ("student", "teacher"))),
    ]
    black_box = teacher.get("black_box")  # reports of earlier versions do not say
    shown = teacher["title"] if black_box else teacher["name"]
    table(("", f"student {student['name']}", f"teacher {shown}"), rows)
    if black_box:
        size = "" if teacher["bytes"] else ", its size is not known"
        out.print(Text(f"Teacher: a black box{size}; {latency['teacher_note']}."))
    ratio, faster = found["compression"]["bytes"], latency["speedup"]
    gains = [] if ratio is None else [_times(ratio, "smaller", "larger")]
    if faster is not None:
        how = f"({latency['runtime']}, {latency['threads']} thread)"
        gains.append(f"{_times(faster['value'], 'faster', 'slower')} {how}")
    agreement = [] if segments else [f"agreement with the teacher {_interval(found['agreement'])}"]
    out.print(Text("; ".join([*([", ".join(gains)] if gains else []), *agreement])))
    if found["int8"]["asked"]:
        out.print(
            Text(f"int8: {'made' if found['int8']['accepted'] else 'refused'}, {found['int8']['reason']}")
        )
    out.print(Text(found["evaluation"]["explanation"], style="dim"))


def plan(order: Mapping[str, Any], planned: Plan) -> None:
    """What a job of this order would do: who learns what from whom, its stages, its questions."""
    out.print(Text(f"{order['method']}: {order['student']} taught by {order['teacher_id']}"))
    rows = [(stage.name, stage.shards, "yes" if stage.reused else "no") for stage in planned.stages]
    table(("stage", "shards", "reused"), rows)
    if planned.queries_planned is not None:
        out.print(Text(f"Questions to the teacher: at most {planned.queries_planned:,}"))


def jobs(listed: Iterable[Job]) -> None:
    rows = [
        (job.id, job.status, f"{job.progress.percent:.0f} %", job.method, job.student, job.student_id)
        for job in listed
    ]
    table(("job", "status", "done", "method", "architecture", "student"), rows)


def follow(events: Iterator[JobEvent]) -> None:
    """Show a job's progress until its events end."""
    if err.is_terminal:
        _bar(events)
    else:
        _lines(events)


def _bar(events: Iterator[JobEvent]) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[step]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=err, speed_estimate_period=120) as progress:
        bar = progress.add_task("waiting for a worker", total=100, step="")
        for event in events:
            match event.type:
                case "stage.progress":
                    step = f"{event.data.get('step', 0)}/{event.data.get('total', 0)}"
                    progress.update(bar, description=_stage(event), step=step, completed=_percent(event))
                case "stage.started":
                    progress.update(bar, description=_stage(event), step="")
                case "stage.succeeded" | "stage.reused":
                    word = "done" if event.type == "stage.succeeded" else "reused from an earlier job"
                    progress.console.print(Text(f"  {_stage(event)}: {word}", style="dim"))
                case "job.succeeded":
                    progress.update(bar, description="finished", step="", completed=100)
                case "job.created" | "job.started":
                    pass
                case _:
                    progress.console.print(Text(f"  {event.type}", style="dim"))


def _lines(events: Iterator[JobEvent]) -> None:
    shown = 0.0
    for event in events:
        if event.type != "stage.progress":
            note(" ".join(part for part in (event.type, _stage(event)) if part))
        elif _percent(event) >= shown + _LINE_EVERY_PERCENT:
            shown = _percent(event)
            note(f"{shown:.0f} % ({_stage(event)} {event.data.get('percent', 0):.0f} %)")


def _times(ratio: float, good: str, bad: str) -> str:
    factor, word = (ratio, good) if ratio >= 1 else (1 / ratio, bad)
    return f"{factor:.0f} times {word}" if factor >= 10 else f"{factor:.1f} times {word}"


def _interval(share: dict[str, Any]) -> str:
    """A share with its 95 % interval, where there is one."""
    if share["low"] is None:
        return f"{share['value']:.1%}"
    return f"{share['value']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"


def _likeness(figure: dict[str, Any]) -> str:
    """Of features, at most 1, with its 95 % interval."""
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _known(value: Any, words: Callable[[Any], str]) -> str:
    return "not known" if value is None else words(value)


def _median(timed: dict[str, Any]) -> str:
    """Of the times of one image."""
    return f"{timed['median_ms']:.2f} ms"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def _stage(event: JobEvent) -> str:
    return str(event.data.get("stage") or "")


def _percent(event: JobEvent) -> float:
    return float(event.data.get("job_percent") or 0.0)
