"""Uploads that must not be read to their end: without a key, too large, too slow, cut off, no room to store them."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image

from app.datasets.tables import Dataset, DatasetImage
from app.datasets.workspace import Workspace
from app.settings import Settings
from app.wiring import Wiring

if TYPE_CHECKING:
    from tests.conftest import Gateway

GatewayWith = Callable[..., AbstractContextManager["Gateway"]]


@pytest.fixture(params=["sqlite"])
def database_url(tmp_path: Path, sqlite_template: Path) -> str:
    """One database is enough here: nothing is ever written to it."""
    (tmp_path / "dram.db").write_bytes(sqlite_template.read_bytes())
    return f"sqlite:///{tmp_path / 'dram.db'}"


def noise(seed: int) -> bytes:
    """A JPEG of 100 x 100 pixels that grows eightfold when it is kept without loss."""
    encoded = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (100, 100, 3), np.uint8)
    Image.fromarray(pixels).save(encoded, "JPEG", quality=20)
    return encoded.getvalue()


def archive(unlabelled: int = 0) -> bytes:
    """Two classes of two images, and so many unlabelled ones."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as target:
        for seed in range(4):
            target.writestr(f"class{seed % 2}/{seed}.jpg", noise(seed))
        for seed in range(unlabelled):
            target.writestr(f"unlabelled/{seed}.jpg", noise(10 + seed))
    return packed.getvalue()


def left_behind(wiring: Wiring) -> list[str]:
    """Rows of data sets, files of the blob store and temporary files and folders."""
    with wiring.database.reading() as session:
        rows = [
            f"row {row}" for table in (Dataset, DatasetImage) for row in session.scalars(sa.select(table.id))
        ]
    files = [str(path) for path in sorted(wiring.settings.home.rglob("*")) if path.is_file()]
    return rows + files + [str(folder) for folder in folders_left(wiring)]


def folders_left(wiring: Wiring) -> list[Path]:
    root = wiring.settings.home / "tmp"
    return list(root.iterdir()) if root.exists() else []


