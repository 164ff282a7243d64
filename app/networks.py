"""Networks that a job may name, teachers or generators: those that come with Dram and the operator's own.

The operator's file (DRAM_TEACHERS_FILE) is TOML, one table for each network with the members of `TeacherSpec` or
`GeneratorSpec`:

    [[teacher]]
    name = "our_vit"
    title = "Our ViT, fine-tuned on bolts"
    kind = "timm"
    source = "/srv/networks/our_vit"        # a folder, or a hub id with its commit as revision
    input_size = 224
    parameters = 22056576
    embedding_dim = 384
    licence = "proprietary"
    licence_url = "https://example.org/licence"

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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
import structlog
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.orm import InstrumentedAttribute

from app.db import now
from app.errors import Unavailable, findings_of
from app.jobs.tables import WORKER_SILENCE_S, Worker
from app.settings import Settings
from app.wiring import Wiring
from models.generators import GeneratorSpec
from models.hub import Availability
from models.teachers import TeacherSpec

log = structlog.get_logger()

Spec = TypeVar("Spec", TeacherSpec, GeneratorSpec)


@dataclass(frozen=True, eq=False)
class Networks(Generic[Spec]):
    """The networks of one kind.

    `kind`: what their tables in the file are called. `included`: those that come with Dram, by name. `look`: whether
    one can be had on this machine. `reported`: where the workers say the same, name -> [available, reason].
    """

    kind: str
    specs: TypeAdapter[list[Spec]]
    included: Mapping[str, Spec]
    look: Callable[[Spec], Availability]
    reported: InstrumentedAttribute[dict[str, Any] | None]

    def catalogue(self, settings: Settings) -> Mapping[str, Spec]:
        """Every network by its id. Raises `Unavailable` where the operator's file cannot be used."""
        path = settings.teachers_file
        if path is None:
            return self.included
        try:
            return {**self.included, **_read(self, path, path.stat().st_mtime_ns)}
        except OSError as error:  # its words name the path: they are for the log, not for users
            raise _unusable("it cannot be read", error=str(error)) from error

    def availability(self, wiring: Wiring, specs: Sequence[Spec]) -> dict[str, Availability]:
        """Whether each network can be had now, and why not: as the live workers say, for they load it.

        Where no worker has looked yet, what this machine itself sees.
        """
        with wiring.database.rows() as connection:
            recent = Worker.seen_at > now() - WORKER_SILENCE_S
            seen = sa.select(self.reported).where(recent, self.reported.is_not(None))
            reports = list(connection.execute(seen).scalars())
        if not reports:
            return self.here(specs)
        return {spec.name: _among(reports, spec.name) for spec in specs}

    def here(self, specs: Sequence[Spec]) -> dict[str, Availability]:
        """Whether each network can be had on this machine. Asks the hub for several at once."""
        with ThreadPoolExecutor(max_workers=8) as threads:
            return dict(zip([spec.name for spec in specs], threads.map(self._here, specs), strict=True))

    def _here(self, spec: Spec) -> Availability:
        try:
            return self.look(spec)
        except ImportError as error:  # a gateway without the hub's client
            return Availability(
                False, f"The Python package '{error.name}' that would look for it is not installed here."
            )


def _among(reports: Sequence[Mapping[str, Any]], name: str) -> Availability:
    answers = [Availability(*report[name]) for report in reports if name in report]
    absent = Availability(False, "No running worker has it in its file of teachers (DRAM_TEACHERS_FILE).")
    return next((answer for answer in answers if answer.available), answers[0] if answers else absent)


@lru_cache(maxsize=8)
def _read(networks: Networks[Spec], path: Path, changed: int) -> Mapping[str, Spec]:
    """The networks of the file; `changed` is its time of change, so that an edit is seen. Raises `OSError` and
    `Unavailable`."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get(networks.kind, [])
        specs = networks.specs.validate_python(tables)
    except ValidationError as error:
        finding = findings_of(error.errors(), below=f"/{networks.kind}")[0]
        raise _unusable(f"{finding.pointer}: {finding.detail}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _unusable(f"it is no TOML file ({error})") from error
    by_name = {spec.name: spec for spec in specs}
    if len(by_name) < len(specs) or by_name.keys() & networks.included.keys():
        raise _unusable(f"a {networks.kind}'s name is used twice, or is that of one that comes with Dram")
    return by_name


def _unusable(why: str, **logged: str) -> Unavailable:
    log.error("teachers_file_wrong", why=why, **logged)
    return Unavailable(
        f"The operator's file of teachers (DRAM_TEACHERS_FILE) cannot be used: {why}.",
        code="teachers_file_wrong",
    )
