"""The `dram` command: a service on this machine, and a client of any."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from app import console
from app.client import ClientError, Dram, DramApiError, Job, JobEvent
from app.connect import HERE, AsJson, HomeFolder, Key, Url, any_service, service
from app.embedded import EmbeddedError
from app.evaluate_command import evaluate
from app.home import Home
from app.order_defaults import complete
from app.order_options import Param, Preset, Seed, Student, nested_params
from app.sample_command import samples
from app.teacher_commands import teachers

cli = typer.Typer(
    help="Few-shot distillation: a handful of labelled images in, a tiny ONNX classifier out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

cli.add_typer(teachers, name="teachers")
cli.command()(evaluate)
cli.command()(samples)

Teacher = Annotated[
    str | None,
    typer.Option(
        help="Who teaches; `dram teachers` lists them. Left out: the first that the method can learn from."
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="How; `dram methods` lists them. Left out: kd, fsbbt with a black box of your own, or the one for masks."
    ),
]
Generator = Annotated[
    str | None,
    typer.Option(
        help="What makes images, for tint and fsbbt (maker diffusion); see `dram generators`. Left out: embedded."
    ),
]
Precision = Annotated[str, typer.Option(help="fp32, or int8 for a quantised file beside it.")]
QueryBudget = Annotated[
    int | None, typer.Option(min=0, help="Most questions that a black-box teacher may be asked.")
]
JobId = Annotated[str, typer.Argument(metavar="JOB")]

#: After this, who watches a job that no worker has taken is told why.
_PATIENCE_S = 10.0


def main() -> None:
    """Run the command line; end with 1 and a sentence where something goes wrong."""
    try:
        cli()
    except (ClientError, EmbeddedError, OSError) as failure:
        console.error(failure)
        sys.exit(1)


@cli.command()
def up(
    home: HomeFolder = HERE,
    host: Annotated[str, typer.Option(envvar="DRAM_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="DRAM_PORT", min=0, max=65535, help="0: any free port.")] = 8700,
) -> None:
    """Start the whole service on this machine, until Ctrl-C."""
    os.environ.update(DRAM_HOME=str(home), DRAM_HOST=host, DRAM_PORT=str(port))
    os.execv(sys.executable, [sys.executable, "-m", "app.up"])


@cli.command()
def migrate(home: HomeFolder = HERE) -> None:
    """Bring the database (DRAM_DATABASE_URL, else the one in --home) to this version's schema."""
    os.environ["DRAM_HOME"] = str(home)
    os.execv(sys.executable, [sys.executable, "-m", "app.migrate"])


@cli.command()
def first_key(home: HomeFolder = HERE) -> None:
    """Make the first API key of a new database and print it; `dram up` does this by itself."""
    os.environ["DRAM_HOME"] = str(home)
    os.execv(sys.executable, [sys.executable, "-m", "app.first_key"])


@cli.command()
def methods(url: Url = None, key: Key = None, home: HomeFolder = HERE, as_json: AsJson = False) -> None:
    """List the ways to distil."""
    with service(url, key, Home(home)) as dram:
        listed = [item.model_dump() for item in dram.methods().data]
    if as_json:
        console.print_json(listed)
        return
    rows = [
        (
            row["id"],
            row.get("title"),
            ", ".join(row.get("needs", [])),
            ", ".join(row.get("presets", {})),
            row.get("source"),
        )
        for row in listed
    ]
    console.table(("method", "title", "needs", "presets", "source"), rows)


@cli.command()
def architectures(url: Url = None, key: Key = None, home: HomeFolder = HERE, as_json: AsJson = False) -> None:
    """List the students that can be trained."""
    with service(url, key, Home(home)) as dram:
        listed = [item.model_dump() for item in dram.architectures().data]
    if as_json:
        console.print_json(listed)
        return
    rows = [
        (
            row["id"],
            console.millions(row.get("parameters")),
            console.millions(row.get("macs")),
            row.get("input_size"),
            row.get("title"),
        )
        for row in listed
    ]
    console.table(("student", "parameters", "multiply-adds", "pixels", "title"), rows)


@cli.command()
def generators(url: Url = None, key: Key = None, home: HomeFolder = HERE, as_json: AsJson = False) -> None:
    """List what can make images, for the methods that need it."""
    with service(url, key, Home(home)) as dram:
        listed = [item.model_dump() for item in dram.generators().data]
    if as_json:
        console.print_json(listed)
        return
    rows = [
        (
            row["id"],
            row.get("resolution"),
            "yes" if row["available"] else "no",
            row.get("licence"),
            row["reason"],
        )
        for row in listed
    ]
    console.table(("generator", "pixels", "available", "licence", "reason"), rows)


