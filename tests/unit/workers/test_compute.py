"""The child's side: a claim comes in, blobs and messages go out, and nothing is left behind."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app import storage
from app.settings import Settings
from app.storage import LocalStore
from models import generators
from models.errors import DataError, TryAgain
from models.methods import METHODS
from models.pipeline import Method, Params, Stage, StageContext
from workers import compute
from workers.asking import PipeLedger
from workers.compute import Voice

ROOT = Path(__file__).parents[3]


class Train(Params):
    steps: int = 3


class Toy(Params):
    train: Train = Train()


#: Replies to what a stage asks: call, arguments -> document.
Parent = Callable[[str, dict[str, Any]], dict[str, Any]]


class Replies(io.BytesIO):
    """The child's standard input: each line answers what it has said last."""

    def __init__(self, said: io.BytesIO, parent: Parent) -> None:
        super().__init__()
        self._said, self._parent = said, parent

    def readline(self, size: int | None = -1) -> bytes:
        asked = json.loads(self._said.getvalue().splitlines()[-1])
        return json.dumps(self._parent(asked["call"], asked["arguments"])).encode() + b"\n"


class Bench:
    """A blob store, a folder to work in, and a toy method whose stage is a function of the test."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = Settings(home=folder, device="cpu", checkpoint_s=0)
        self.blobs = LocalStore(folder / "blobs")
        self.work = compute.own_folder(folder / "work")
        self._folder = folder
        self._monkeypatch = monkeypatch

    def blob(self, content: str) -> str:
        path = self._folder / "content"
        path.write_text(content)
        return self.blobs.put(path)

    def run(
        self, stage: Callable[[StageContext, Any], None], parent: Parent | None = None, **changed: Any
    ) -> list[dict[str, Any]]:
        """The messages of one claim, of a stage that asks its teacher where a `parent` is given to reply."""
        method = Method(
            name="toy", title="Toy", source="none", needs=frozenset(), params=Toy,
            stages=(
                Stage(
                    "train", stage, output="trained", inputs=("support",), optional=("unlabelled",), params="train",
                    asks=parent is not None,
                ),
            ),
        )  # fmt: skip
        self._monkeypatch.setitem(METHODS, "toy", method)
        claim = {
            "shard_id": "shd_1", "job_id": "job_1", "epoch": 1, "attempt": 1, "method": "toy", "stage": "train",
            "output": "trained", "params": {"steps": 7}, "shape": {"classes": 2, "support": 4, "smallest_class": 2},
            "seed": 5, "shard": 1, "shards": 3, "checkpoint": None, "headers": {},
            "inputs": {"support": [{"images.zip": self.blob("images")}]},
        } | changed  # fmt: skip
        out = io.BytesIO()
        replies = Replies(out, parent or (lambda call, arguments: {}))
        compute.run(claim, self.settings, self.blobs, Voice(out, replies), self.work)
        return [json.loads(line) for line in out.getvalue().splitlines()]

    def left_behind(self) -> list[Path]:
        return [*self.work.iterdir(), *(self.blobs.root / "tmp").iterdir()]

    def content(self, digest: str) -> str:
        with self.blobs.open(digest) as reader:
            return reader.read().decode()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_a_stage_that_reads_no_generator_gets_the_memory_of_the_one_before(bench: Bench) -> None:
    class Large:
        """Stands for a generator's networks."""

    large = Large()
    generators._kept["large", "cpu"] = large  # type: ignore[assignment]
    freed = weakref.ref(large)
    del large
    bench.run(lambda context, params: None)
    assert freed() is None


def test_a_stage_gets_what_it_declares_and_nothing_else(bench: Bench) -> None:
    seen: dict[str, Any] = {}

    def stage(context: StageContext, params: Train) -> None:
        seen["inputs"] = {
            name: [{path.name: path.read_text() for path in folder.iterdir()} for folder in folders]
            for name, folders in context.inputs.items()
        }
        seen["rest"] = (params.steps, context.seed, context.device, context.shard, context.shards)
        seen["shape"] = (context.shape.classes, context.shape.support, context.shape.unlabelled)
        seen["output"] = list(context.output.iterdir())

    bench.run(
        stage,
        inputs={
            "support": [{"a": bench.blob("1"), "b": bench.blob("2")}, {"a": bench.blob("3")}],
            "unlabelled": [{"c": bench.blob("4")}],
            "teacher": [{"teacher.json": bench.blob("not declared")}],
        },
    )
    assert seen["inputs"] == {"support": [{"a": "1", "b": "2"}, {"a": "3"}], "unlabelled": [{"c": "4"}]}
    assert seen["rest"] == (7, 5, "cpu", 1, 3)
    assert seen["shape"] == (2, 4, 0)
    assert seen["output"] == []


