"""Options that many commands take, written once: as the fields of a dataclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter, signature
from typing import Any


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer can read it: a parameter that is a dataclass is given as that dataclass's fields.

    Fields have typer's annotations. No two parameters or fields of one command may have the same name.
    """
    asked = signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in asked.parameters.items()
        if is_dataclass(parameter.annotation)
    }
    fields = {name: signature(group, eval_str=True).parameters for name, group in groups.items()}
    flat = [
        each
        for name, parameter in asked.parameters.items()
        for each in (fields[name].values() if name in groups else (parameter,))
    ]

    @wraps(command)
    def flattened(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field: given.pop(field) for field in fields[name]})
        command(**given)

    by_name = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in flat]
    flattened.__signature__ = asked.replace(parameters=by_name)  # type: ignore[attr-defined]
    return flattened
