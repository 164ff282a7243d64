"""A child ends with its parent, also where the parent is gone before the child can ask for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from app.processes import dying_with
from tests.conftest import eventually

PARENT = """
import os, subprocess, time
from app.processes import dying_with
child = subprocess.Popen(["sleep", "60"], start_new_session=True, preexec_fn=dying_with(os.getpid()))
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_is_killed_when_its_parent_is() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.name() == "sleep"
        parent.send_signal(signal.SIGKILL)
    eventually(
        lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the child's end", 30
    )


@pytest.mark.parametrize(("other", "status"), [(0, 0), (1, 1)])
def test_a_child_whose_parent_is_already_another_does_not_start(other: int, status: int) -> None:
    starting = dying_with(os.getpid() + other)
    assert subprocess.run(["true"], preexec_fn=starting, check=False).returncode == status
