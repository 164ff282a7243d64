"""Which generators there are: the catalogue of `models.generators`, and those of the operator's own file.

They stand in the file of teachers (DRAM_TEACHERS_FILE), one table for each with the members of `GeneratorSpec`:

    [[generator]]
    name = "our_diffusion"
    title = "Our diffusion model of bolts"
    kind = "local"
    source = "/srv/networks/our_diffusion"  # a folder in Stable Diffusion's format
    revision = "2"                          # change it with the weights
    resolution = 256
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
from models import generators
from models.generators import GENERATORS, GeneratorSpec
from models.teachers import Availability

log = structlog.get_logger()


def catalogue(settings: Settings) -> Mapping[str, GeneratorSpec]:
    """Every generator by its id. Raises `Unavailable` where the operator's file cannot be read."""
    if settings.teachers_file is None:
        return GENERATORS
    try:
        changed = settings.teachers_file.stat().st_mtime_ns
    except OSError as error:
        log.error("teachers_file_unreadable", error=str(error))
        raise _broken("it cannot be read") from error
    return {**GENERATORS, **_read(settings.teachers_file, changed)}


def resolve(settings: Settings, generator_id: str) -> GeneratorSpec:
    """The generator with this id. Raises `Invalid`, which lists what there is."""
    known = catalogue(settings)
    if generator_id not in known:
        raise Invalid(
            f"There is no generator '{generator_id[:64]}'; there are: {', '.join(sorted(known))}.",
            code="unknown_generator",
        )
    return known[generator_id]


def availability(wiring: Wiring, specs: Sequence[GeneratorSpec]) -> dict[str, Availability]:
    """Whether each generator can be had now, and why not: as the live workers say, for they load it.

    Where no worker has looked yet, what this machine itself sees.
    """
    with wiring.database.rows() as connection:
        recent = Worker.seen_at > now() - WORKER_SILENCE_S
        seen = sa.select(Worker.generators).where(recent, Worker.generators.is_not(None))
        reports = list(connection.execute(seen).scalars())
    if not reports:
        return here(specs)
    return {spec.name: _among(reports, spec.name) for spec in specs}


def here(specs: Sequence[GeneratorSpec]) -> dict[str, Availability]:
    """Whether each generator can be had on this machine. Asks the hub for several at once."""
    with ThreadPoolExecutor(max_workers=8) as threads:
        return dict(zip([spec.name for spec in specs], threads.map(_here, specs), strict=True))


def _here(spec: GeneratorSpec) -> Availability:
    try:
        return generators.availability(spec)
    except ImportError as error:  # a gateway without the hub's client
        return Availability(
            False, f"The Python package '{error.name}' that would look for it is not installed here."
        )


def _among(reports: Sequence[Mapping[str, Any]], name: str) -> Availability:
    answers = [Availability(*report[name]) for report in reports if name in report]
    absent = Availability(False, "No running worker has it in its file of teachers (DRAM_TEACHERS_FILE).")
    return next((answer for answer in answers if answer.available), answers[0] if answers else absent)


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> Mapping[str, GeneratorSpec]:
    """The generators of a file; `changed` is its time of change, so that an edit is seen."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("generator", [])
        specs = [GeneratorSpec.model_validate(table) for table in tables]
    except ValidationError as error:
        finding = findings_of(error.errors())[0]
        log.error("teachers_file_wrong", pointer=finding.pointer, detail=finding.detail)
        raise _broken(f"{finding.pointer or 'an entry'}: {finding.detail}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        log.error("teachers_file_wrong", error=str(error))
        raise _broken(f"it is no TOML file ({error})") from error
    by_name = {spec.name: spec for spec in specs}
    if len(by_name) < len(specs) or by_name.keys() & GENERATORS.keys():
        raise _broken("a generator's name is used twice, or is that of one of the catalogue")
    return by_name


def _broken(why: str) -> Unavailable:
    return Unavailable(
        f"The operator's file of teachers (DRAM_TEACHERS_FILE) cannot be used for generators: {why}.",
        code="teachers_file_wrong",
    )
