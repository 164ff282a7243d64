"""Tiny diffusion checkpoints: with random weights, and briefly trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.generators import diffusion
from models.generators.diffusion import Diffusion
from tests import tiny_diffusion


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.write(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="session")
def velocity_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.write(tmp_path_factory.mktemp("velocity"), prediction="v_prediction")


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion.write(tmp_path_factory.mktemp("trained"), steps=150)


@pytest.fixture
def model(random_folder: Path) -> Diffusion:
    return diffusion.load(random_folder)


@pytest.fixture(params=["epsilon", "v_prediction"])
def either_model(request: pytest.FixtureRequest, random_folder: Path, velocity_folder: Path) -> Diffusion:
    """With random weights, predicting noise or velocity."""
    return diffusion.load(random_folder if request.param == "epsilon" else velocity_folder)