def test_an_optional_input_that_the_job_lacks_is_not_given(bench: Bench) -> None:
    seen: list[str] = []
    bench.run(lambda context, params: seen.extend(context.inputs))
    assert seen == ["support"]


def test_the_output_is_stored_file_by_file_and_told_with_its_size(bench: Bench) -> None:
    def stage(context: StageContext, params: Train) -> None:
        (context.output / "weights").write_text("12345")
        (context.output / "deep").mkdir()
        (context.output / "deep" / "history").write_text("678")

    (done,) = bench.run(stage)
    assert {name: bench.content(digest) for name, digest in done.pop("files").items()} == {
        "weights": "12345",
        "deep/history": "678",
    }
    assert done == {"kind": "done", "bytes": 8, "facts": None}
    assert bench.left_behind() == []


@pytest.mark.parametrize("with_bundle", [True, False])
def test_facts_about_the_student_come_with_a_bundle_only(with_bundle: bool, bench: Bench) -> None:
    report = {"classes": ["a", "b"], "summary": {"accuracy": 0.9}, "more": 1}

    def stage(context: StageContext, params: Train) -> None:
        (context.output / "report.json").write_text(json.dumps(report))
        if with_bundle:
            (context.output / "bundle.zip").write_text("zip")

    (done,) = bench.run(stage)
    assert done["facts"] == ({"classes": ["a", "b"], "summary": {"accuracy": 0.9}} if with_bundle else None)


def test_progress_is_told_at_most_some_times_a_second_but_every_point_of_a_curve_is(bench: Bench) -> None:
    def stage(context: StageContext, params: Train) -> None:
        for step in range(1000):
            context.report(step, 2000)
        for step in range(1000, 1003):
            context.report(step, 2000, loss=float(step))

    *moved, _ = bench.run(stage)
    plain = [message for message in moved if not message["metrics"]]
    assert moved[0] == {"kind": "moved", "step": 0, "total": 2000, "metrics": {}}
    assert len(plain) < 10
    assert [message["metrics"] for message in moved[len(plain) :]] == [
        {"loss": step} for step in (1e3, 1001.0, 1002.0)
    ]


SECRET = "/srv/secret/place"


class SafetensorError(Exception):
    """As the library's: not an OSError, with the system's words."""


class OutOfMemoryError(RuntimeError):
    """As torch's."""


