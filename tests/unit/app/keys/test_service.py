"""Keys: made once, kept as digests, refused in every wrong form, cheap to ask for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from app.db import now
from app.errors import Conflict, Invalid, NotFound, Unauthenticated
from app.keys import service
from app.keys.tables import ApiKey
from app.security.principal import Principal, PrincipalCache
from app.settings import Settings
from app.tables import Base
from app.wiring import Wiring


@pytest.fixture
def wiring(tmp_path: Path) -> Iterator[Wiring]:
    wiring = Wiring.build(Settings(home=tmp_path))
    Base.metadata.create_all(wiring.database.engine)
    yield wiring
    wiring.close()


def issue(wiring: Wiring, *scopes: str, tenant: str = "acme", ends_in: float | None = None) -> service.Issued:
    with wiring.database.writing() as session:
        clock = session.scalar(sa.select(now()))
        assert clock is not None
        ends = None if ends_in is None else clock + ends_in
        return service.issue(session, tenant, "a key", list(scopes) or ["admin"], ends)


def who(wiring: Wiring, header: str) -> Principal:
    async def ask() -> Principal:
        return await service.authenticate(wiring, {"authorization": header})

    return asyncio.run(ask())


def refusal(wiring: Wiring, header: str) -> Unauthenticated:
    with pytest.raises(Unauthenticated) as caught:
        who(wiring, header)
    return caught.value


def test_a_key_tells_tenant_and_scopes(wiring: Wiring) -> None:
    issued = issue(wiring, "jobs:read", "jobs:write", tenant="acme")
    caller = who(wiring, f"Bearer {issued.token}")
    assert caller == Principal("acme", frozenset({"jobs:read", "jobs:write"}), issued.key.id)
    assert who(wiring, f"bearer {issued.token}") == caller


def test_the_secret_is_nowhere_in_the_database(wiring: Wiring, tmp_path: Path) -> None:
    token = issue(wiring).token
    secret = token.rpartition("_")[2][:32]
    content = (tmp_path / "dram.db").read_bytes()
    assert token.split("_")[1].encode() in content
    assert secret.encode() not in content
    assert token.encode() not in content


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic abc", "dram_x"])
def test_without_a_key_the_answer_says_how_to_send_one(wiring: Wiring, header: str) -> None:
    refused = refusal(wiring, header)
    assert refused.headers["WWW-Authenticate"] == 'Bearer realm="dram"'
    assert "Authorization: Bearer" in refused.detail


def test_a_mistyped_key_is_refused_without_a_query(wiring: Wiring) -> None:
    token = issue(wiring).token
    wrong = token[:40] + ("a" if token[40] != "a" else "b") + token[41:]
    wiring.database.close()
    Path(wiring.settings.home / "dram.db").unlink()
    for bad in (wrong, token[:-1], token + "0", token.upper(), "dram_" + "é" * 65):
        assert 'error="invalid_token"' in refusal(wiring, f"Bearer {bad}").headers["WWW-Authenticate"]


def test_another_secret_with_a_right_checksum_is_refused(wiring: Wiring) -> None:
    one, other = issue(wiring).token, issue(wiring).token
    body = one[:32] + other[32:-6]
    assert "unknown" in refusal(wiring, f"Bearer {body}{service._checksum(body)}").detail
    stranger = f"dram_{'0' * 26}_{other[32:-6]}"
    assert "unknown" in refusal(wiring, f"Bearer {stranger}{service._checksum(stranger)}").detail


def test_a_known_key_costs_no_query(wiring: Wiring) -> None:
    token = issue(wiring).token

    async def ask_often() -> float:
        await service.authenticate(wiring, {"authorization": f"Bearer {token}"})
        statements: list[str] = []
        sa.event.listen(
            wiring.database.engine, "before_cursor_execute", lambda *told: statements.append(told[2])
        )
        started = time.perf_counter()
        for _ in range(1000):
            await service.authenticate(wiring, {"authorization": f"Bearer {token}"})
        took = time.perf_counter() - started
        assert not [statement for statement in statements if statement.startswith("SELECT")]
        return took / 1000

    assert asyncio.run(ask_often()) < 100e-6


def test_a_revoked_key_is_refused_at_once_in_this_process(wiring: Wiring) -> None:
    admin, issued = issue(wiring), issue(wiring, "jobs:read")
    who(wiring, f"Bearer {issued.token}")
    service.revoke(wiring, who(wiring, f"Bearer {admin.token}"), issued.key.id)
    assert "revoked" in refusal(wiring, f"Bearer {issued.token}").detail


def test_another_process_refuses_a_revoked_key_when_its_memory_ends(
    wiring: Wiring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TRUST_S", 1.5)
    other = Wiring.build(wiring.settings)
    issue(wiring)
    issued = issue(wiring)
    caller = who(other, f"Bearer {issued.token}")
    service.revoke(wiring, caller, issued.key.id)
    assert who(other, f"Bearer {issued.token}") == caller
    time.sleep(1.55)
    assert "revoked" in refusal(other, f"Bearer {issued.token}").detail
    other.close()


def test_a_key_ends_on_time_although_it_is_remembered(wiring: Wiring) -> None:
    issued = issue(wiring, ends_in=1.5)
    who(wiring, f"Bearer {issued.token}")
    time.sleep(1.6)
    assert "expired" in refusal(wiring, f"Bearer {issued.token}").detail


def test_a_key_cannot_end_before_it_begins(wiring: Wiring) -> None:
    with pytest.raises(Invalid, match="past"):
        issue(wiring, ends_in=-1)


def test_unknown_scopes_are_refused_with_the_valid_ones(wiring: Wiring) -> None:
    with pytest.raises(Invalid, match=r"jobs:fly.*datasets:read"):
        issue(wiring, "jobs:fly")


def test_use_is_noted_but_not_each_time(wiring: Wiring) -> None:
    issued = issue(wiring)

    def noted() -> float | None:
        with wiring.database.reading() as session:
            return session.scalar(sa.select(ApiKey.last_used_at))

    who(wiring, f"Bearer {issued.token}")
    until = time.monotonic() + 10
    while noted() is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    first = noted()
    wiring.callers.forget(issued.key.id)
    who(wiring, f"Bearer {issued.token}")
    time.sleep(0.2)
    assert noted() == first


def test_another_tenants_key_does_not_exist(wiring: Wiring) -> None:
    issued = issue(wiring, tenant="acme")
    stranger = Principal("rival", frozenset({"admin"}))
    with wiring.database.reading() as session, pytest.raises(NotFound):
        service.get(session, stranger, issued.key.id)
    with pytest.raises(NotFound):
        service.revoke(wiring, stranger, issued.key.id)
    assert who(wiring, f"Bearer {issued.token}").tenant == "acme"


def test_the_last_key_that_manages_keys_cannot_be_revoked(wiring: Wiring) -> None:
    first = issue(wiring)
    issue(wiring, "jobs:read")
    issue(wiring, tenant="rival")
    caller = who(wiring, f"Bearer {first.token}")
    with pytest.raises(Conflict, match="last key"):
        service.revoke(wiring, caller, first.key.id)
    second = issue(wiring)
    service.revoke(wiring, caller, first.key.id)
    service.revoke(wiring, caller, first.key.id)  # twice is harmless
    with pytest.raises(Conflict):
        service.revoke(wiring, caller, second.key.id)


def test_the_first_key_is_made_once_even_by_many_at_once(wiring: Wiring) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = [token for token in threads.map(lambda _: service.ensure_first_key(wiring), range(8)) if token]
    assert len(made) == 1
    assert who(wiring, f"Bearer {made[0]}").may("anything at all")
    assert service.ensure_first_key(wiring) is None


def test_the_memory_of_callers_is_bounded() -> None:
    memory = PrincipalCache(most=10)
    for number in range(1000):
        memory.remember(str(number).encode(), Principal("t", frozenset()), 60)
    assert len(memory._known) <= 10
    assert memory.recall(b"999") is not None
