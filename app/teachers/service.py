"""Which teachers there are: the catalogue of `models.teachers`, the operator's own, and a tenant's black boxes.

The operator's are read by `app.networks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import structlog
from pydantic import Field, TypeAdapter
from sqlalchemy.orm import Session

from app import ids, paging
from app.db import owned, read_clock
from app.errors import Conflict, Invalid, NotFound
from app.jobs.tables import Job, Worker
from app.networks import Networks
from app.security.principal import Principal
from app.security.secretbox import SecretBox
from app.settings import Settings
from app.teachers.tables import Teacher
from app.wiring import Wiring
from models import teachers
from models.hub import Availability
from models.teachers import TEACHERS, AnyTeacher, TeacherSpec
from models.teachers.black_box import BlackBoxTeacher

log = structlog.get_logger()

#: Ids of a tenant's own teachers start so; no name of the catalogue does.
PREFIX = "tch"
#: An unknown teacher is answered with so many of the tenant's own.
_MOST_NAMED = 20
_BLACK_BOX: TypeAdapter[BlackBoxTeacher] = TypeAdapter(
    Annotated[BlackBoxTeacher, Field(discriminator="kind")]
)
_NETWORKS = Networks(
    "teacher", TypeAdapter(list[TeacherSpec]), TEACHERS, teachers.availability, Worker.teachers
)
# Which there are, whether they can be had, and whether on this machine; see there.
catalogue, availability, here = _NETWORKS.catalogue, _NETWORKS.availability, _NETWORKS.here


@dataclass(frozen=True)
class Resolved:
    """A teacher that a job may name. `files`: what lies beside its `teacher.json`, name -> blob digest.

    `unusable`: why a black box did not pass its last probe; empty where it passed or was not probed.
    """

    spec: AnyTeacher
    files: dict[str, str]
    unusable: str = ""


def resolve(session: Session, settings: Settings, principal: Principal, teacher_id: str) -> Resolved:
    """The teacher with this id, of the catalogue or the tenant's own. Raises `Invalid`, which lists what there is.

    In a write unit an own teacher cannot be deleted until the unit ends.
    """
    spec = catalogue(settings).get(teacher_id)
    if spec is not None:
        return Resolved(spec, {})
    row = session.scalar(owned(Teacher, principal).where(Teacher.id == teacher_id).with_for_update(read=True))
    if row is None:
        known = [*sorted(catalogue(settings)), *_own_ids(session, principal)]
        raise Invalid(
            f"There is no teacher '{teacher_id[:64]}'; there are: {', '.join(known)}.", code="unknown_teacher"
        )
    state = availability_of(row)
    return Resolved(spec_of(row), dict(row.files), "" if state.available else state.reason)


def headers(session: Session, settings: Settings, tenant: str, teacher_id: str) -> dict[str, str]:
    """The secret headers that a teacher of this tenant is asked with; none for most. Raises `Unavailable`."""
    own = owned(Teacher, Principal(tenant, frozenset()))
    sealed = session.scalar(own.where(Teacher.id == teacher_id).with_only_columns(Teacher.secret))
    return {} if sealed is None else _opened(settings, teacher_id, sealed)


# ---- a tenant's own -------------------------------------------------------------------------------------------


def create(
    wiring: Wiring,
    principal: Principal,
    spec: BlackBoxTeacher,
    files: dict[str, str],
    headers: Mapping[str, str],
) -> Teacher:
    """Write a teacher whose files are stored and whose name is a `new_id`. Raises `Unavailable` where its headers
    cannot be encrypted."""
    row = Teacher(
        id=spec.name,
        tenant=principal.tenant,
        title=spec.title,
        kind=spec.kind,
        spec=spec.model_dump(mode="json"),
        files=files,
        header_names=sorted(headers),
        secret=_sealed(wiring.settings, spec.name, headers),
        probe=None,
        deleted_at=None,
    )
    with wiring.database.writing() as session:
        session.add(row)
    log.info("teacher_created", teacher=row.id, kind=row.kind, classes=len(spec.classes))
    return row


def new_id() -> str:
    return ids.new(PREFIX)


def get(session: Session, principal: Principal, teacher_id: str) -> Teacher:
    """A teacher of the tenant's own. Raises `NotFound`."""
    row = session.scalar(owned(Teacher, principal).where(Teacher.id == teacher_id))
    if row is None:
        raise no_teacher(teacher_id)
    return row


