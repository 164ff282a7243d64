"""The parent's side of the compute process: children that answer, die, babble and leave others behind."""

from __future__ import annotations

import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from app.jobs.claims import Claim
from app.settings import HANDED_ON, Settings
from app.storage import LocalStore
from tests.conftest import eventually
from workers import runner
from workers.runner import ComputeProcess, Died, Done, Failed, Kept, Message, Moved

#: Answers like the real child, but at once: imports no torch.
CHILD = """
import json, os, subprocess, sys, time
def say(kind, **members):
    sys.stdout.write(json.dumps({"kind": kind, **members}) + "\\n"); sys.stdout.flush()
for line in sys.stdin:
    claim = json.loads(line)
    match claim["stage"]:
        case "work":
            say("moved", step=1, total=2, metrics={"loss": 0.5})
            say("kept", step=1, files={"state": "d1"})
            say("done", files={"f": claim["shard_id"]}, bytes=3, facts=None)
        case "fail":
            say("failed", code="data_unusable", detail="broken", hint="mend it", retryable=False)
        case "leave":
            sys.exit(3)
        case "in pieces":
            text = json.dumps({"kind": "done", "files": {"f": "x" * 200000}, "bytes": 3, "facts": None}) + "\\n"
            for part in (text[:10], text[10:]):
                sys.stdout.write(part); sys.stdout.flush(); time.sleep(0.2)
        case "half a word":
            sys.stdout.write('{"kind": "do'); sys.stdout.flush(); os._exit(4)
        case "leave a child":
            child = subprocess.Popen(["sleep", "60"])
            say("moved", step=child.pid, total=0, metrics={})
            if claim["shard"]:
                os._exit(5)
        case "look around":
            with open("/proc/self/environ") as file:
                environ = dict(line.partition("=")[::2] for line in file.read().split("\\0"))
            say("done", files={"arguments": " ".join(sys.argv), **environ}, bytes=0, facts=None)
        case "deaf":
            os.close(0); time.sleep(2); os._exit(6)
        case "sleep":
            time.sleep(60)
"""


def claim(stage: str, shard: int = 0, method: str = "toy") -> Claim:
    return Claim(
        shard_id=f"shd_{stage}", job_id="job_1", epoch=1, attempt=1, method=method, stage=stage, output="o",
        params={}, shape={"classes": 2, "support": 4, "smallest_class": 2}, seed=0, shard=shard, shards=1, inputs={},
        checkpoint=None,
    )  # fmt: skip


def next_message(process: ComputeProcess, seconds: float = 30) -> Message:
    until = time.monotonic() + seconds
    while (message := process.message(0.1)) is None:
        assert time.monotonic() < until, "the child says nothing"
    return message


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


Started = Callable[[str], ComputeProcess]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """A compute process whose child runs that program instead of `workers.compute`."""
    made: list[ComputeProcess] = []

    def start(program: str) -> ComputeProcess:
        (tmp_path / "child.py").write_text(textwrap.dedent(program))
        monkeypatch.setattr(runner, "CHILD", (sys.executable, str(tmp_path / "child.py")))
        made.append(ComputeProcess(Settings(home=tmp_path / "home", device="cpu")))
        return made[0]

    yield start
    for process in made:
        process.kill()


@pytest.fixture
def compute(started: Started) -> ComputeProcess:
    return started(CHILD)


def pid_of(compute: ComputeProcess) -> int:
    assert compute._process is not None
    return compute._process.pid


def test_the_messages_of_a_claim_come_in_order(compute: ComputeProcess) -> None:
    compute.start(claim("work"))
    assert [next_message(compute) for _ in range(3)] == [
        Moved(1, 2, {"loss": 0.5}),
        Kept(1, {"state": "d1"}),
        Done({"f": "shd_work"}, 3, None),
    ]
    assert compute.message(0.1) is None


def test_the_child_stays_for_the_next_claim(compute: ComputeProcess) -> None:
    compute.start(claim("fail"))
    assert next_message(compute) == Failed("data_unusable", "broken", "mend it", retryable=False)
    first = pid_of(compute)
    compute.start(claim("work"))
    assert next_message(compute) == Moved(1, 2, {"loss": 0.5})
    assert pid_of(compute) == first


