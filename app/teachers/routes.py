"""Teachers over HTTP."""

from __future__ import annotations

from fastapi import APIRouter

from app.errors import NotFound
from app.paging import Page
from app.problem import documented
from app.security.dependencies import Wired, allowed
from app.teachers import service
from app.teachers.schemas import TeacherAnswer
from models.teachers import Availability, TeacherSpec

router = APIRouter(prefix="/v1/teachers", tags=["teachers"], dependencies=[allowed("jobs:read")])


@router.get("", responses=documented(503))
def index(wiring: Wired) -> Page[TeacherAnswer]:
    """Every teacher with its licence and size, and whether it can be had now. One page holds all."""
    specs = list(service.catalogue(wiring.settings).values())
    states = service.availability(wiring, specs)
    return Page(data=[_answer(spec, states[spec.name]) for spec in specs], has_more=False)


@router.get("/{teacher_id}", responses=documented(404, 503))
def show(teacher_id: str, wiring: Wired) -> TeacherAnswer:
    known = service.catalogue(wiring.settings)
    if teacher_id not in known:
        raise NotFound(f"There is no teacher '{teacher_id[:64]}'. GET /v1/teachers lists them.")
    spec = known[teacher_id]
    return _answer(spec, service.availability(wiring, [spec])[teacher_id])


def _answer(spec: TeacherSpec, state: Availability) -> TeacherAnswer:
    return TeacherAnswer(
        object="teacher",
        id=spec.name,
        title=spec.title,
        kind=spec.kind,
        source="local" if spec.is_local else spec.source,
        revision=spec.revision,
        input_size=spec.input_size,
        parameters=spec.parameters,
        embedding_dim=spec.embedding_dim,
        offers=sorted(spec.offers),
        licence=spec.licence,
        licence_url=spec.licence_url,
        resident_mib=spec.resident_mib,
        available=state.available,
        reason=state.reason,
    )
