"""The operator's own teachers beside the catalogue."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.errors import Unavailable
from app.settings import Settings
from app.teachers import service
from models.teachers import TEACHERS

ENTRY = """
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


def settings(tmp_path: Path, text: str | None) -> Settings:
    path = tmp_path / "teachers.toml"
    if text is not None:
        path.write_text(text)
    return Settings(home=tmp_path, teachers_file=path)


def test_without_a_file_there_is_the_catalogue(tmp_path: Path) -> None:
    assert service.catalogue(Settings(home=tmp_path)) == TEACHERS


def test_the_operators_teachers_are_added(tmp_path: Path) -> None:
    found = service.catalogue(settings(tmp_path, ENTRY))
    assert found.keys() == TEACHERS.keys() | {"our_vit"}
    assert found["our_vit"].embedding_dim == 384
    state = service.here([found["our_vit"]])["our_vit"]
    assert not state.available
    assert "/srv" not in state.reason


def test_a_change_of_the_file_is_seen(tmp_path: Path) -> None:
    configured = settings(tmp_path, ENTRY)
    assert "our_vit" in service.catalogue(configured)
    settings(tmp_path, ENTRY.replace("our_vit", "new_vit"))
    os.utime(tmp_path / "teachers.toml", ns=(1, 1))
    assert "new_vit" in service.catalogue(configured)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "cannot be read"),
        ("[[teacher", "no TOML"),
        (ENTRY.replace("input_size = 224", "input_size = 9"), "/input_size"),
        (ENTRY.replace('source = "/srv/networks/our_vit"', 'source = "owner/name"'), "commit"),
        (ENTRY + ENTRY, "twice"),
        (ENTRY.replace("our_vit", "efficientnet_lite0"), "twice"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str | None, why: str) -> None:
    with pytest.raises(Unavailable, match=why) as caught:
        service.catalogue(settings(tmp_path, text))
    assert "DRAM_TEACHERS_FILE" in caught.value.detail
