"""What a command orders where something is left out: the method for the images, what fits the method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

from app import console
from app.client import Dram
from app.client.answers import Method
from app.order_options import DEFAULT_STUDENT
from app.teacher_commands import every_teacher

_USUAL = "kd"


def complete(dram: Dram, order: Mapping[str, Any], task: Callable[[], str]) -> dict[str, Any]:
    """The order with a name for teacher, method and student; those that it has stay, for the service to judge.

    `task`: of the images. A method left out is the first for the task that makes such a student and to which the
    teacher has enough to say, else the first for the task; a teacher left out, the first of the catalogue that can be
    had and has enough to say to the method; a student left out, the method's own. Ends the command with 1 where no
    teacher can be had.
    """
    teacher, method, student = order["teacher_id"], order["method"], order["student"]
    if not (teacher and method and student):
        known = dram.methods().data
        method = method or _method(dram, known, task(), teacher, student)
        of_method = next((each for each in known if each.id == method), None)
        student = student or (of_method.student if of_method else None) or DEFAULT_STUDENT
        teacher = teacher or _teacher(dram, method, set(of_method.needs) if of_method else set())
    return {**order, "teacher_id": teacher, "method": method, "student": student}


def _method(dram: Dram, known: Sequence[Method], task: str, teacher: str | None, student: str | None) -> str:
    of_task = [each for each in known if each.task == task]
    makers = [each for each in of_task if student and each.student == student]
    possible = makers or of_task
    offers = (
        next((set(each.offers) for each in every_teacher(dram) if each.id == teacher), None)
        if teacher
        else None
    )
    fitting = [each for each in possible if offers is None or offers.issuperset(each.needs)]
    return next((each.id for each in fitting or possible), _USUAL)


def _teacher(dram: Dram, method: str, needs: set[str]) -> str:
    """Of the catalogue: a black box of one's own is never asked without being named."""
    for teacher in every_teacher(dram):
        if teacher.available and not teacher.is_own and needs.issubset(teacher.offers):
            return teacher.id
    needed = ", ".join(sorted(needs)) or "a teacher"
    console.note(
        f"No teacher of the catalogue can be had here for method '{method}', which needs {needed}; "
        "`dram teachers` lists them."
    )
    raise typer.Exit(1)
