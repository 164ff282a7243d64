"""The operator's own teachers and generators beside those that come with Dram."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.catalogue import generators
from app.errors import Unavailable
from app.settings import Settings
from app.teachers import service as teachers
from models.generators import GENERATORS
from models.teachers import TEACHERS

TEACHER = """
[[teacher]]
name = "our_vit"
title = "Our ViT"
kind = "timm"
source = "/srv/networks/our_vit"
input_size = 224
parameters = 22056576
embedding_dim = 384
licence = "proprietary"
licence_url = "https://example.org/licence"
"""
GENERATOR = """
[[generator]]
name = "our_diffusion"
title = "Our diffusion model"
kind = "local"
source = "/srv/networks/our_diffusion"
resolution = 256
licence = "proprietary"
licence_url = "https://example.org/licence"
"""


def settings(tmp_path: Path, text: str | None) -> Settings:
    path = tmp_path / "teachers.toml"
    if text is not None:
        path.write_text(text)
    return Settings(home=tmp_path, teachers_file=path)


def test_without_a_file_there_is_what_comes_with_dram(tmp_path: Path) -> None:
    assert teachers.catalogue(Settings(home=tmp_path)) == TEACHERS
    assert generators.catalogue(Settings(home=tmp_path)) == GENERATORS


def test_one_file_adds_teachers_and_generators(tmp_path: Path) -> None:
    both = settings(tmp_path, TEACHER + GENERATOR)
    assert teachers.catalogue(both).keys() == TEACHERS.keys() | {"our_vit"}
    assert teachers.catalogue(both)["our_vit"].embedding_dim == 384
    assert generators.catalogue(both).keys() == GENERATORS.keys() | {"our_diffusion"}
    assert generators.catalogue(both)["our_diffusion"].resolution == 256


def test_what_cannot_be_had_here_is_told_without_its_path(tmp_path: Path) -> None:
    both = settings(tmp_path, TEACHER + GENERATOR)
    teacher = teachers.here([teachers.catalogue(both)["our_vit"]])["our_vit"]
    generator = generators.here([generators.catalogue(both)["our_diffusion"]])["our_diffusion"]
    assert not teacher.available
    assert not generator.available
    assert "/srv" not in teacher.reason + generator.reason


def test_a_change_of_the_file_is_seen(tmp_path: Path) -> None:
    configured = settings(tmp_path, TEACHER)
    assert "our_vit" in teachers.catalogue(configured)
    settings(tmp_path, TEACHER.replace("our_vit", "new_vit"))
    os.utime(tmp_path / "teachers.toml", ns=(1, 1))
    assert "new_vit" in teachers.catalogue(configured)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "cannot be read"),
        ("[[teacher", "no TOML"),
        (b"\xff".decode("latin-1"), "no TOML"),
        ("teacher = 1", "/teacher: Input should be a valid list"),
        (TEACHER.replace("[[teacher]]", "[teacher]"), "/teacher: Input should be a valid list"),
        (TEACHER.replace("input_size = 224", "input_size = 9"), "/teacher/0/input_size: "),
        (
            TEACHER + TEACHER.replace("our_vit", "other").replace("input_size = 224", ""),
            "/teacher/1/input_size: ",
        ),
        (
            TEACHER.replace('source = "/srv/networks/our_vit"', 'source = "owner/name"'),
            "/teacher/0: .* commit",
        ),
        (TEACHER + TEACHER, "teacher's name is used twice"),
        (TEACHER.replace("our_vit", "efficientnet_lite0"), "comes with Dram"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str | None, why: str) -> None:
    with pytest.raises(Unavailable, match=why) as caught:
        teachers.catalogue(settings(tmp_path, text))
    assert "DRAM_TEACHERS_FILE" in caught.value.detail
    assert str(tmp_path) not in caught.value.detail


def test_the_name_of_a_generator_that_comes_with_dram_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="a generator's name is used twice, or is that of one that comes"):
        generators.catalogue(settings(tmp_path, GENERATOR.replace("our_diffusion", "embedded")))


def test_a_fault_among_the_generators_leaves_the_teachers_usable(tmp_path: Path) -> None:
    half = settings(tmp_path, TEACHER + GENERATOR.replace("resolution = 256", ""))
    with pytest.raises(Unavailable, match="/generator/0/resolution: "):
        generators.catalogue(half)
    assert "our_vit" in teachers.catalogue(half)
