"""API keys: `dram_<key id>_<secret><crc>`.

The id finds the row, the secret (190 random bits) is kept as a sha-256 digest only, and the checksum lets a
mistyped key be refused, and a leaked one be found by scanners, without a query. A fast digest is right here:
slow ones protect what people invent, not what a machine drew.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from app import ids, paging
from app.db import Database, now, owned, read_clock
from app.errors import Conflict, Invalid, NotFound, Unauthenticated
from app.keys.tables import ApiKey
from app.security.principal import SCOPES, Principal
from app.wiring import Wiring

log = structlog.get_logger()

#: The tenant of the embedded default.
FIRST_TENANT = "default"
#: How long a process trusts what it knows of a key: a revoked key is refused everywhere after this.
TRUST_S = 5.0
#: `last_used_at` is written at most this often.
USE_NOTED_S = 60.0

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TOKEN = re.compile(r"dram_([0-9a-z]{26})_([0-9A-Za-z]{32})([0-9A-Za-z]{6})")
_NO_ONE = hashlib.sha256(b"no key has this id").hexdigest()


@dataclass(frozen=True)
class Issued:
    """A new key. The token is shown once and can never be had again."""

    key: ApiKey
    token: str


async def authenticate(wiring: Wiring, headers: Mapping[str, str]) -> Principal:
    """Who calls with these headers. Raises `Unauthenticated`, which says how to send a key."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise _refused("No API key was sent. Send one as 'Authorization: Bearer dram_…'.", None)
    digest = hashlib.sha256(token.encode()).digest()
    known = wiring.callers.recall(digest)
    if known is not None:
        return known
    key_id, secret = _parsed(token)
    key, seconds, unnoted = await asyncio.to_thread(_look_up, wiring.database, key_id, secret)
    principal = Principal(key.tenant, frozenset(key.scopes), key.id)
    wiring.callers.remember(digest, principal, seconds)
    if unnoted:
        asyncio.get_running_loop().run_in_executor(None, _note_use, wiring.database, key.id)
    return principal


def issue(
    session: Session, tenant: str, name: str, scopes: list[str], expires_at: float | None = None
) -> Issued:
    """Make a key. Part of a write unit."""
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        wrong = f"Unknown scope: {', '.join(unknown)}" if unknown else "A key needs a scope"
        raise Invalid(f"{wrong}. The scopes are: {', '.join(SCOPES)}.", code="unknown_scope")
    key_id = ids.new("key")
    secret = "".join(secrets.choice(_BASE62) for _ in range(32))
    body = f"dram_{key_id.removeprefix('key_')}_{secret}"
    key = ApiKey(
        id=key_id,
        tenant=tenant,
        name=name,
        secret_digest=_digest(secret),
        scopes=sorted(set(scopes)),
        expires_at=expires_at,
        revoked_at=None,
        last_used_at=None,
    )
    session.add(key)
    session.flush()
    if expires_at is not None and expires_at <= key.created_at:
        raise Invalid("expires_at lies in the past. Give a moment to come, or leave it out.", code="expired")
    return Issued(key, body + _checksum(body))


def ensure_first_key(wiring: Wiring) -> str | None:
    """Make the embedded default's admin key if there is no key at all, and return it; None afterwards."""
    with wiring.database.writing() as session:
        if not wiring.database.sqlite:  # SQLite's write unit holds the only write lock already
            session.execute(sa.text("LOCK TABLE api_keys IN SHARE ROW EXCLUSIVE MODE"))
        if session.scalar(sa.select(ApiKey.id).limit(1)) is not None:
            return None
        return issue(session, FIRST_TENANT, "first key", ["admin"]).token


def page(session: Session, principal: Principal, limit: int, after: str | None) -> tuple[list[ApiKey], bool]:
    return paging.newest(session, owned(ApiKey, principal), ApiKey.id, limit=limit, after=after)


def get(session: Session, principal: Principal, key_id: str) -> ApiKey:
    key = session.scalar(owned(ApiKey, principal).where(ApiKey.id == key_id))
    if key is None:
        raise NotFound(f"There is no key '{key_id[:64]}'. GET /v1/keys lists yours.")
    return key


def revoke(wiring: Wiring, principal: Principal, key_id: str) -> None:
    """Refuse this key from now on; other processes follow within `TRUST_S`. Twice is harmless."""
    with wiring.database.writing() as session:
        key = get(session, principal, key_id)
        if key.revoked_at is None:
            if "admin" in key.scopes and not _other_admin(session, principal, key_id):
                raise Conflict(
                    "This is the last key that may manage keys. Make another one with the scope 'admin' first.",
                    code="last_admin_key",
                )
            key.revoked_at = read_clock(session)
    wiring.callers.forget(key_id)


def _other_admin(session: Session, principal: Principal, key_id: str) -> bool:
    live = owned(ApiKey, principal).where(
        ApiKey.id != key_id,
        ApiKey.revoked_at.is_(None),
        sa.or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now()),
    )
    return any("admin" in key.scopes for key in session.scalars(live))


def _look_up(database: Database, key_id: str, secret: str) -> tuple[ApiKey, float, bool]:
    """The live key, for how many seconds to trust it, and whether its use should be noted."""
    with database.reading() as session:
        row = session.execute(sa.select(ApiKey, now()).where(ApiKey.id == key_id)).first()
    key, clock = row if row is not None else (None, 0.0)
    right = hmac.compare_digest(_digest(secret), key.secret_digest if key else _NO_ONE)
    if key is None or not right:
        raise _refused(
            "This API key is unknown. Check that it was copied whole, or ask for another.", "invalid_token"
        )
    if key.revoked_at is not None:
        raise _refused("This API key was revoked. Ask an administrator for another.", "invalid_token")
    left = TRUST_S if key.expires_at is None else min(TRUST_S, key.expires_at - clock)
    if left <= 0:
        raise _refused("This API key has expired. Ask an administrator for another.", "invalid_token")
    return key, left, key.last_used_at is None or clock - key.last_used_at > USE_NOTED_S


def _note_use(database: Database, key_id: str) -> None:
    """A courtesy, so a failure is no reason to refuse a request."""
    try:
        with database.writing() as session:
            session.execute(sa.update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=now()))
    except sa.exc.SQLAlchemyError as error:
        log.warning("key_use_not_noted", key=key_id, error=str(error))


def _parsed(token: str) -> tuple[str, str]:
    match = _TOKEN.fullmatch(token)
    if match is None or _checksum(token[:-6]) != match[3]:
        raise _refused(
            "This is no whole API key of this service: it should read dram_… and have 70 characters.",
            "invalid_token",
        )
    return f"key_{match[1]}", match[2]


def _refused(detail: str, error: str | None) -> Unauthenticated:
    challenge = 'Bearer realm="dram"' + (f', error="{error}"' if error else "")
    return Unauthenticated(detail, headers={"WWW-Authenticate": challenge})


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _checksum(body: str) -> str:
    number: Any = zlib.crc32(body.encode())
    digits = ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        digits = _BASE62[digit] + digits
    return digits
