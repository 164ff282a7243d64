"""Secrets at rest: sealed with a key that lies outside the database, and bound to the row that they belong to.

AES-256-GCM with a random nonce of 96 bits (NIST SP 800-38D). A sealed secret reads `v1.` and the base64 of nonce and
ciphertext; the row's id is authenticated with it, so that a sealed secret copied to another row does not open there.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.errors import Unavailable
from app.settings import Settings

KEY_BYTES = 32
#: The embedded service's own key, below its home.
KEY_FILE = "secret.key"
_NONCE_BYTES = 12
_VERSION = "v1."


class SecretBox:
    """Seals with the first key, opens with any: so a new key goes in front while the old one still opens."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._ciphers = [AESGCM(key) for key in keys]

    @classmethod
    def sealing(cls, settings: Settings) -> Self:
        """Of this service; makes the embedded service's key where there is none. Raises `Unavailable`."""
        keys = _given(settings)
        if not keys and not _embedded(settings):
            raise Unavailable(
                "This service has no key to encrypt secrets with, so it keeps none. The operator gives gateway and "
                "workers the same DRAM_SECRET_KEY: 32 random bytes in base64, as `openssl rand -base64 32` prints.",
                code="secret_key_missing",
            )
        return cls(keys or [_decoded(_made(settings.home / KEY_FILE), KEY_FILE)])

    @classmethod
    def opening(cls, settings: Settings) -> Self:
        """Of this service. Raises `Unavailable` where it has no key."""
        keys = _given(settings)
        path = settings.home / KEY_FILE
        if not keys and _embedded(settings) and path.exists():
            keys = [_decoded(path.read_text(), KEY_FILE)]
        if not keys:
            raise Unavailable(
                "A secret is stored here, but the key that it was encrypted with is not: neither DRAM_SECRET_KEY is "
                f"set nor is there the file '{KEY_FILE}' in DRAM_HOME. Gateway and workers need the same key.",
                code="secret_key_missing",
            )
        return cls(keys)

    def seal(self, plain: bytes, row: str) -> str:
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._ciphers[0].encrypt(nonce, plain, row.encode())
        return _VERSION + base64.b64encode(sealed).decode()

    def open(self, sealed: str, row: str) -> bytes:
        """Raises `Unavailable` where no key here fits, or the secret was changed or belongs to another row."""
        content = _bytes(sealed.removeprefix(_VERSION)) if sealed.startswith(_VERSION) else b""
        nonce, ciphertext = content[:_NONCE_BYTES], content[_NONCE_BYTES:]
        for cipher in self._ciphers if len(nonce) == _NONCE_BYTES else ():
            try:
                return cipher.decrypt(nonce, ciphertext, row.encode())
            except InvalidTag:
                continue
        raise Unavailable(
            f"The secret stored for '{row}' cannot be opened with this service's key (DRAM_SECRET_KEY, or the file "
            f"'{KEY_FILE}' in DRAM_HOME): it was encrypted with another one. Give that key too, after a comma, or "
            "store the secret again.",
            code="secret_unreadable",
        )


def _given(settings: Settings) -> list[bytes]:
    """The keys of DRAM_SECRET_KEY, the newest first."""
    texts = [text.strip() for text in settings.secret_key.get_secret_value().split(",")]
    return [_decoded(text, "DRAM_SECRET_KEY") for text in texts if text]


def _embedded(settings: Settings) -> bool:
    """True where all that shares the database shares the home folder too."""
    return settings.database.startswith("sqlite")


def _decoded(text: str, where: str) -> bytes:
    key = _bytes(text.strip())
    if len(key) != KEY_BYTES:
        raise Unavailable(
            f"{where} holds a key that is not {KEY_BYTES} bytes in base64. `openssl rand -base64 32` prints one.",
            code="secret_key_wrong",
        )
    return key


def _bytes(text: str) -> bytes:
    """What the base64 text says; empty where it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""


def _made(path: Path) -> str:
    """The key in the file, which is made where it is missing: whole or not at all, and its owner's only."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(base64.b64encode(os.urandom(KEY_BYTES)) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            _publish(temporary, path)
        finally:
            temporary.unlink()
    return path.read_text()


def _publish(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(
            temporary
        )  # not a rename: another process may have made its key meanwhile, and used it
    except FileExistsError:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