@pytest.mark.parametrize(
    ("error", "code", "retryable", "words"),
    [
        (DataError("class 'a' has no image", "add one"), "data_unusable", False, "class 'a' has no image"),
        (MemoryError(), "out_of_memory", False, "ran out of memory"),
        (OutOfMemoryError("CUDA " + SECRET), "out_of_memory", False, "GPU memory"),
        (OSError(errno.ENOSPC, "No space left on device", SECRET), "disk_full", True, "full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", SECRET), "disk_full", True, "full"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "disk_full",
            True,
            "full",
        ),
        (ValueError(SECRET), "internal_error", False, "(ValueError)"),
        (OSError(errno.EACCES, "Permission denied", SECRET), "internal_error", False, "(PermissionError)"),
    ],
)
def test_a_failure_is_told_in_words_without_a_traceback(
    error: Exception,
    code: str,
    retryable: bool,
    words: str,
    bench: Bench,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def stage(context: StageContext, params: Train) -> None:
        (context.output / "half").write_text("made")
        raise error

    (failed,) = bench.run(stage)
    assert (failed["kind"], failed["code"], failed["retryable"]) == ("failed", code, retryable)
    assert words in failed["detail"]
    assert set(failed) - {"after_s"} == {"kind", "code", "detail", "hint", "retryable"}
    for trace in (SECRET, "Traceback", "File ", ".py"):
        assert trace not in failed["detail"] + failed["hint"]
    assert bench.left_behind() == []
    if code == "internal_error":
        assert "job job_1, stage train:\nTraceback" in capfd.readouterr().err


def test_the_hint_of_an_error_of_ours_is_passed_on(bench: Bench) -> None:
    def stage(context: StageContext, params: Train) -> None:
        raise DataError("class 'a' has no image", "add one")

    assert bench.run(stage)[0]["hint"] == "add one"


def test_a_pause_that_the_teacher_asks_for_is_passed_on(bench: Bench) -> None:
    def stage(context: StageContext, params: Train) -> None:
        raise TryAgain("no time", "later", after=90.0)

    (failed,) = bench.run(stage)
    assert (failed["code"], failed["retryable"], failed["after_s"]) == ("teacher_busy", True, 90.0)


def test_a_missing_input_fails_the_stage_before_it_runs(bench: Bench) -> None:
    ran: list[int] = []
    (failed,) = bench.run(lambda context, params: ran.append(1), inputs={"support": [{"a": "0" * 64}]})
    assert (failed["code"], ran) == ("internal_error", [])
    assert bench.left_behind() == []


def test_the_same_shard_can_be_computed_twice_by_one_process(bench: Bench) -> None:
    assert bench.run(lambda context, params: None)[0]["kind"] == "done"
    assert bench.run(lambda context, params: None)[0]["kind"] == "done"


def save(context: StageContext, step: int) -> None:
    assert context.checkpoints.due()
    context.checkpoints.save(step, lambda folder: Path(folder, "state").write_text(f"at {step}") and None)


def kept(message: dict[str, Any], previous: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"step": message["step"], "files": message["files"], "previous": previous}


def found(bench: Bench, checkpoint: dict[str, Any] | None) -> str | None:
    """What a stage finds that starts from this checkpoint."""
    states: list[str | None] = []

    def stage(context: StageContext, params: Train) -> None:
        folder = context.checkpoints.latest()
        states.append(folder and Path(folder, "state").read_text())

    bench.run(stage, checkpoint=checkpoint)
    return states[0]


def two_checkpoints(bench: Bench) -> tuple[dict[str, Any], dict[str, Any]]:
    def stage(context: StageContext, params: Train) -> None:
        save(context, 10)
        save(context, 20)

    first, second, _ = bench.run(stage)
    assert (first["kind"], first["step"], second["step"]) == ("kept", 10, 20)
    return first, second


def test_a_checkpoint_is_stored_told_and_found_by_the_next_attempt(bench: Bench) -> None:
    first, second = two_checkpoints(bench)
    assert found(bench, kept(second, kept(first))) == "at 20"
    assert found(bench, None) is None
    assert bench.left_behind() == []


def test_a_stage_finds_the_checkpoint_that_it_has_just_saved(bench: Bench) -> None:
    states: list[str] = []

    def stage(context: StageContext, params: Train) -> None:
        for step in (10, 20):
            save(context, step)
            folder = context.checkpoints.latest()
            assert folder is not None
            states.append((folder / "state").read_text())

    bench.run(stage)
    assert states == ["at 10", "at 20"]


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_an_unusable_newest_checkpoint_falls_back_to_the_one_before(how: str, bench: Bench) -> None:
    first, second = two_checkpoints(bench)
    (digest,) = second["files"].values()
    path = bench.blobs.path(digest)
    path.unlink()
    if how == "damaged":
        path.write_text("at 21")
    assert found(bench, kept(second, kept(first))) == "at 10"
    assert found(bench, kept(second)) is None


def test_checkpoints_of_the_same_content_are_blobs_of_their_own(bench: Bench) -> None:
    """So that one can be deleted though another is alike: of a job with the same order, or an output."""
    first, second = (bench.run(lambda context, params: save(context, 10))[0] for _ in range(2))
    assert set(first["files"].values()).isdisjoint(second["files"].values())
    for digest in first["files"].values():
        bench.blobs.delete(digest)
    assert found(bench, kept(second)) == "at 10"


def test_checkpoints_are_not_due_before_their_pause_is_over(bench: Bench) -> None:
    bench.settings = bench.settings.model_copy(update={"checkpoint_s": 60})
    due: list[bool] = []
    bench.run(lambda context, params: due.append(context.checkpoints.due()))
    assert due == [False]


HOLDS = """
import sys, time
from pathlib import Path
from workers import compute
print(compute.own_folder(Path(sys.argv[1])), flush=True)
time.sleep(60)
"""


def test_folders_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().decode().strip())
        (folder / "shd_1").mkdir()
        mine = compute.own_folder(tmp_path)
        kept = folder.exists()
        other.send_signal(signal.SIGKILL)
    assert kept
    third = compute.own_folder(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, third}


