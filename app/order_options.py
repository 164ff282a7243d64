"""What commands that make a student are told in the same words; `submit` and `distill` are told all of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import typer

#: What is made unless told otherwise.
DEFAULT_STUDENT = "mobilenetv4_conv_small_050"

Teacher = Annotated[
    str | None,
    typer.Option(
        help="Who teaches; `dram teachers` lists them. Left out: the first that the method can learn from."
    ),
]
Student = Annotated[
    str | None,
    typer.Option(
        help="What learns; `dram architectures` lists them. "
        f"Left out: the method's own, where it makes one of its teacher, else {DEFAULT_STUDENT}."
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="How; `dram methods` lists them. Left out: kd, fsbbt with a black box of your own, or the one for masks."
    ),
]
Generator = Annotated[
    str | None,
    typer.Option(
        help="What makes images, for tint and fsbbt (maker diffusion); see `dram generators`. Left out: embedded."
    ),
]
Preset = Annotated[str, typer.Option(help="How much time to spend: draft, balanced or best.")]
Param = Annotated[
    list[str] | None,
    typer.Option("--param", metavar="GROUP.NAME=VALUE", help="A parameter of the method; may be repeated."),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Precision = Annotated[str, typer.Option(help="fp32, or int8 for a quantised file beside it.")]
QueryBudget = Annotated[
    int | None, typer.Option(min=0, help="Most questions that a black-box teacher may be asked.")
]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="KEY=VALUE", help="A label of your own on the job; may be repeated."),
]
CancelAfter = Annotated[
    float | None,
    typer.Option(min=1, metavar="SECONDS", help="Cancel the job when it has not ended after this time."),
]


@dataclass(frozen=True)
class OrderOptions:
    """What is told of a job beside its images; see `app.option_groups`."""

    teacher: Teacher = None
    student: Student = None
    method: Method = None
    generator: Generator = None
    preset: Preset = "balanced"
    param: Param = None
    seed: Seed = 0
    precision: Precision = "fp32"
    query_budget: QueryBudget = None
    metadata: Metadata = None
    cancel_after: CancelAfter = None

    def order(self) -> dict[str, Any]:
        """As the client takes it; None is what was left out. Raises typer.BadParameter."""
        return {
            "teacher_id": self.teacher,
            "student": self.student,
            "method": self.method,
            "generator_id": self.generator,
            "preset": self.preset,
            "params": nested_params(self.param),
            "seed": self.seed,
            "precision": self.precision,
            "query_budget": self.query_budget,
            "metadata": _labels(self.metadata),
            "cancel_after_s": self.cancel_after,
        }


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


def _labels(given: list[str] | None) -> dict[str, str]:
    labels = {}
    for item in given or []:
        key, sign, value = item.partition("=")
        if not (sign and key):
            raise typer.BadParameter(f"'{item}' should read KEY=VALUE, such as project=herbarium")
        if key in labels:
            raise typer.BadParameter(f"--metadata gives '{key}' twice")
        labels[key] = value
    return labels
