"""Teachers over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from fastapi import APIRouter

from app.errors import NotFound
from app.paging import Page
from app.problem import documented
from app.security.dependencies import Wired, allowed
from app.teachers import service
from app.teachers.schemas import TeacherAnswer
from models.teachers import TeacherSpec

router = APIRouter(prefix="/v1/teachers", tags=["teachers"], dependencies=[allowed("jobs:read")])


@router.get("", responses=documented(503))
def index(wiring: Wired) -> Page[TeacherAnswer]:
    """Every teacher with its licence and size, and whether it can be had now. One page holds all."""
    specs = service.catalogue(wiring.settings).values()
    with ThreadPoolExecutor(max_workers=8) as threads:  # the hub is asked for several at once
        return Page(data=list(threads.map(_answer, specs)), has_more=False)


@router.get("/{teacher_id}", responses=documented(404, 503))
def show(teacher_id: str, wiring: Wired) -> TeacherAnswer:
    known = service.catalogue(wiring.settings)
    if teacher_id not in known:
        raise NotFound(f"There is no teacher '{teacher_id[:64]}'. GET /v1/teachers lists them.")
    return _answer(known[teacher_id])


def _answer(spec: TeacherSpec) -> TeacherAnswer:
    state = service.availability(spec)
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
