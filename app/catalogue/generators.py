"""Which generators there are: the catalogue of `models.generators`, and the operator's own (`app.networks`)."""

from __future__ import annotations

from pydantic import TypeAdapter

from app.errors import Invalid
from app.jobs.tables import Worker
from app.networks import Networks
from app.settings import Settings
from models import generators
from models.generators import GENERATORS, GeneratorSpec

_GENERATORS = Networks(
    "generator", TypeAdapter(list[GeneratorSpec]), GENERATORS, generators.availability, Worker.generators
)
# Which there are, whether they can be had, and whether on this machine; see there.
catalogue, availability, here = _GENERATORS.catalogue, _GENERATORS.availability, _GENERATORS.here


def resolve(settings: Settings, generator_id: str) -> GeneratorSpec:
    """The generator with this id. Raises `Invalid`, which lists what there is."""
    known = catalogue(settings)
    if generator_id not in known:
        raise Invalid(
            f"There is no generator '{generator_id[:64]}'; there are: {', '.join(sorted(known))}.",
            code="unknown_generator",
        )
    return known[generator_id]
