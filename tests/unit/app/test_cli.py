"""The command line as a person meets it: words, tables, exit codes. Each command is a real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from app import cli
from app.client import Dram
from app.home import Home
from tests.unit.app.scripted import MODEL, Answer, Asked, Script, file, job, problem, script, stream

__all__ = ["script"]  # the fixture

FAILED = {
    "code": "teacher_failed", "detail": "The teacher gave no answer.", "stage": "ask",
    "hint": "Try another teacher.", "retryable": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("DRAM_")]:
        monkeypatch.delenv(name)
    return


def dram(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


DATASET = {"id": "ds_1", "name": "pets", "classes": ["cat"], "splits": {"support": {"images": 2}}}


def listing(*items: object) -> Answer:
    return Answer(body=json.dumps({"object": "list", "data": items, "has_more": False}).encode())


def test_the_command_line_starts_without_the_server() -> None:
    told = "import sys, app.cli; print([m for m in ('torch', 'fastapi', 'sqlalchemy', 'celery') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_help_names_every_command() -> None:
    shown = dram("--help").stdout
    names = "up migrate first-key teachers methods architectures upload submit watch jobs cancel retry download predict"
    assert [
        name for name in (*names.split(), "distill", "evaluate", "samples", "generators") if name not in shown
    ] == []


def test_no_service_is_an_error_that_says_what_to_do() -> None:
    ran = dram("jobs", "--url", "http://127.0.0.1:9")
    assert ran.returncode == 1
    assert "no answer from http://127.0.0.1:9" in ran.stderr
    assert "`dram up` starts one" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_jobs_are_listed_whole_in_a_pipe(script: Script) -> None:
    document = json.loads(job("running", progress={"percent": 12}).body)
    script.answers = [listing({**document, "id": "job_" + "a" * 60, "student": "s" * 80})]
    ran = dram("jobs", "--url", script.url, "--key", "dram_k")
    assert ran.returncode == 0
    (row,) = [line for line in ran.stdout.splitlines() if "running" in line]
    assert "job_" + "a" * 60 in row
    assert "s" * 80 in row
    assert "12 %" in row


def test_a_refusal_shows_code_findings_and_request(script: Script) -> None:
    findings = [
        {"code": "less_than_equal", "pointer": "/params/distillation/steps", "detail": "At most 200000."}
    ]
    script.answers = [
        listing({"id": "kd", "task": "classification"}),
        Answer(body=json.dumps(DATASET).encode()),
        listing({"id": "none", "available": False}, {"id": "lite0", "available": True}),
        problem(
            422, code="invalid_params", detail="A parameter is wrong.", errors=findings, request_id="req_7"
        ),
    ]
    ran = dram("submit", "ds_1", "--param", "distillation.steps=9000000", "--url", script.url)
    assert ran.returncode == 1
    for words in (
        "A parameter is wrong. [invalid_params]",
        "/params/distillation/steps: At most 200000.",
        "req_7",
    ):
        assert words in ran.stderr
    order = json.loads(script.asked[-1].body)
    assert order["teacher_id"] == "lite0"
    assert order["params"] == {"distillation": {"steps": 9000000}}


def test_a_parameter_without_a_group_is_a_usage_error(script: Script) -> None:
    ran = dram("submit", "ds_1", "--param", "steps=9", "--url", script.url)
    assert ran.returncode == 2
    assert "GROUP.NAME=VALUE" in ran.stderr
    assert script.asked == []


def test_watching_a_failed_job_says_why_and_fails(script: Script) -> None:
    script.answers = [
        stream((1, "job.created"), (2, "stage.started"), (3, "job.failed")),
        job("failed", error=FAILED),
    ]
    ran = dram("watch", "job_1", "--url", script.url)
    assert ran.returncode == 1
    words = (
        "teacher_failed",
        "The teacher gave no answer.",
        "stage 'ask'",
        "Try another teacher.",
        "dram retry job_1",
    )
    for said in words:
        assert said in ran.stderr


def test_watching_a_cancelled_job_fails(script: Script) -> None:
    script.answers = [stream((1, "job.cancelled")), job("cancelled")]
    ran = dram("watch", "job_1", "--url", script.url)
    assert ran.returncode == 1
    assert "job_1 was cancelled" in ran.stderr


def test_watching_a_job_that_succeeds_ends_well(script: Script) -> None:
    script.answers = [stream((1, "job.created"), (2, "job.succeeded")), job("succeeded", student_id="stu_1")]
    ran = dram("watch", "job_1", "--url", script.url)
    assert ran.returncode == 0
    assert "stu_1" in ran.stderr


@pytest.mark.parametrize(
    ("lasting", "asked", "says"),
    [(True, [], "The job goes on."), (False, ["/v1/jobs/job_1/cancel"], "job_1 is cancelled")],
)
def test_ctrl_c_says_what_becomes_of_the_job_and_cancels_it_where_its_service_stops(
    lasting: bool, asked: list[str], says: str, script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Asked) -> Answer:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # the command has gone on before this answer comes
        return stream((1, "job.created"))

    script.answers = [interrupted, job("cancelled")]
    with Dram(script.url) as client, pytest.raises(typer.Exit) as ended:
        cli._watch(client, "job_1", lasting=lasting)
    assert ended.value.exit_code == 130
    assert [each.path for each in script.asked[1:]] == asked
    assert says in capfd.readouterr().err


@pytest.mark.parametrize(
    ("ready", "says"),
    [
        (
            Answer(503, b'{"status": "not_ready", "checks": {"redis": {"ok": true, "reason": "It answers."}, '
            b'"worker": {"ok": false, "reason": "No worker was seen: start one."}}}'),
            "worker: No worker was seen: start one.",
        ),
        (Answer(body=b'{"status": "ready", "checks": {}}'), "its workers may be busy with other jobs."),
        (problem(502, detail="A proxy speaks.", code="bad_gateway"), "A proxy speaks."),
    ],
)  # fmt: skip
def test_who_watches_a_job_that_no_worker_takes_is_told_what_is_missing(
    ready: Answer,
    says: str,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    told = threading.Event()

    def waiting(_: Asked) -> Answer:
        assert told.wait(10)
        return stream((1, "job.created"), (2, "job.started"), (3, "job.succeeded"))

    def readiness(asked: Asked) -> Answer:
        assert asked.path == "/readyz"
        threading.Timer(0.5, told.set).start()
        return ready

    monkeypatch.setattr(cli, "_PATIENCE_S", 0.2)
    script.answers = [waiting, readiness, job("succeeded", student_id="stu_1")]
    with Dram(script.url) as client:
        cli._watch(client, "job_1")
    said = capfd.readouterr().err
    assert "No worker has taken the job yet." in said
    assert says in said
    assert "It answers." not in said


def test_who_watches_a_job_at_work_is_told_nothing_of_the_service(
    script: Script, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def slow(_: Asked) -> Answer:
        time.sleep(0.6)
        return job("running")

    monkeypatch.setattr(cli, "_PATIENCE_S", 0.3)
    at_work, ended = stream((1, "job.created"), (2, "job.started")), stream((3, "job.succeeded"))
    script.answers = [at_work, slow, ended, job("succeeded", student_id="stu_1")]
    with Dram(script.url) as client:
        cli._watch(client, "job_1")
    assert "No worker" not in capfd.readouterr().err
    assert "/readyz" not in [asked.path for asked in script.asked]


def test_download_takes_a_job_and_prints_the_path(script: Script, tmp_path: Path) -> None:
    script.answers = [job("succeeded", student_id="stu_1"), file(MODEL)]
    ran = dram("download", "job_1", "--out", tmp_path / "s.onnx", "--url", script.url)
    assert (ran.returncode, ran.stdout.strip()) == (0, str(tmp_path / "s.onnx"))
    assert (tmp_path / "s.onnx").read_bytes() == MODEL
    assert script.asked[1].path == "/v1/students/stu_1/model.onnx?precision=fp32"


def test_download_of_an_unfinished_job_says_to_wait(script: Script) -> None:
    script.answers = [job("running")]
    ran = dram("download", "job_1", "--url", script.url)
    assert ran.returncode == 1
    assert "dram watch job_1" in ran.stderr


def student(**about: object) -> Answer:
    whose = {"id": "stu_1", "job_id": "job_1", "teacher": "t", "method": "kd", "architecture": "conv4"}
    return Answer(body=json.dumps({**whose, "classes": ["cat", "dog"], **about}).encode())


def test_predict_prints_labels_and_scores(script: Script, tmp_path: Path) -> None:
    seen = {"predictions": [{"label": "cat", "score": 0.91}, {"label": "dog", "score": 0.09}]}
    script.answers = [student(summary={"accuracy": 0.9}), Answer(body=json.dumps(seen).encode())]
    (tmp_path / "x.png").write_bytes(b"picture")
    ran = dram("predict", "stu_1", tmp_path / "x.png", "--top", "2", "--url", script.url)
    assert ran.returncode == 0
    assert [line.split() for line in ran.stdout.splitlines()[1:]] == [["cat", "0.910"], ["dog", "0.090"]]
    assert script.asked[1].body == b"picture"
    assert "top=2" in script.asked[1].path


def test_predict_writes_the_class_map_of_a_segmentation_beside_the_image(
    script: Script, tmp_path: Path
) -> None:
    segments = student(classes=["ground", "tree"], summary={"task": "segmentation", "miou": 0.7})
    (tmp_path / "x.jpg").write_bytes(b"picture")
    for options, said in (((), ["ground", "tree"]), (("--json",), ["class_map", "ground", "tree"])):
        script.asked = []
        script.answers = [segments, Answer(body=b"map", headers={"Content-Type": "image/png"})]
        ran = dram("predict", "stu_1", tmp_path / "x.jpg", *options, "--url", script.url)
        assert ran.returncode == 0, ran.stderr
        assert [asked.path for asked in script.asked] == [
            "/v1/students/stu_1",
            "/v1/students/stu_1/class-map",
        ]
        assert script.asked[1].body == b"picture"
        assert (tmp_path / "x.jpg.classes.png").read_bytes() == b"map"
        for words in (str(tmp_path / "x.jpg.classes.png"), *said):
            assert words in ran.stdout


def test_predict_without_the_image_is_an_error_in_a_sentence(script: Script) -> None:
    ran = dram("predict", "stu_1", "nowhere.png", "--url", script.url)
    assert ran.returncode == 1
    assert "nowhere.png" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(("accepted", "file_kept"), [(True, "int8"), (False, "fp32")])
def test_distill_reports_and_downloads_the_file_that_was_kept(
    accepted: bool, file_kept: str, script: Script, tmp_path: Path
) -> None:
    share = {"value": 0.9, "low": 0.8, "high": 0.95}
    network = {"accuracy": share, "parameters": 113860, "bytes": 460_000}
    report = {
        "student": {"name": "conv4", **network},
        "teacher": {"name": "lite0", **network},
        "latency": {
            "student": {"median_ms": 0.4}, "teacher": {"median_ms": 27.0}, "speedup": {"value": 67.5},
            "runtime": "onnxruntime", "threads": 1,
        },
        "compression": {"bytes": 29.0},
        "agreement": share,
        "int8": {"asked": True, "accepted": accepted, "reason": "measured"},
        "evaluation": {"explanation": "Measured on 12 test images."},
    }  # fmt: skip
    script.answers = [
        Answer(201, json.dumps(DATASET).encode()),
        listing({"id": "kd", "task": "classification"}),
        listing({"id": "lite0", "available": True}),
        job("queued"),
        stream((1, "job.succeeded")),
        job("succeeded", student_id="stu_1"),
        Answer(body=json.dumps(report).encode()),
        file(MODEL),
    ]
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    (tmp_path / "pets" / "cat" / "1.png").write_bytes(b"picture")
    ran = dram(
        "distill", "pets", "--out", "s.onnx", "--precision", "int8", "--url", script.url, "--key", "dram_k"
    )
    assert ran.returncode == 0, ran.stderr
    for words in ("90.0% [80.0%, 95.0%]", "113,860", "0.40 ms", "68 times faster", "on 12 test images"):
        assert words in ran.stdout
    assert script.asked[-1].path.endswith(f"model.onnx?precision={file_kept}")
    assert (tmp_path / "s.onnx").read_bytes() == MODEL


def test_distill_without_the_folder_starts_nothing(tmp_path: Path) -> None:
    ran = dram("distill", "nowhere", "--out", "s.onnx", "--home", tmp_path / "home")
    assert ran.returncode == 1
    assert "there is no folder or zip 'nowhere'" in ran.stderr
    assert not (tmp_path / "home").exists()


def test_the_key_of_a_home_goes_to_this_machine_only(script: Script, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.folder.mkdir()
    home.keep_key("dram_secret")
    script.answers = [listing(), listing()]
    assert dram("jobs", "--url", script.url, "--home", home.folder).returncode == 0
    assert script.asked[0].headers["Authorization"] == "Bearer dram_secret"
    proxied = {"HTTP_PROXY": script.url, "http_proxy": script.url, "NO_PROXY": ""}
    assert dram("jobs", "--url", "http://dram.example", "--home", home.folder, **proxied).returncode == 0
    assert "Authorization" not in script.asked[1].headers
    assert home.key_file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("command", [("distill", "."), ("download", "stu_1")])
def test_a_target_of_an_unknown_kind_is_refused_before_any_work(
    command: tuple[str, ...], script: Script
) -> None:
    ran = dram(*command, "--out", "student.pdf", "--url", script.url, "--key", "dram_k")
    assert ran.returncode == 2
    assert "should end in .onnx" in " ".join(ran.stderr.split())