@cli.command()
def upload(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|ZIP", help="One folder of images for each class, or images/ with masks/."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="What to call it. Empty: the folder's name.")] = None,
    url: Url = None,
    key: Key = None,
    home: HomeFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Upload images. Beside the classes: `test/` with class folders, `unlabelled/` without."""
    with service(url, key, Home(home)) as dram:
        made = dram.datasets.create(source, name)
    if as_json:
        console.print_json(made.model_dump(mode="json"))
    else:
        console.dataset(made)


@cli.command()
def submit(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Id that `dram upload` printed.")],
    teacher: Teacher = None,
    student: Student = None,
    method: Method = None,
    generator: Generator = None,
    preset: Preset = "balanced",
    param: Param = None,
    seed: Seed = 0,
    precision: Precision = "fp32",
    query_budget: QueryBudget = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay until it has finished.")] = False,
    url: Url = None,
    key: Key = None,
    home: HomeFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Order a student from a data set."""
    params = nested_params(param)
    with service(url, key, Home(home)) as dram:
        names = complete(dram, lambda: dram.datasets.get(dataset).task, teacher, method, student)
        job = dram.jobs.create(
            dataset_id=dataset, teacher_id=names.teacher, method=names.method, student=names.student,
            generator_id=generator, preset=preset, params=params, seed=seed, precision=precision,
            query_budget=query_budget,
        )  # fmt: skip
        if as_json:
            console.print_json(job.model_dump(mode="json"))
        else:
            console.out.print(job.id)
        if watch:
            _watch(dram, job.id)


@cli.command()
def watch(job: JobId, url: Url = None, key: Key = None, home: HomeFolder = HERE) -> None:
    """Show a job's progress until it has finished; fail if it did."""
    with service(url, key, Home(home)) as dram:
        _watch(dram, job)


@cli.command()
def jobs(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Id of the last job seen.")] = None,
    url: Url = None,
    key: Key = None,
    home: HomeFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""
    with service(url, key, Home(home)) as dram:
        page = dram.jobs.list(limit=limit, after=after)
    if as_json:
        console.print_json(page.model_dump(mode="json"))
        return
    console.jobs(page.data)
    if page.has_more:
        console.note(f"More: dram jobs --after {page.data[-1].id}")


@cli.command()
def cancel(job: JobId, url: Url = None, key: Key = None, home: HomeFolder = HERE) -> None:
    """Stop a job."""
    with service(url, key, Home(home)) as dram:
        console.note(f"{job} is {dram.jobs.cancel(job).status}")


@cli.command()
def retry(job: JobId, url: Url = None, key: Key = None, home: HomeFolder = HERE) -> None:
    """Let a failed or cancelled job go on where it stopped."""
    with service(url, key, Home(home)) as dram:
        console.note(f"{job} is {dram.jobs.retry(job).status}")


@cli.command()
def download(
    source: Annotated[str, typer.Argument(metavar="JOB|STUDENT")],
    out: Annotated[
        Path | None, typer.Option(help="FILE.onnx for the network alone, FILE.zip for the whole bundle.")
    ] = None,
    precision: Precision = "fp32",
    url: Url = None,
    key: Key = None,
    home: HomeFolder = HERE,
) -> None:
    """Fetch a student."""
    if out is not None:
        _check_target(out)
    with service(url, key, Home(home)) as dram:
        student = _student(dram, source)
        console.out.print(str(_fetch(dram, student, out or Path(f"{student}.zip"), precision)))


@cli.command()
def predict(
    source: Annotated[str, typer.Argument(metavar="JOB|STUDENT")],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A JPEG, PNG or WebP file.")],
    top: Annotated[int, typer.Option(min=1, help="How many labels to show.")] = 5,
    precision: Precision = "fp32",
    url: Url = None,
    key: Key = None,
    home: HomeFolder = HERE,
    as_json: AsJson = False,
) -> None:
    """Ask a student about an image. Of one that gives class maps: write IMAGE.classes.png beside the image.

    Of an image over 1,024 pixels a side the map is of the image scaled down to that; the bundle's predict.py gives it
    whole. --top and --precision are of labels only.
    """
    content = image.read_bytes()
    with service(url, key, Home(home)) as dram:
        student = dram.students.get(_student(dram, source))
        if student.summary.get("task") == "segmentation":
            target = image.with_name(f"{image.name}.classes.png")  # as predict.py of its bundle names it
            target.write_bytes(dram.students.class_map(student.id, content))
            if as_json:
                console.print_json({"class_map": str(target), "classes": student.classes})
            else:
                console.class_map(target, student.classes)
            return
        seen = dram.students.predict(student.id, content, precision=precision, top=top)
    if as_json:
        console.print_json(seen.model_dump(mode="json"))
    else:
        console.prediction(seen)


@cli.command()
def distill(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|ZIP", help="One folder of images for each class, or images/ with masks/."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="FILE.onnx for the network alone, FILE.zip for the whole bundle.")
    ],
    teacher: Teacher = None,
    student: Student = None,
    method: Method = None,
    generator: Generator = None,
    preset: Preset = "balanced",
    param: Param = None,
    seed: Seed = 0,
    precision: Precision = "fp32",
    query_budget: QueryBudget = None,
    url: Url = None,
    key: Key = None,
    home: HomeFolder = HERE,
) -> None:
    """From images to a student in one step; starts a service for the time if none runs."""
    params = nested_params(param)
    _check_target(out)
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder or zip '{folder}'")
    with any_service(url, key, Home(home)) as (dram, lasting):
        made = dram.datasets.create(folder)
        console.dataset(made)
        names = complete(dram, lambda: made.task, teacher, method, student)
        job = dram.jobs.create(
            dataset_id=made.id, teacher_id=names.teacher, method=names.method, student=names.student,
            generator_id=generator, preset=preset, params=params, seed=seed, precision=precision,
            query_budget=query_budget,
        )  # fmt: skip
        done = _watch(dram, job.id, lasting=lasting)
        assert done.student_id is not None
        report = dram.students.report(done.student_id)
        console.report(report)
        kept = precision if report["int8"]["accepted"] else "fp32"
        console.out.print(str(_fetch(dram, done.student_id, out, kept)))


def _watch(dram: Dram, job_id: str, *, lasting: bool = True) -> Job:
    """The succeeded job. Ends the command with 1 where it failed or was cancelled, 130 on Ctrl-C.

    `lasting`: the service goes on when the command has ended, and so does the job on Ctrl-C.
    """
    try:
        console.follow(_or_why_not(dram, dram.jobs.events(job_id)))
        job = dram.jobs.wait(job_id)
    except KeyboardInterrupt:
        if lasting:
            console.note(
                f"\nThe job goes on. See it again: dram watch {job_id}; stop it: dram cancel {job_id}"
            )
        else:
            _cancel(dram, job_id)
        raise typer.Exit(130) from None
    if job.status != "succeeded":
        console.job_failure(job)
        raise typer.Exit(1)
    console.note(f"{job.id} succeeded: {job.student_id}")
    if job.queries.planned is not None:
        console.note(
            f"Questions to the teacher: {job.queries.spent:,}; answered before: {job.queries.cached:,}."
        )
    return job


def _or_why_not(dram: Dram, events: Iterator[JobEvent]) -> Iterator[JobEvent]:
    """The events; where no worker has taken the job after a while, what is missing is said, once."""
    patience = threading.Timer(_PATIENCE_S, _say_what_is_missing, [dram])
    patience.daemon = True
    patience.start()
    try:
        for event in events:
            if event.type == "job.started":
                patience.cancel()
            yield event
    finally:
        patience.cancel()
        patience.join()  # where it speaks already, the client stays open so long


def _say_what_is_missing(dram: Dram) -> None:
    console.note("No worker has taken the job yet.")
    try:
        dram.ready()
    except ClientError as failure:
        missing = failure.errors if isinstance(failure, DramApiError) else []
        for part in missing:
            console.note(f"  {part['detail']}")
        if not missing:
            console.error(failure)
    else:
        console.note("  The service is ready: its workers may be busy with other jobs.")


def _cancel(dram: Dram, job_id: str) -> None:
    """For a service that ends with the command: or its next start would first go on with a job nobody waits for."""
    try:
        dram.jobs.cancel(job_id)
    except ClientError as failure:
        console.error(failure)
        return
    console.note(
        f"\n{job_id} is cancelled: the service that was started for it stops. The same command finds again what its "
        f"stages had finished; to go on where it stopped: dram up, and dram retry {job_id}"
    )


def _student(dram: Dram, source: str) -> str:
    """The student's id, given it or its job's."""
    if not source.startswith("job_"):
        return source
    job = dram.jobs.get(source)
    if job.student_id is None:
        if job.finished:
            console.job_failure(job)
        else:
            console.note(
                f"{source} is {job.status}; a student comes when it has succeeded: dram watch {source}"
            )
        raise typer.Exit(1)
    return job.student_id


def _check_target(out: Path) -> None:
    """Before hours of work, not after."""
    if out.suffix not in (".onnx", ".zip"):
        raise typer.BadParameter(
            f"'{out}' should end in .onnx (the network alone) or .zip (the whole bundle)"
        )


def _fetch(dram: Dram, student_id: str, target: Path, precision: str) -> Path:
    if target.suffix == ".zip":
        return dram.students.download_bundle(student_id, target)
    return dram.students.download(student_id, target, precision)


if __name__ == "__main__":
    main()
