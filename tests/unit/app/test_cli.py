"""The command line as a person meets it: words, tables, exit codes. Each command is a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.home import Home
from tests.unit.app.scripted import MODEL, Answer, Script, file, job, problem, script, stream

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
    shown = [line.strip("│ ").split(" ")[0] for line in dram("--help").stdout.splitlines()]
    names = (
        "up migrate first-key upload submit watch jobs cancel retry download predict distill delete samples evaluate "
        "methods architectures generators teachers"
    )
    assert [name for name in names.split() if name not in shown] == []


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


def test_a_label_without_a_value_is_a_usage_error(script: Script) -> None:
    ran = dram("submit", "ds_1", "--metadata", "herbarium", "--url", script.url)
    assert ran.returncode == 2
    assert "KEY=VALUE" in ran.stderr
    assert script.asked == []


PLAN = {
    "object": "plan",
    "params": {},
    "stages": [
        {"name": "teacher_head", "key": "a1", "shards": 1, "reused": True},
        {"name": "synthesise", "key": "b2", "shards": 4, "reused": False},
    ],
    "queries_planned": 12000,
}
NAMED = ("submit", "ds_1", "--teacher", "tch_1", "--method", "fsbbt", "--student", "conv4", "--dry-run")


def test_a_dry_run_shows_stages_and_questions_of_the_order_that_would_be_made(script: Script) -> None:
    script.answers = [Answer(body=json.dumps(PLAN).encode())]
    labels = ("--metadata", "project=herbarium", "--metadata", "note=a=b")
    ran = dram(*NAMED, *labels, "--cancel-after", "3600", "--url", script.url)
    assert ran.returncode == 0, ran.stderr
    first, _, *stages, last = (line.split() for line in ran.stdout.splitlines())
    assert {"fsbbt:", "conv4", "tch_1"} <= set(first)
    assert stages == [["teacher_head", "1", "yes"], ["synthesise", "4", "no"]]
    assert last[-1] == "12,000"
    order = json.loads(script.asked[0].body)
    assert order["dry_run"] is True
    assert order["metadata"] == {"project": "herbarium", "note": "a=b"}
    assert order["cancel_after_s"] == 3600
    assert len(script.asked) == 1


def test_a_dry_run_as_json_is_the_plan_as_the_service_answered_it(script: Script) -> None:
    script.answers = [Answer(body=json.dumps(PLAN).encode())]
    assert json.loads(dram(*NAMED, "--json", "--url", script.url).stdout) == PLAN


def test_each_id_is_deleted_as_what_it_names_and_a_refusal_does_not_keep_the_rest(script: Script) -> None:
    why = "Job job_1 is running; only a job that has ended can be deleted. Cancel it first."
    gone = Answer(204, b"")
    script.answers = [gone, problem(409, code="job_not_finished", detail=why), gone, gone, gone]
    ran = dram("delete", "ds_1", "job_1", "stu_1", "tch_1", "wh_1", "--url", script.url)
    assert ran.returncode == 1
    assert [(asked.method, asked.path) for asked in script.asked] == [
        ("DELETE", "/v1/datasets/ds_1"),
        ("DELETE", "/v1/jobs/job_1"),
        ("DELETE", "/v1/students/stu_1"),
        ("DELETE", "/v1/teachers/tch_1"),
        ("DELETE", "/v1/webhooks/wh_1"),
    ]
    assert ran.stderr.splitlines() == [
        "ds_1 is deleted",
        "job_1 is not deleted:",
        f"Error: {why} [job_not_finished]",
        "stu_1 is deleted",
        "tch_1 is deleted",
        "wh_1 is deleted",
    ]


def test_where_one_id_is_of_no_kind_nothing_is_deleted_and_the_kinds_are_named(script: Script) -> None:
    ran = dram("delete", "stu_1", "efficientnet_lite0", "--url", script.url)
    assert ran.returncode == 2
    said = " ".join(ran.stderr.replace("│", " ").split())
    for words in ("'efficientnet_lite0'", "data set (ds_…)", "job (job_…)", "student (stu_…)", "own (tch_…)"):
        assert words in said
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
        "distill", "pets", "--out", "s.onnx", "--precision", "int8", "--metadata", "for=a test", "--cancel-after", "60",
        "--url", script.url, "--key", "dram_k",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    order = json.loads(script.asked[3].body)
    assert (order["metadata"], order["cancel_after_s"]) == ({"for": "a test"}, 60)
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
