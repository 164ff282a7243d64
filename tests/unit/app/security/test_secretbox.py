"""Secrets at rest: who can open them, and how the embedded service comes by its key."""

from __future__ import annotations

import base64
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from app.errors import Unavailable
from app.security.secretbox import KEY_FILE, SecretBox
from app.settings import Settings

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
SECRET = b"Bearer s3cr3t"


def text(key: bytes) -> str:
    return base64.b64encode(key).decode()


def settings(home: Path, key: str = "", database_url: str = "") -> Settings:
    return Settings(home=home, secret_key=SecretStr(key), database_url=database_url)


def test_a_sealed_secret_opens_and_shows_nothing() -> None:
    box = SecretBox([OLD])
    sealed = box.seal(SECRET, "tch_1")
    assert box.open(sealed, "tch_1") == SECRET
    assert box.seal(SECRET, "tch_1") != sealed
    assert SECRET not in base64.b64decode(sealed.removeprefix("v1."))


def test_it_is_aes_gcm_bound_to_the_row() -> None:
    """Opened by the primitive itself."""
    content = base64.b64decode(SecretBox([OLD]).seal(SECRET, "tch_1").removeprefix("v1."))
    assert AESGCM(OLD).decrypt(content[:12], content[12:], b"tch_1") == SECRET


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sealed: sealed[:-5] + ("A" if sealed[-5] != "A" else "B") + sealed[-4:],
        lambda sealed: sealed[:12],
        lambda sealed: "v2." + sealed[3:],
        lambda sealed: "",
        lambda sealed: "v1.!!",
    ],
    ids=["a changed letter", "cut off", "another version", "empty", "no base64"],
)
def test_a_changed_secret_does_not_open(spoil) -> None:
    box = SecretBox([OLD])
    with pytest.raises(Unavailable, match="tch_1") as caught:
        box.open(spoil(box.seal(SECRET, "tch_1")), "tch_1")
    assert caught.value.code == "secret_unreadable"


def test_a_secret_of_one_row_does_not_open_in_another() -> None:
    box = SecretBox([OLD])
    with pytest.raises(Unavailable, match="tch_2"):
        box.open(box.seal(SECRET, "tch_1"), "tch_2")


def test_another_key_does_not_open_it_and_says_what_to_do() -> None:
    sealed = SecretBox([OLD]).seal(SECRET, "tch_1")
    with pytest.raises(Unavailable, match="encrypted with another one") as caught:
        SecretBox([NEW]).open(sealed, "tch_1")
    assert "DRAM_SECRET_KEY" in caught.value.detail


def test_keys_are_rotated_by_putting_a_new_one_in_front(tmp_path: Path) -> None:
    before = SecretBox.sealing(settings(tmp_path, text(OLD))).seal(SECRET, "tch_1")
    rotated = settings(tmp_path, f"{text(NEW)}, {text(OLD)}")
    assert SecretBox.opening(rotated).open(before, "tch_1") == SECRET
    after = SecretBox.sealing(rotated).seal(SECRET, "tch_1")
    assert SecretBox([NEW]).open(after, "tch_1") == SECRET


def test_the_embedded_service_makes_its_own_key_once(tmp_path: Path) -> None:
    home = settings(tmp_path / "home")
    previous = os.umask(0)
    try:
        sealed = SecretBox.sealing(home).seal(SECRET, "tch_1")
    finally:
        os.umask(previous)
    assert SecretBox.opening(home).open(sealed, "tch_1") == SECRET
    assert SecretBox.sealing(home).open(sealed, "tch_1") == SECRET
    (file,) = (tmp_path / "home").iterdir()
    assert (file.name, stat.S_IMODE(file.stat().st_mode)) == (KEY_FILE, 0o600)


def test_processes_that_start_together_agree_on_one_key(tmp_path: Path) -> None:
    def seal(number: int) -> str:
        return SecretBox.sealing(settings(tmp_path)).seal(SECRET, f"tch_{number}")

    with ThreadPoolExecutor(16) as threads:
        sealed = list(threads.map(seal, range(64)))
    box = SecretBox.opening(settings(tmp_path))
    assert {box.open(one, f"tch_{number}") for number, one in enumerate(sealed)} == {SECRET}
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_only_sealing_makes_a_key(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=KEY_FILE) as caught:
        SecretBox.opening(settings(tmp_path))
    assert caught.value.code == "secret_key_missing"
    assert list(tmp_path.iterdir()) == []


def test_a_service_with_a_remote_database_needs_a_key_of_the_operators(tmp_path: Path) -> None:
    remote = settings(tmp_path, database_url="postgresql://db/dram")
    (tmp_path / KEY_FILE).write_text(text(OLD))
    for made in (SecretBox.sealing, SecretBox.opening):
        with pytest.raises(Unavailable, match="DRAM_SECRET_KEY") as caught:
            made(remote)
        assert caught.value.code == "secret_key_missing"
    given = settings(tmp_path, text(NEW), "postgresql://db/dram")
    assert SecretBox.opening(given).open(SecretBox.sealing(given).seal(SECRET, "t"), "t") == SECRET


@pytest.mark.parametrize("wrong", ["short", "not base64!", text(bytes(16)), f"{text(OLD)},zz"])
def test_a_wrong_key_is_refused_without_repeating_it(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(Unavailable, match="32 bytes in base64") as caught:
        SecretBox.sealing(settings(tmp_path, wrong))
    assert wrong not in caught.value.detail
    assert text(OLD) not in repr(settings(tmp_path, text(OLD)))
