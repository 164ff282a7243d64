"""What a command orders where something is left out: the method for the images, what fits the method."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from app import console
from app.client import Dram
from app.client.answers import Method
from app.order_options import DEFAULT_STUDENT
from app.teacher_commands import every_teacher

_USUAL = "kd"


@dataclass(frozen=True)
class Names:
    """Who teaches what to whom."""

    teacher: str
    method: str
    student: str


def complete(
    dram: Dram, dataset_id: str, teacher: str | None, method: str | None, student: str | None
) -> Names:
    """The names of an order for a data set; those that are given stay, for the service to judge.

    A method left out is the first for the data set's task to which the teacher has enough to say; a teacher left out,
    the first of the catalogue that can be had and has enough to say to the method; a student left out, the method's
    own. Ends the command with 1 where no teacher can be had.
    """
    if not (teacher and method and student):
        known = {each.id: each for each in dram.methods().data}
        method = method or _method(dram, list(known.values()), dataset_id, teacher)
        of_method = known.get(method)
        student = student or (of_method.student if of_method else None) or DEFAULT_STUDENT
        teacher = teacher or _teacher(dram, of_method)
    return Names(teacher, method, student)


def _method(dram: Dram, known: list[Method], dataset_id: str, teacher: str | None) -> str:
    task = dram.datasets.get(dataset_id).task
    offers = set(dram.teachers.get(teacher).offers) if teacher else None
    fitting = (
        each.id for each in known if each.task == task and (offers is None or offers.issuperset(each.needs))
    )
    return next(fitting, _USUAL)


def _teacher(dram: Dram, method: Method | None) -> str:
    """Of the catalogue: a black box of one's own is never asked without being named."""
    needs = set(method.needs) if method else set()
    for teacher in every_teacher(dram):
        if teacher.available and not teacher.is_own and needs.issubset(teacher.offers):
            return teacher.id
    console.note("No teacher of the catalogue can be had for this method here; `dram teachers` says why.")
    raise typer.Exit(1)