def page(
    session: Session, settings: Settings, principal: Principal, limit: int, after: str | None
) -> tuple[list[TeacherSpec], list[Teacher], bool]:
    """First those of the catalogue, then the tenant's own, newest first; and whether more follow."""
    known = catalogue(settings)
    own = after is not None and after not in known
    start = 0 if after is None else list(known).index(after) + 1 if after in known else len(known)
    first = list(known.values())[start : start + limit]
    rows, more = paging.newest(
        session, owned(Teacher, principal), Teacher.id, limit=limit - len(first), after=after if own else None
    )
    return first, rows, more or start + len(first) < len(known)


def replace_headers(
    wiring: Wiring, principal: Principal, teacher_id: str, headers: Mapping[str, str]
) -> Teacher:
    """Forget the old secret headers and keep these. Raises `NotFound`, `Invalid` or `Unavailable`."""
    with wiring.database.writing() as session:
        row = get(session, principal, teacher_id)
        if row.kind != "http":
            raise Invalid(
                f"Teacher '{teacher_id}' is a file; only one behind HTTP is asked with headers.",
                code="teacher_has_no_headers",
            )
        row.header_names = sorted(headers)
        row.secret = _sealed(wiring.settings, row.id, headers)
        row.probe = None  # it told of the old ones
    log.info("teacher_headers_replaced", teacher=row.id)
    return row


def record_probe(wiring: Wiring, principal: Principal, teacher_id: str, report: dict[str, Any]) -> None:
    """Keep the newest probe's report. A teacher deleted meanwhile needs none."""
    with wiring.database.writing() as session:
        row = session.scalar(owned(Teacher, principal).where(Teacher.id == teacher_id))
        if row is not None:
            row.probe = {**report, "at": read_clock(session)}


def delete(wiring: Wiring, principal: Principal, teacher_id: str) -> None:
    """Take it out of sight, and its secrets away. Raises `NotFound`, and `Conflict` while a job needs it."""
    with wiring.database.writing() as session:
        row = session.scalar(owned(Teacher, principal).where(Teacher.id == teacher_id).with_for_update())
        if row is None:
            raise no_teacher(teacher_id)
        asking = owned(Job, principal).where(Job.teacher == teacher_id, Job.finished_at.is_(None))
        job = session.scalar(asking.with_only_columns(Job.id).limit(1))
        if job is not None:
            raise Conflict(
                f"Job {job} still asks teacher '{teacher_id}'. Wait until it has finished, or cancel it.",
                code="teacher_in_use",
            )
        row.secret = None
        row.deleted_at = read_clock(session)


def spec_of(row: Teacher) -> BlackBoxTeacher:
    return _BLACK_BOX.validate_python(row.spec)


def availability_of(row: Teacher) -> Availability:
    """An own teacher can be had unless its last probe failed."""
    if row.probe is None:
        return Availability(True, "It was not probed yet.")
    if row.probe["ok"]:
        return Availability(True, "It passed its last probe.")
    why = " ".join(row.probe["problems"])
    return Availability(False, f"It did not pass its last probe: {why} Probe it again when that is mended.")


def no_teacher(teacher_id: str) -> NotFound:
    return NotFound(f"There is no teacher '{teacher_id[:64]}'. GET /v1/teachers lists them.")


def _own_ids(session: Session, principal: Principal) -> list[str]:
    select = owned(Teacher, principal).with_only_columns(Teacher.id)
    found, more = paging.newest(session, select, Teacher.id, limit=_MOST_NAMED, after=None)
    return [*found, *(["…"] if more else [])]


def _sealed(settings: Settings, teacher_id: str, headers: Mapping[str, str]) -> str | None:
    """Encrypted and bound to the teacher; None where there is nothing to keep."""
    if not headers:
        return None
    return SecretBox.sealing(settings).seal(json.dumps(dict(headers)).encode(), teacher_id)


def _opened(settings: Settings, teacher_id: str, sealed: str) -> dict[str, str]:
    opened: dict[str, str] = json.loads(SecretBox.opening(settings).open(sealed, teacher_id))
    return opened
