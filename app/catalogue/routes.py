"""Methods, student architectures and generators, straight from the registries."""

from __future__ import annotations

from functools import cache

from fastapi import APIRouter

from app.catalogue import generators as service
from app.catalogue.schemas import ArchitectureAnswer, GeneratorAnswer, MethodAnswer, StageAnswer
from app.errors import NotFound
from app.paging import Page
from app.problem import documented
from app.security.dependencies import Wired, allowed
from models.generators import GeneratorSpec
from models.hub import Availability
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


@router.get("/generators", responses=documented(503))
def generators(wiring: Wired) -> Page[GeneratorAnswer]:
    """The generators of images, with licence, size and whether each can be had now."""
    specs = list(service.catalogue(wiring.settings).values())
    states = service.availability(wiring, specs)
    return Page(data=[_generator(spec, states[spec.name]) for spec in specs], has_more=False)


@router.get("/generators/{name}", responses=documented(404, 503))
def generator(name: str, wiring: Wired) -> GeneratorAnswer:
    known = service.catalogue(wiring.settings)
    if name not in known:
        raise NotFound(
            f"There is no generator '{name[:64]}'; there are: {', '.join(known)}.", code="unknown_generator"
        )
    return _generator(known[name], service.availability(wiring, [known[name]])[name])


@cache  # the schema takes milliseconds, and nothing of it changes while the process runs
def _method(name: str) -> MethodAnswer:
    method = METHODS[name]
    return MethodAnswer(
        object="method",
        id=method.name,
        title=method.title,
        source=method.source,
        task=method.task,
        needs=sorted(method.needs),
        student=method.student,
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


def _generator(spec: GeneratorSpec, state: Availability) -> GeneratorAnswer:
    source = spec.source if spec.kind == "hub" else spec.kind  # no path of the operator's machine
    return GeneratorAnswer.model_validate(
        {**spec.model_dump(), **vars(state), "source": source, "object": "generator", "id": spec.name}
    )


def _architecture(spec: StudentSpec) -> ArchitectureAnswer:
    return ArchitectureAnswer.model_validate({**vars(spec), "object": "architecture", "id": spec.name})