def test_the_child_has_its_settings_and_no_secrets_of_the_service(
    compute: ComputeProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DRAM_SECRET_KEY", "hush")
    monkeypatch.setenv("DRAM_DATABASE_URL", "postgresql://dram:hush@host/dram")
    compute._settings = Settings(home=tmp_path / "home", secret_key=SecretStr("hush"))
    compute.start(claim("look around"))
    message = next_message(compute)
    assert isinstance(message, Done)
    assert "hush" not in str(message)
    assert "home" not in message.files["arguments"]
    assert Settings.model_validate_json(message.files[HANDED_ON]).home == tmp_path / "home"


def test_silence_is_no_message_after_the_timeout(compute: ComputeProcess) -> None:
    compute.start(claim("sleep"))
    since = time.monotonic()
    assert compute.message(0.2) is None
    assert 0.15 < time.monotonic() - since < 5


def test_a_message_that_comes_in_pieces_is_put_together(compute: ComputeProcess) -> None:
    compute.start(claim("in pieces"))
    message = next_message(compute)
    assert isinstance(message, Done)
    assert message.files == {"f": "x" * 200_000}


@pytest.mark.parametrize(("stage", "status"), [("leave", 3), ("half a word", 4)])
def test_a_child_that_ends_is_known_by_its_status_and_replaced(
    stage: str, status: int, compute: ComputeProcess
) -> None:
    compute.start(claim(stage))
    assert next_message(compute) == Died(status)
    compute.start(claim("work"))
    assert next_message(compute) == Moved(1, 2, {"loss": 0.5})


def test_a_child_that_is_killed_from_outside_says_which_signal(compute: ComputeProcess) -> None:
    compute.start(claim("sleep"))
    psutil.Process(pid_of(compute)).kill()
    assert next_message(compute) == Died(-signal.SIGKILL)


def test_a_child_that_hears_nothing_any_more_is_replaced_too(compute: ComputeProcess) -> None:
    compute.start(claim("deaf"))
    time.sleep(0.3)  # it has closed its ears, and lives
    compute.start(claim("work"))
    assert next_message(compute) == Died(6)
    compute.start(claim("work"))
    assert next_message(compute) == Moved(1, 2, {"loss": 0.5})


def test_a_kill_ends_the_child_with_all_that_it_started(compute: ComputeProcess) -> None:
    compute.start(claim("leave a child"))
    message = next_message(compute)
    assert isinstance(message, Moved)
    child, grandchild = pid_of(compute), message.step
    assert not gone(grandchild)
    compute.kill()
    eventually(lambda: gone(child) and gone(grandchild), "the end of the group", 5)
    compute.kill()  # nothing more to end
    compute.start(claim("work"))
    assert next_message(compute) == Moved(1, 2, {"loss": 0.5})


def test_a_death_is_seen_and_completed_although_a_grandchild_holds_the_pipe(compute: ComputeProcess) -> None:
    compute.start(claim("leave a child", shard=1))
    message = next_message(compute)
    assert isinstance(message, Moved)
    assert next_message(compute, seconds=5) == Died(5)
    eventually(lambda: gone(message.step), "the grandchild's end", 5)


def test_a_kill_forgets_what_was_said_but_not_heard(compute: ComputeProcess) -> None:
    compute.start(claim("work"))
    assert isinstance(next_message(compute), Moved)
    compute.kill()
    compute.start(claim("fail"))
    assert isinstance(next_message(compute), Failed)


#: The real child, with a toy method in its registry.
REAL = """
import os, sys
from models.methods import METHODS
from models.pipeline import Method, Params, Stage
def babble(context, params):
    print("loading weights: 100%")
    os.write(1, b'{"kind": "done"}\\n')
    os.system("echo from a program")
    (context.output / "f").write_text("made")
METHODS["toy"] = Method(
    name="toy", title="Toy", source="none", needs=frozenset(), params=Params,
    stages=(Stage("babble", babble, output="o", inputs=()),),
)
from workers import compute
compute.main()
"""


def test_what_a_stage_prints_is_no_message(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the real child."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    compute = started(REAL)
    compute.start(claim("babble"))
    message = next_message(compute, 120)
    assert isinstance(message, Done)
    assert message.bytes == 4
    with LocalStore(tmp_path / "home" / "blobs").open(message.files["f"]) as reader:
        assert reader.read() == b"made"
    said = capfd.readouterr().err
    assert "loading weights: 100%" in said
    assert "from a program" in said