def eventually(true: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until, f"not within 20 s: {what}"
        time.sleep(0.01)


def send(client: httpx.Client, content: bytes) -> httpx.Response:
    return client.post("/v1/datasets", files={"archive": ("pets.zip", content)})


def assert_problem(response: httpx.Response, status: int, code: str, mend: str) -> None:
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["request_id"]
    assert mend in problem["detail"]


@contextmanager
def begun_upload(gateway: Gateway, key: str | None, head: str, body: bytes) -> Iterator[socket.socket]:
    """A connection that has sent the head and a piece of the body, and no more."""
    port = int(gateway.url.rpartition(":")[2])
    credentials = f"Authorization: Bearer {key}\r\n" if key else ""
    request = f"POST /v1/datasets HTTP/1.1\r\nHost: dram\r\n{credentials}Content-Type: application/zip\r\n{head}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request.encode() + body)
        yield connection


def answer_of(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and problem of an answer, read until the server closes."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head.lower()
    return int(head.split()[1]), json.loads(body)


def refuses(connection: socket.socket, piece: bytes) -> bool:
    """True once the other side has closed the connection."""
    try:
        connection.sendall(piece)
    except OSError:
        return True
    return False


def spooled(wiring: Wiring) -> int:
    return sum(path.stat().st_size for path in (wiring.settings.home / "tmp").rglob("received"))


class TestCutInTheMiddle:
    def test_leaves_nothing(self, gateway: Gateway, wiring: Wiring) -> None:
        before = left_behind(wiring)
        with begun_upload(
            gateway, gateway.key, "Content-Length: 4000000\r\n", b"PK\x03\x04" + bytes(2 * 2**20)
        ):
            eventually(lambda: spooled(wiring) > 2**20, "the first half on disk")
        eventually(lambda: left_behind(wiring) == before, "nothing left")

    def test_leaves_a_gateway_that_answers(self, gateway: Gateway, client: httpx.Client) -> None:
        with begun_upload(gateway, gateway.key, "Content-Length: 4000000\r\n", b"PK\x03\x04"):
            pass
        assert send(client, archive()).status_code == 201


class TestBeforeTheBody:
    def test_without_a_key_nothing_is_read_or_written(self, gateway: Gateway, wiring: Wiring) -> None:
        with begun_upload(gateway, None, "Content-Length: 400000000\r\n", b"") as connection:
            status, problem = answer_of(connection)
        assert (status, problem["code"]) == (401, "unauthenticated")
        assert not (wiring.settings.home / "tmp").exists()

    def test_without_a_key_an_endless_body_is_cut_off(self, gateway: Gateway, wiring: Wiring) -> None:
        with begun_upload(gateway, None, "Transfer-Encoding: chunked\r\n", b"") as connection:
            eventually(
                lambda: refuses(connection, b"10000\r\n" + bytes(65536) + b"\r\n"), "the connection closed"
            )
        assert not (wiring.settings.home / "tmp").exists()

    def test_a_client_that_sends_all_before_it_reads_gets_the_answer(self, gateway: Gateway) -> None:
        with begun_upload(gateway, None, "Content-Length: 12000000\r\n", bytes(12_000_000)) as connection:
            status, _ = answer_of(connection)
        assert status == 401

    def test_a_key_without_the_scope_writes_nothing(self, gateway: Gateway, wiring: Wiring) -> None:
        reader = gateway.key_of("default", "datasets:read")
        with begun_upload(gateway, reader, "Content-Length: 400000000\r\n", b"PK") as connection:
            status, problem = answer_of(connection)
        assert (status, problem["code"]) == (403, "forbidden")
        assert not (wiring.settings.home / "tmp").exists()

    def test_a_declared_size_over_the_cap_is_refused_at_once(self, gateway: Gateway, wiring: Wiring) -> None:
        head = f"Content-Length: {wiring.settings.max_upload_bytes + 1}\r\n"
        with begun_upload(gateway, gateway.key, head, b"PK\x03\x04") as connection:
            status, problem = answer_of(connection)
        assert (status, problem["code"]) == (413, "too_large")
        assert "512.0 MiB" in problem["detail"]
        assert not (wiring.settings.home / "tmp").exists()

    def test_no_room_beside_the_reserve_is_told(self, gateway_with: GatewayWith) -> None:
        with gateway_with(disk_reserve_bytes=2**60) as gateway, gateway.client(gateway.key) as client:
            before = left_behind(gateway.wiring)
            assert_problem(send(client, archive()), 507, "insufficient_storage", "try a smaller upload")
            assert left_behind(gateway.wiring) == before

    def test_other_routes_take_small_bodies_only(self, client: httpx.Client) -> None:
        as_json = {"Content-Type": "application/json"}
        answer = client.post("/v1/jobs", content=b" " * (2**20 + 1), headers=as_json)
        assert_problem(answer, 413, "too_large", "1.0 MiB")
        answer = client.post("/v1/jobs", content=iter([b" " * 2**19] * 3), headers=as_json)
        assert_problem(answer, 413, "too_large", "1.0 MiB")


def test_a_body_without_a_length_is_cut_off_at_the_cap(gateway_with: GatewayWith) -> None:
    with gateway_with(max_upload_bytes=3 * 2**20) as gateway, gateway.client(gateway.key) as client:
        before = left_behind(gateway.wiring)
        pieces = iter([b"PK\x03\x04" + bytes(2**16)] * 100)
        answer = client.post("/v1/datasets", content=pieces, headers={"Content-Type": "application/zip"})
        assert_problem(answer, 413, "too_large", "3.0 MiB")
        assert left_behind(gateway.wiring) == before


def test_an_upload_that_stalls_is_ended_at_the_deadline(gateway_with: GatewayWith) -> None:
    with gateway_with(upload_deadline_s=0.5) as gateway:
        before = left_behind(gateway.wiring)
        with begun_upload(gateway, gateway.key, "Content-Length: 1000\r\n", b"PK\x03\x04") as connection:
            status, problem = answer_of(connection)
        assert (status, problem["code"]) == (408, "request_timeout")
        assert "within 0.5 s" in problem["detail"]
        assert left_behind(gateway.wiring) == before


class TestDiskFull:
    """Simulated where the second blob is stored; real elsewhere: the kernel ends every file at 1 MiB."""

    def test_while_blobs_are_stored(
        self, client: httpx.Client, wiring: Wiring, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put = wiring.blobs.put
        stored: list[str] = []

        def fill(path: Path) -> str:
            if stored:
                raise OSError(errno.ENOSPC, "No space left on device")
            stored.append(put(path))
            return stored[0]

        monkeypatch.setattr(wiring.blobs, "put", fill)
        before = left_behind(wiring)
        answer = send(client, archive(unlabelled=1))
        assert_problem(answer, 507, "insufficient_storage", "when the operator has made room")
        assert len(stored) == 1
        assert left_behind(wiring) == before

    @pytest.mark.parametrize(("unlabelled", "stage"), [(50, "decoded"), (500, "received")])
    def test_while_the_upload_is(
        self, unlabelled: int, stage: str, client: httpx.Client, wiring: Wiring
    ) -> None:
        content = archive(unlabelled)
        assert (len(content) > 2**20) == (stage == "received")
        before = left_behind(wiring)
        with files_of_at_most(2**20):
            answer = send(client, content)
        assert_problem(answer, 507, "insufficient_storage", "when the operator has made room")
        assert left_behind(wiring) == before
        assert send(client, content).status_code == 201


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_that_cannot_be_written_take_the_blobs_with_them(client: httpx.Client, wiring: Wiring) -> None:
    with wiring.database.writing() as session:
        session.execute(
            sa.text(
                "CREATE TRIGGER refuse BEFORE INSERT ON dataset_images BEGIN SELECT RAISE(ABORT, 'no'); END"
            )
        )
    before = left_behind(wiring)
    answer = send(client, archive())
    assert answer.status_code >= 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert left_behind(wiring) == before


def test_what_a_killed_gateway_left_goes_at_the_next_start(
    settings: Settings, gateway_with: GatewayWith
) -> None:
    program = (
        "import os, signal\nfrom app.datasets.workspace import Workspace\nfrom app.settings import Settings\n"
        "folder = Workspace.create(Settings()).folder\n(folder / 'received').write_bytes(b'x')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "DRAM_HOME": str(settings.home)}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    alive = Workspace.create(settings)
    assert len(list((settings.home / "tmp").glob("*/received"))) == 1
    with gateway_with() as gateway:
        assert folders_left(gateway.wiring) == [alive.folder]
    alive.remove()
