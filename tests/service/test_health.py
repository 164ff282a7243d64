"""Liveness and readiness, with each part really taken away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import sqlalchemy as sa

from app import health, ids
from app.db import now
from app.jobs.tables import Worker
from app.settings import Settings
from app.wiring import Wiring

if TYPE_CHECKING:
    from tests.conftest import Postgres


@pytest.fixture(autouse=True)
def _check_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MEMORY_S", 0.0)


def worker_seen(wiring: Wiring, seconds_ago: float) -> None:
    with wiring.database.writing() as session:
        session.add(Worker(id=ids.new("wrk"), queues=["gpu"], device="cpu", seen_at=now() - seconds_ago))


def failing(client: httpx.Client) -> dict[str, str]:
    answer = client.get("/readyz")
    checks = answer.json()["checks"]
    wrong = {name: check["reason"] for name, check in checks.items() if not check["ok"]}
    assert checks.keys() == {"database", "schema", "redis", "storage", "worker"}
    assert answer.status_code == (503 if wrong else 200)
    assert answer.json()["status"] == ("not_ready" if wrong else "ready")
    return wrong


def test_the_process_is_alive_whatever_else_is_missing(anonymous: httpx.Client) -> None:
    assert anonymous.get("/healthz").json() == {"status": "ok"}


def test_ready_when_all_parts_are_there(anonymous: httpx.Client, wiring: Wiring) -> None:
    worker_seen(wiring, seconds_ago=1)
    assert failing(anonymous) == {}


def test_a_worker_that_was_not_seen_for_a_minute_is_missed(anonymous: httpx.Client, wiring: Wiring) -> None:
    assert failing(anonymous).keys() == {"worker"}
    worker_seen(wiring, seconds_ago=61)
    assert failing(anonymous).keys() == {"worker"}
    worker_seen(wiring, seconds_ago=50)
    assert failing(anonymous) == {}


def test_a_schema_that_is_behind_says_what_to_run(anonymous: httpx.Client, wiring: Wiring) -> None:
    worker_seen(wiring, seconds_ago=1)
    with wiring.database.writing() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '0000'"))
    wrong = failing(anonymous)
    assert wrong.keys() == {"schema"}
    assert "python -m app.migrate" in wrong["schema"]


def test_storage_that_cannot_be_written_is_named(anonymous: httpx.Client, wiring: Wiring) -> None:
    worker_seen(wiring, seconds_ago=1)
    folder = wiring.settings.home / "blobs" / "tmp"
    folder.rmdir()
    assert failing(anonymous).keys() == {"storage"}
    folder.mkdir()
    assert failing(anonymous) == {}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_redis_that_is_away_is_named_but_not_located(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "nowhere.sock"
    wiring = Wiring.build(
        Settings(home=tmp_path, database_url=database_url, redis_url=f"redis+socket://{missing}")
    )
    worker_seen(wiring, seconds_ago=1)
    answer = health.Readiness(wiring).answer()
    assert [name for name, check in answer.checks.items() if not check.ok] == ["redis"]
    assert str(tmp_path) not in answer.model_dump_json()
    wiring.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_part_that_hangs_does_not_hang_the_answer(wiring: Wiring, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    import time

    monkeypatch.setattr(health, "CHECK_S", 0.3)
    released = threading.Event()
    monkeypatch.setattr(wiring.blobs, "check", released.wait)
    started = time.monotonic()
    answer = health.Readiness(wiring).answer()
    released.set()
    assert time.monotonic() - started < 2
    assert not answer.checks["storage"].ok
    assert answer.checks["database"].ok


def test_metrics_are_for_prometheus(anonymous: httpx.Client, wiring: Wiring) -> None:
    worker_seen(wiring, seconds_ago=1)
    anonymous.get("/healthz")
    answer = anonymous.get("/metrics")
    assert "dram_workers 1.0" in answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'dram_http_requests_total{method="GET",route="/healthz",status="200"} 1.0' in answer.text


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_without_its_database_the_gateway_answers_503_and_comes_back(
    client: httpx.Client, anonymous: httpx.Client, database_url: str, postgres: Postgres
) -> None:
    assert client.get("/v1/students").status_code == 200
    name = database_url.partition("@/")[2].partition("?")[0]
    postgres.rename(name, f"{name}_away")
    answer = client.get("/v1/students")
    assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert name not in answer.text
    assert {"database", "schema", "worker"} <= failing(anonymous).keys()
    assert "dram_http_requests_total" in anonymous.get("/metrics").text
    postgres.rename(f"{name}_away", name)
    assert client.get("/v1/students").status_code == 200
