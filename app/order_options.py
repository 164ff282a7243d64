"""What commands that make a student are told in the same words: student, preset, parameters, seed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

#: What is made unless told otherwise.
DEFAULT_STUDENT = "mobilenetv4_conv_small_050"

Student = Annotated[
    str | None,
    typer.Option(
        help="What learns; `dram architectures` lists them. "
        f"Left out: the method's own, where it makes one of its teacher, else {DEFAULT_STUDENT}."
    ),
]
Preset = Annotated[str, typer.Option(help="How much time to spend: draft, balanced or best.")]
Param = Annotated[
    list[str] | None,
    typer.Option("--param", metavar="GROUP.NAME=VALUE", help="A parameter of the method; may be repeated."),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def nested_params(given: list[str] | None) -> dict[str, Any]:
    """`distillation.steps=100` and the like as nested values; what is no JSON is taken as text."""
    params: dict[str, Any] = {}
    for item in given or []:
        path, sign, text = item.partition("=")
        group, dot, name = path.partition(".")
        if not (sign and dot and group and name):
            raise typer.BadParameter(f"'{item}' should read GROUP.NAME=VALUE, such as distillation.steps=600")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        params.setdefault(group, {})[name] = value
    return params
