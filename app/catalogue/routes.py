"""Methods and student architectures, straight from the registries."""

from __future__ import annotations

from functools import cache

from fastapi import APIRouter

from app.catalogue.schemas import ArchitectureAnswer, MethodAnswer, StageAnswer
from app.errors import NotFound
from app.paging import Page
from app.problem import documented
from app.security.dependencies import allowed
from models.methods import METHODS
from models.pipeline import Stage
from models.students import STUDENTS, StudentSpec

router = APIRouter(prefix="/v1", tags=["catalogue"], dependencies=[allowed("jobs:read")])


@router.get("/methods")
def methods() -> Page[MethodAnswer]:
    """The distillation methods, with the JSON schema of their parameters."""
    return Page(data=[_method(name) for name in METHODS], has_more=False)


@router.get("/methods/{name}", responses=documented(404))
def method(name: str) -> MethodAnswer:
    if name not in METHODS:
        raise NotFound(
            f"There is no method '{name[:64]}'; there are: {', '.join(METHODS)}.", code="unknown_method"
        )
    return _method(name)


@router.get("/architectures")
def architectures() -> Page[ArchitectureAnswer]:
    """The networks that can be a student, smallest first."""
    by_size = sorted(STUDENTS.values(), key=lambda spec: spec.parameters)
    return Page(data=[_architecture(spec) for spec in by_size], has_more=False)


@router.get("/architectures/{name}", responses=documented(404))
def architecture(name: str) -> ArchitectureAnswer:
    if name not in STUDENTS:
        raise NotFound(
            f"There is no architecture '{name[:64]}'; there are: {', '.join(STUDENTS)}.",
            code="unknown_student",
        )
    return _architecture(STUDENTS[name])


@cache  # the schema takes milliseconds, and nothing of it changes while the process runs
def _method(name: str) -> MethodAnswer:
    method = METHODS[name]
    return MethodAnswer(
        object="method",
        id=method.name,
        title=method.title,
        source=method.source,
        needs=sorted(method.needs),
        stages=[_stage(stage) for stage in method.stages],
        presets={name: dict(values) for name, values in method.presets.items()},
        params=method.params.model_json_schema(),
    )


def _stage(stage: Stage) -> StageAnswer:
    return StageAnswer(
        name=stage.name,
        queue=stage.queue,
        params=stage.params,
        inputs=list(stage.inputs),
        optional=list(stage.optional),
        output=stage.output,
    )


def _architecture(spec: StudentSpec) -> ArchitectureAnswer:
    return ArchitectureAnswer.model_validate({**vars(spec), "object": "architecture", "id": spec.name})
