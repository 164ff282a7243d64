"""Who watches a job is told what becomes of it, and why nothing happens where nothing does."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import typer

from app import watching
from app.client import Dram
from tests.unit.app.scripted import Answer, Asked, Script, job, problem, script, stream

__all__ = ["script"]  # the fixture


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
        watching.until_success(client, "job_1", lasting=lasting)
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

    monkeypatch.setattr(watching, "PATIENCE_S", 0.2)
    script.answers = [waiting, readiness, job("succeeded", student_id="stu_1")]
    with Dram(script.url) as client:
        watching.until_success(client, "job_1")
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

    monkeypatch.setattr(watching, "PATIENCE_S", 0.3)
    at_work, ended = stream((1, "job.created"), (2, "job.started")), stream((3, "job.succeeded"))
    script.answers = [at_work, slow, ended, job("succeeded", student_id="stu_1")]
    with Dram(script.url) as client:
        watching.until_success(client, "job_1")
    assert "No worker" not in capfd.readouterr().err
    assert "/readyz" not in [asked.path for asked in script.asked]


def test_who_watches_a_retried_job_that_no_worker_takes_again_is_told_so(
    script: Script, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = stream((1, "job.created"), (2, "job.started"), (3, "job.failed"), (4, "job.retried"))
    told = threading.Event()

    def answer(asked: Asked) -> Answer:
        if asked.path == "/readyz":
            told.set()
            return Answer(body=b'{"status": "ready", "checks": {}}')
        if asked.path == "/v1/jobs/job_1":
            return job("succeeded", student_id="stu_1") if told.is_set() else job("queued")
        if asked.headers["Last-Event-ID"] == "0":
            return before
        assert told.wait(10)
        return stream((5, "job.started"), (6, "job.succeeded"))

    monkeypatch.setattr(watching, "PATIENCE_S", 0.2)
    script.answers = [answer] * 10
    with Dram(script.url) as client:
        watching.until_success(client, "job_1")
    assert capfd.readouterr().err.count("No worker has taken the job yet.") == 1
