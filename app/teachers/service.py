"""Which teachers there are: the catalogue of `models.teachers` and the operator's own file.

The file is TOML, one table for each teacher with the members of `TeacherSpec`:

    [[teacher]]
    name = "our_vit"
    title = "Our ViT, fine-tuned on bolts"
    kind = "timm"
    source = "/srv/networks/our_vit"       # a folder, or a hub id with its commit as revision
    input_size = 224
    parameters = 22056576
    embedding_dim = 384
    licence = "proprietary"
    licence_url = "https://example.org/licence"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog
from pydantic import ValidationError

from app.db import now
from app.errors import Invalid, Unavailable, findings_of
from app.jobs.tables import WORKER_SILENCE_S, Worker
from app.settings import Settings
from app.wiring import Wiring
from models import teachers
from models.teachers import TEACHERS, Availability, TeacherSpec

log = structlog.get_logger()


def catalogue(settings: Settings) -> Mapping[str, TeacherSpec]:
    """Every teacher by its id. Raises `Unavailable` where the operator's file cannot be read."""
    if settings.teachers_file is None:
        return TEACHERS
    try:
        changed = settings.teachers_file.stat().st_mtime_ns
    except OSError as error:
        log.error("teachers_file_unreadable", error=str(error))
        raise _broken("it cannot be read") from error
    return {**TEACHERS, **_read(settings.teachers_file, changed)}


def find(settings: Settings, teacher_id: str) -> TeacherSpec:
    """The teacher with this id. Raises `Invalid`, which lists the valid ones."""
    known = catalogue(settings)
    if teacher_id not in known:
        raise Invalid(
            f"There is no teacher '{teacher_id[:64]}'; there are: {', '.join(sorted(known))}.",
            code="unknown_teacher",
        )
    return known[teacher_id]


def availability(wiring: Wiring, specs: Sequence[TeacherSpec]) -> dict[str, Availability]:
    """Whether each teacher can be had now, and why not: as the live workers say, for they load it.

    Where no worker has looked yet, what this machine itself sees.
    """
    with wiring.database.rows() as connection:
        recent = Worker.seen_at > now() - WORKER_SILENCE_S
        seen = sa.select(Worker.teachers).where(recent, Worker.teachers.is_not(None))
        reports = list(connection.execute(seen).scalars())
    if not reports:
        return here(specs)
    return {spec.name: _among(reports, spec.name) for spec in specs}


def here(specs: Sequence[TeacherSpec]) -> dict[str, Availability]:
    """Whether each teacher can be had on this machine. Asks the hub for several at once."""
    with ThreadPoolExecutor(max_workers=8) as threads:
        return dict(zip([spec.name for spec in specs], threads.map(_here, specs), strict=True))


def _here(spec: TeacherSpec) -> Availability:
    try:
        return teachers.availability(spec)
    except ImportError as error:  # a gateway without the hub's client
        return Availability(
            False, f"The Python package '{error.name}' that would look for it is not installed here."
        )


def _among(reports: Sequence[Mapping[str, Any]], name: str) -> Availability:
    answers = [Availability(*report[name]) for report in reports if name in report]
    absent = Availability(False, "No running worker has it in its file of teachers (DRAM_TEACHERS_FILE).")
    return next((answer for answer in answers if answer.available), answers[0] if answers else absent)


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> Mapping[str, TeacherSpec]:
    """The teachers of a file; `changed` is its time of change, so that an edit is seen."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("teacher", [])
        specs = [TeacherSpec.model_validate(table) for table in tables]
    except ValidationError as error:
        finding = findings_of(error.errors())[0]
        log.error("teachers_file_wrong", pointer=finding.pointer, detail=finding.detail)
        raise _broken(f"{finding.pointer or 'an entry'}: {finding.detail}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        log.error("teachers_file_wrong", error=str(error))
        raise _broken(f"it is no TOML file ({error})") from error
    by_name = {spec.name: spec for spec in specs}
    twice = len(by_name) < len(specs) or by_name.keys() & TEACHERS.keys()
    if twice:
        raise _broken("a name is used twice, or is that of a teacher of the catalogue")
    return by_name


def _broken(why: str) -> Unavailable:
    return Unavailable(
        f"The operator's file of teachers (DRAM_TEACHERS_FILE) cannot be used: {why}.",
        code="teachers_file_wrong",
    )
