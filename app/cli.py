"""The `dram` command: a service on this machine, and a client of any."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from app import console, watching
from app.catalogue_commands import architectures, generators, methods
from app.client import ClientError, Dram
from app.connect import HERE, AsJson, HomeFolder, Where
from app.delete_command import delete
from app.embedded import EmbeddedError
from app.evaluate_command import evaluate
from app.option_groups import grouped
from app.order_defaults import complete
from app.order_options import OrderOptions, Precision
from app.sample_command import samples
from app.teacher_commands import teachers

cli = typer.Typer(
    help="Few-shot distillation: a handful of labelled images in, a tiny ONNX classifier out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JobId = Annotated[str, typer.Argument(metavar="JOB")]


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
@grouped
def upload(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|ZIP", help="One folder of images for each class, or images/ with masks/."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="What to call it. Empty: the folder's name.")] = None,
    *,
    where: Where,
    as_json: AsJson = False,
) -> None:
    """Upload images. Beside the classes: `test/` with class folders, `unlabelled/` without."""
    with where.client() as dram:
        made = dram.datasets.create(source, name)
    if as_json:
        console.print_json(made.model_dump(mode="json"))
    else:
        console.dataset(made)


@cli.command()
@grouped
def submit(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Id that `dram upload` printed.")],
    options: OrderOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the job would do, and order nothing.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Stay until it has finished.")] = False,
    *,
    where: Where,
    as_json: AsJson = False,
) -> None:
    """Order a student from a data set."""
    if dry_run and watch:
        raise typer.BadParameter("--dry-run orders nothing that --watch could show: leave one out")
    asked = options.order()
    with where.client() as dram:
        order = complete(dram, {"dataset_id": dataset, **asked}, lambda: dram.datasets.get(dataset).task)
        if dry_run:
            planned = dram.jobs.plan(**order)
            if as_json:
                console.print_json(planned.model_dump(mode="json"))
            else:
                console.plan(order, planned)
            return
        job = dram.jobs.create(**order)
        if as_json:
            console.print_json(job.model_dump(mode="json"))
        else:
            console.out.print(job.id)
        if watch:
            watching.until_success(dram, job.id)


@cli.command()
@grouped
def watch(job: JobId, where: Where) -> None:
    """Show a job's progress until it has finished; fail if it did."""
    with where.client() as dram:
        watching.until_success(dram, job)


@cli.command()
@grouped
def jobs(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Id of the last job seen.")] = None,
    *,
    where: Where,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""
    with where.client() as dram:
        page = dram.jobs.list(limit=limit, after=after)
    if as_json:
        console.print_json(page.model_dump(mode="json"))
        return
    console.jobs(page.data)
    if page.has_more:
        console.note(f"More: dram jobs --after {page.data[-1].id}")


@cli.command()
@grouped
def cancel(job: JobId, where: Where) -> None:
    """Stop a job."""
    with where.client() as dram:
        console.note(f"{job} is {dram.jobs.cancel(job).status}")


@cli.command()
@grouped
def retry(job: JobId, where: Where) -> None:
    """Let a failed or cancelled job go on where it stopped."""
    with where.client() as dram:
        console.note(f"{job} is {dram.jobs.retry(job).status}")


@cli.command()
@grouped
def download(
    source: Annotated[str, typer.Argument(metavar="JOB|STUDENT")],
    out: Annotated[
        Path | None, typer.Option(help="FILE.onnx for the network alone, FILE.zip for the whole bundle.")
    ] = None,
    precision: Precision = "fp32",
    *,
    where: Where,
) -> None:
    """Fetch a student."""
    if out is not None:
        _check_target(out)
    with where.client() as dram:
        student = _student(dram, source)
        console.out.print(str(_fetch(dram, student, out or Path(f"{student}.zip"), precision)))


@cli.command()
@grouped
def predict(
    source: Annotated[str, typer.Argument(metavar="JOB|STUDENT")],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A JPEG, PNG or WebP file.")],
    top: Annotated[int, typer.Option(min=1, help="How many labels to show.")] = 5,
    precision: Precision = "fp32",
    *,
    where: Where,
    as_json: AsJson = False,
) -> None:
    """Ask a student about an image. Of one that gives class maps: write IMAGE.classes.png beside the image.

    Of an image over 1,024 pixels a side the map is of the image scaled down to that; the bundle's predict.py gives it
    whole. --top and --precision are of labels only.
    """
    content = image.read_bytes()
    with where.client() as dram:
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
@grouped
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
    options: OrderOptions,
    *,
    where: Where,
) -> None:
    """From images to a student in one step; starts a service for the time if none runs."""
    asked = options.order()
    _check_target(out)
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder or zip '{folder}'")
    with where.any_client() as (dram, lasting):
        made = dram.datasets.create(folder)
        console.dataset(made)
        order = complete(dram, {"dataset_id": made.id, **asked}, lambda: made.task)
        job = dram.jobs.create(**order)
        done = watching.until_success(dram, job.id, lasting=lasting)
        assert done.student_id is not None
        report = dram.students.report(done.student_id)
        console.report(report)
        kept = options.precision if report["int8"]["accepted"] else "fp32"
        console.out.print(str(_fetch(dram, done.student_id, out, kept)))


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


for command in (delete, samples, evaluate, methods, architectures, generators):
    cli.command()(command)
cli.add_typer(teachers, name="teachers")

if __name__ == "__main__":
    main()
