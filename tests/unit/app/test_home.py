"""The folder of an embedded service: who runs in it, and where."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.home import AlreadyRunning, Home, Running


def test_who_holds_the_folder_says_where_it_is_and_keeps_others_out(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert home.running() is None
    with home.claimed() as claim:
        assert home.running() == Running(os.getpid(), "")
        claim.announce("http://127.0.0.1:1")
        assert home.running() == Running(os.getpid(), "http://127.0.0.1:1")
        with pytest.raises(AlreadyRunning, match=r"at http://127\.0\.0\.1:1"), home.claimed():
            pass
    assert home.running() is None


def test_the_address_that_a_killed_service_left_is_not_taken_for_that_of_the_next(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    lock = tmp_path / "up.lock"
    lock.write_text(json.dumps({"pid": killed.pid, "url": "http://127.0.0.1:1"}))
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as the next one does before it writes
        assert Home(tmp_path).running() == Running(0, "")
    assert Home(tmp_path).running() is None
