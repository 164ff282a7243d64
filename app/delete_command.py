"""`dram delete`: what is one's own, told apart by what its id begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from app import console
from app.client import Dram, DramApiError
from app.connect import Where
from app.option_groups import grouped

_Deletion = Callable[[Dram, str], None]
#: What an id begins with: the name of its kind, and how one is deleted.
_KINDS: Mapping[str, tuple[str, _Deletion]] = {
    "ds_": ("data set", lambda dram, item: dram.datasets.delete(item)),
    "job_": ("job", lambda dram, item: dram.jobs.delete(item)),
    "stu_": ("student", lambda dram, item: dram.students.delete(item)),
    "tch_": ("teacher of your own", lambda dram, item: dram.teachers.delete(item)),
    "wh_": ("webhook", lambda dram, item: dram.webhooks.delete(item)),
}


@grouped
def delete(
    items: Annotated[
        list[str],
        typer.Argument(metavar="ID", help="Of data sets, jobs, students, webhooks, teachers of your own."),
    ],
    where: Where,
) -> None:
    """Delete data sets, jobs that have ended, students; teachers of your own and webhooks, with their secrets.

    A job's student stays, unless it is named too. What is refused is said, and the rest deleted.
    """
    deletions = {item: _deletion(item) for item in items}  # all are known before any is gone
    refused = False
    with where.client() as dram:
        for item, delete_one in deletions.items():
            try:
                delete_one(dram, item)
            except DramApiError as refusal:
                console.note(f"{item} is not deleted:")
                console.error(refusal)
                refused = True
            else:
                console.note(f"{item} is deleted")
    if refused:
        raise typer.Exit(1)


def _deletion(item: str) -> _Deletion:
    for prefix, (_, deletion) in _KINDS.items():
        if item.startswith(prefix):
            return deletion
    kinds = ", ".join(f"{kind} ({prefix}…)" for prefix, (kind, _) in _KINDS.items())
    raise typer.BadParameter(f"'{item}' should be the id of one of these: {kinds}")
