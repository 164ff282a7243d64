"""`dram samples`: the synthetic images of a job as files to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from app import console
from app.client import Dram, Sample
from app.connect import Where
from app.option_groups import grouped

#: The file beside the images that says what each is.
INDEX = "samples.json"
_PAGE = 100


@grouped
def samples(
    job: Annotated[str, typer.Argument(metavar="JOB")],
    out: Annotated[
        Path, typer.Option(help="Folder for the PNG files and samples.json, which describes them.")
    ],
    limit: Annotated[int, typer.Option(min=1, help="Most images to fetch.")] = 200,
    after: Annotated[int, typer.Option(min=0, help="Number of the last image seen.")] = 0,
    size: Annotated[
        int | None, typer.Option(min=16, max=256, help="Longest side in pixels. Left out: as made.")
    ] = None,
    *,
    where: Where,
) -> None:
    """Fetch the synthetic images of a job, with where each comes from and what the teacher says of it."""
    out.mkdir(parents=True, exist_ok=True)
    described = []
    with where.client() as dram:
        for sample in _samples(dram, job, limit, after):
            name = _file_name(sample)
            (out / name).write_bytes(dram.jobs.sample_image(job, sample.id, size=size))
            described.append({"file": name, **sample.model_dump(mode="json", exclude={"urls", "object"})})
    (out / INDEX).write_text(json.dumps(described, indent=1, ensure_ascii=False))
    kept = sum(entry["kept"] is True for entry in described)
    undecided = sum(entry["kept"] is None for entry in described)
    console.out.print(str(out))
    console.note(
        f"{len(described)} images: {kept} kept, {len(described) - kept - undecided} not"
        + (f", {undecided} not decided yet." if undecided else ".")
    )


def _samples(dram: Dram, job: str, limit: int, after: int) -> Iterator[Sample]:
    left, more = limit, True
    while left and more:
        page = dram.jobs.samples(job, limit=min(left, _PAGE), after=after)
        yield from page.data
        left -= len(page.data)
        more = page.has_more and bool(page.data)
        after = int(page.data[-1].id) if page.data else after


def _file_name(sample: Sample) -> str:
    """Sorts by number, and tells what became of the image."""
    state = {True: "kept", False: "rejected", None: "undecided"}[sample.kept]
    return f"{int(sample.id):06d}-{state}.png"
