"""Names of hostile uploads."""

from __future__ import annotations

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.datasets import paths

STEPS = st.text(st.sampled_from("ab./\\\0:é ~"), max_size=12)


@given(STEPS)
@example("a/../../b")
@example("a/./b")
@example("..")
def test_a_path_without_danger_stays_inside_its_folder(path: str) -> None:
    if paths.danger(path) is None:
        inside = os.path.normpath(os.path.join("/root", path))  # noqa: PTH118 - the reference is os.path
        assert inside == "/root/" + path.removesuffix("/")


@given(st.text(max_size=30), st.text(max_size=5))
def test_names_with_one_key_are_one_name_to_the_eye(name: str, spaces: str) -> None:
    kept = paths.class_name(name)
    assert paths.class_name(kept) == kept
    assert paths.class_key(kept) == paths.class_key(name)
    assert paths.class_key(f" {name}  ") == paths.class_key(name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Washer", "washer"),
        ("a  b", "a b"),
        ("caf\u00e9", "cafe\u0301"),
        ("STRASSE", "straße"),
        (" a", "a\t"),
    ],
)
def test_spellings_of_one_class_have_one_key(one: str, other: str) -> None:
    assert paths.class_key(one) == paths.class_key(other)


def test_different_classes_have_different_keys() -> None:
    names = ["cat", "cats", "c at", "kat", "cât"]
    assert len({paths.class_key(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "path", [".DS_Store", "a/.hidden/b.jpg", "__MACOSX/a/._b.jpg", "a/Thumbs.db", "a/DESKTOP.INI"]
)
def test_litter_is_known(path: str) -> None:
    assert paths.is_litter(path)


@pytest.mark.parametrize("path", ["a/b.jpg", "a/b.hidden.jpg", "thumbs/db.jpg"])
def test_images_are_no_litter(path: str) -> None:
    assert not paths.is_litter(path)