def test_folders_are_not_told_apart_by_process_ids(tmp_path: Path) -> None:
    """Two containers may share the folder and each have a process with this id."""
    assert compute.own_folder(tmp_path) != compute.own_folder(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_stored_can_be_checked_by_its_name(bench: Bench) -> None:
    def stage(context: StageContext, params: Train) -> None:
        (context.output / "weights").write_bytes(os.urandom(3_000_000))

    (done,) = bench.run(stage)
    assert storage.digest_of(bench.blobs.path(done["files"]["weights"])) == done["files"]["weights"]


def test_a_stage_that_asks_gets_the_ledger_of_its_parent_and_the_secret_headers(bench: Bench) -> None:
    seen: list[Any] = []

    def stage(context: StageContext, params: Train) -> None:
        assert context.access is not None
        seen.append(dict(context.access.headers))
        seen.append(context.access.ledger.known("teacher", ["i1", "i2"]))
        context.access.ledger.reserve(7)
        assert "hush" not in repr(context)

    results = {"known": {"i2": base64.b64encode(b"four").decode()}, "reserve": None}
    secret = {"Authorization": "Bearer hush"}
    *asked, done = bench.run(stage, lambda call, arguments: {"result": results[call]}, headers=secret)
    assert seen == [secret, {"i2": b"four"}]
    assert asked == [
        {"kind": "ask", "call": "known", "arguments": {"teacher": "teacher", "images": ["i1", "i2"]}},
        {"kind": "ask", "call": "reserve", "arguments": {"count": 7}},
    ]
    assert done["kind"] == "done"


def test_a_stage_that_does_not_ask_is_given_no_way_to_its_teacher(bench: Bench) -> None:
    seen: list[Any] = []
    bench.run(lambda context, params: seen.append(context.access), headers={"Authorization": "Bearer hush"})
    assert seen == [None]


def test_a_budget_that_is_spent_ends_the_stage_in_the_words_of_the_parent(bench: Bench) -> None:
    def stage(context: StageContext, params: Train) -> None:
        assert context.access is not None
        context.access.ledger.reserve(7)

    refused = {"refused": {"detail": "5 of 5 are spent", "hint": "raise query_budget"}}
    *_, failed = bench.run(stage, lambda call, arguments: refused)
    assert failed == {
        "kind": "failed", "code": "query_budget_spent", "detail": "5 of 5 are spent", "hint": "raise query_budget",
        "retryable": False, "after_s": 0.0,
    }  # fmt: skip


def test_a_stage_may_reach_only_what_the_operator_allows(bench: Bench) -> None:
    """Nothing listens there; the refusal comes before anything is sent."""

    def silent(call: str, arguments: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("it asked its ledger")

    def stage(context: StageContext, params: Train) -> None:
        assert context.access is not None
        assert context.access.transport is not None
        context.access.transport.post("http://127.0.0.1:9/", b"", {}, timeout_s=1, max_bytes=1)

    (failed,) = bench.run(stage, silent)
    assert (failed["code"], failed["retryable"]) == ("destination_refused", False)
    bench.settings = bench.settings.model_copy(update={"egress_allow": ("127.0.0.1:9",)})
    (failed,) = bench.run(stage, silent)
    assert (failed["code"], failed["retryable"]) == ("teacher_unreachable", True)


def test_threads_that_ask_at_once_each_hear_their_own_answer(bench: Bench) -> None:
    heard: dict[int, dict[str, bytes]] = {}

    def stage(context: StageContext, params: Train) -> None:
        assert context.access is not None
        ledger = context.access.ledger
        with ThreadPoolExecutor(8) as threads:
            asked = range(64)
            heard.update(zip(asked, threads.map(lambda i: ledger.known("t", [f"i{i}"]), asked), strict=True))

    def echo(call: str, arguments: dict[str, Any]) -> dict[str, Any]:
        (image,) = arguments["images"]
        return {"result": {image: base64.b64encode(image.encode()).decode()}}

    bench.run(stage, echo)
    assert heard == {i: {f"i{i}": f"i{i}".encode()} for i in range(64)}


def test_many_answers_go_up_in_several_messages(bench: Bench) -> None:
    answers = {f"i{i}": bytes([i % 256]) for i in range(1000)}

    def stage(context: StageContext, params: Train) -> None:
        assert context.access is not None
        context.access.ledger.record("t", answers)
        assert context.access.ledger.known("t", list(answers)) == answers

    kept: dict[str, str] = {}

    def parent(call: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if call == "record":
            assert len(arguments["answers"]) < 500
            kept.update(arguments["answers"])
            return {"result": None}
        return {"result": {image: kept[image] for image in arguments["images"]}}

    *_, done = bench.run(stage, parent)
    assert done["kind"] == "done"


def test_a_stage_ends_when_its_parent_replies_no_more() -> None:
    ledger = PipeLedger(lambda kind, **members: None, io.BytesIO())
    with pytest.raises(ConnectionError):
        ledger.reserve(1)
