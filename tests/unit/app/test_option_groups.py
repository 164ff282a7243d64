"""A command takes options that are written as a dataclass, and typer sees them one by one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from typer.testing import CliRunner

from app.option_groups import grouped


@dataclass(frozen=True)
class Paint:
    colour: Annotated[str, typer.Option(envvar="PAINT_COLOUR", help="Of the paint.")] = "white"
    coats: Annotated[int, typer.Option(min=1)] = 2


@dataclass(frozen=True)
class Ladder:
    height: Annotated[float, typer.Option("--ladder")]


cli = typer.Typer()
done: list[tuple[Path, Paint, bool, Ladder]] = []


@cli.command()
@grouped
def paint(wall: Path, with_what: Paint, dry: bool = False, *, ladder: Ladder) -> None:
    """Paint a wall."""
    done.append((wall, with_what, dry, ladder))


def test_fields_are_options_with_their_defaults_types_and_variables() -> None:
    done.clear()
    ran = CliRunner().invoke(cli, ["house", "--coats", "3", "--ladder", "2.5"], env={"PAINT_COLOUR": "green"})
    assert ran.exit_code == 0, ran.output
    assert CliRunner().invoke(cli, ["shed", "--dry", "--ladder", "1"]).exit_code == 0
    assert done == [
        (Path("house"), Paint("green", 3), False, Ladder(2.5)),
        (Path("shed"), Paint("white", 2), True, Ladder(1.0)),
    ]


def test_a_field_is_checked_and_one_without_a_default_must_be_given() -> None:
    assert "--coats" in CliRunner().invoke(cli, ["house", "--coats", "0", "--ladder", "1"]).output
    assert "--ladder" in CliRunner().invoke(cli, ["house"]).output


def test_help_shows_fields_where_their_group_stands_and_the_commands_own_words() -> None:
    shown = CliRunner().invoke(cli, ["--help"], env={"COLUMNS": "100"}).output
    assert "Paint a wall." in shown
    assert "Of the paint." in shown
    places = [shown.index(name) for name in ("--colour", "--coats", "--dry", "--ladder")]
    assert places == sorted(places)
