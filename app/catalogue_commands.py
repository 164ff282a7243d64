"""`dram methods`, `dram architectures` and `dram generators`: what an order may name."""

from __future__ import annotations

from app import console
from app.connect import AsJson, Where
from app.option_groups import grouped


@grouped
def methods(where: Where, as_json: AsJson = False) -> None:
    """List the ways to distil."""
    with where.client() as dram:
        listed = dram.methods().data
    console.listing(
        listed,
        as_json,
        ("method", "title", "needs", "presets", "source"),
        lambda row: (
            row["id"],
            row.get("title"),
            ", ".join(row.get("needs", [])),
            ", ".join(row.get("presets", {})),
            row.get("source"),
        ),
    )


@grouped
def architectures(where: Where, as_json: AsJson = False) -> None:
    """List the students that can be trained."""
    with where.client() as dram:
        listed = dram.architectures().data
    console.listing(
        listed,
        as_json,
        ("student", "parameters", "multiply-adds", "pixels", "title"),
        lambda row: (
            row["id"],
            console.millions(row.get("parameters")),
            console.millions(row.get("macs")),
            row.get("input_size"),
            row.get("title"),
        ),
    )


@grouped
def generators(where: Where, as_json: AsJson = False) -> None:
    """List what can make images, for the methods that need it."""
    with where.client() as dram:
        listed = dram.generators().data
    console.listing(
        listed,
        as_json,
        ("generator", "pixels", "available", "licence", "reason"),
        lambda row: (
            row["id"],
            row.get("resolution"),
            "yes" if row["available"] else "no",
            row.get("licence"),
            row["reason"],
        ),
    )
