"""Nothing that declares is forgotten by its registry."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import models.methods
from app.security.principal import SCOPES
from models.methods import METHODS
from models.pipeline import Method

METHOD_FILES = sorted(
    path.stem for path in Path(models.methods.__path__[0]).glob("*.py") if path.stem != "__init__"
)


def test_there_are_method_files() -> None:
    assert "kd" in METHOD_FILES


@pytest.mark.parametrize("name", METHOD_FILES)
def test_every_method_file_is_registered_under_its_own_name(name: str) -> None:
    declared = getattr(importlib.import_module(f"models.methods.{name}"), "METHOD", None)
    assert isinstance(declared, Method), f"models/methods/{name}.py declares no METHOD"
    assert METHODS.get(declared.name) is declared, f"add {name}.METHOD to models/methods/__init__.py"
    assert declared.name == name


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_preset_of_a_method_is_valid(method: Method) -> None:
    for preset in ("draft", "balanced", "best", *method.presets):
        method.resolve(preset, {})


def test_the_scopes_of_the_api_are_those_of_the_rules() -> None:
    from typing import get_args

    from app.keys.schemas import Scope

    assert get_args(Scope) == SCOPES
