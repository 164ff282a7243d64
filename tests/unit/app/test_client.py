"""The Python client against a server that fails on purpose: it resumes, repeats what may be repeated, and explains."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.client import (
    AsyncDram,
    ClientError,
    DamagedDownloadError,
    Dram,
    DramApiError,
    JobTimeoutError,
    UnreachableError,
)
from app.client.packing import packed
from tests.unit.app.scripted import MODEL, Answer, Asked, Script, file, job, problem, script, stream

__all__ = ["script"]  # the fixture


@pytest.fixture
def dram(script: Script) -> Iterator[Dram]:
    with Dram(script.url, key="dram_k", timeout_s=5, retries=3) as client:
        yield client


def test_a_get_is_repeated_when_the_connection_is_lost(dram: Dram, script: Script) -> None:
    script.answers = [None, Answer(503, b"", {"Retry-After": "0"}), job("running")]
    assert dram.jobs.get("job_1").status == "running"
    assert [asked.path for asked in script.asked] == ["/v1/jobs/job_1"] * 3
    assert script.asked[0].headers["Authorization"] == "Bearer dram_k"


def test_an_upload_is_not_repeated_when_the_connection_is_lost(
    dram: Dram, script: Script, tmp_path: Path
) -> None:
    script.answers = [None, None]
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"x")
    with pytest.raises(UnreachableError, match="no answer from http"):
        dram.datasets.create(tmp_path)
    assert len(script.asked) == 1


def test_a_job_order_is_repeated_under_one_idempotency_key(dram: Dram, script: Script) -> None:
    script.answers = [None, job("queued")]
    dram.jobs.create(dataset_id="ds_1", teacher_id="t", student="conv4", seed=3)
    first, second = script.asked
    assert first.headers["Idempotency-Key"] == second.headers["Idempotency-Key"] != ""
    assert json.loads(second.body) == {
        "dataset_id": "ds_1", "teacher_id": "t", "student": "conv4", "seed": 3,
    }  # fmt: skip


def test_retries_end(dram: Dram, script: Script) -> None:
    script.answers = [None] * 9
    with pytest.raises(UnreachableError):
        dram.jobs.get("job_1")
    assert len(script.asked) == 4


def test_a_refusal_carries_everything_the_service_said(dram: Dram, script: Script) -> None:
    findings = [{"code": "unknown_class", "pointer": "/params/x", "detail": "no such thing"}]
    script.answers = [
        problem(422, code="invalid", detail="It is wrong.", errors=findings, request_id="req_1")
    ]
    with pytest.raises(DramApiError) as caught:
        dram.jobs.create(dataset_id="ds_1", teacher_id="t", method="kd", student="conv4")
    error = caught.value
    assert (error.status, error.code, error.detail) == (422, "invalid", "It is wrong.")
    assert (error.errors, error.request_id) == (findings, "req_1")
    assert len(script.asked) == 1


def test_an_answer_that_is_no_problem_document_is_an_error_all_the_same(dram: Dram, script: Script) -> None:
    script.answers = [Answer(404, b"<html>nothing here</html>")]
    with pytest.raises(DramApiError, match="404 Not Found") as caught:
        dram.students.get("stu_1")
    assert caught.value.code == "http_404"


def test_waiting_asks_until_the_job_has_finished(dram: Dram, script: Script) -> None:
    script.answers = [job("queued"), job("running"), job("succeeded", student_id="stu_1")]
    assert dram.jobs.wait("job_1").student_id == "stu_1"
    assert {asked.headers["Prefer"] for asked in script.asked} == {"wait=30"}


def test_waiting_ends_with_the_callers_patience(dram: Dram, script: Script) -> None:
    script.answers = [job("running", progress={"percent": 41.5})] * 9
    with pytest.raises(JobTimeoutError, match=r"job_1 is running at 42 % after 0\.1 s"):
        dram.jobs.wait("job_1", timeout_s=0.1)


def test_events_go_on_after_the_last_one_when_the_stream_breaks(dram: Dram, script: Script) -> None:
    script.answers = [
        stream((1, "job.created"), (2, "job.started"), cut=True),
        None,
        stream((2, "job.started"), (3, "stage.progress"), (4, "job.succeeded")),
    ]
    assert [event.id for event in dram.jobs.events("job_1")] == [1, 2, 3, 4]
    assert [asked.headers["Last-Event-ID"] for asked in script.asked] == ["0", "2", "2"]
    assert script.asked[0].headers["Accept"] == "text/event-stream"


def test_an_old_failure_does_not_end_the_events_of_a_retried_job(dram: Dram, script: Script) -> None:
    script.answers = [stream((1, "job.failed"), (2, "job.retried"), (3, "job.succeeded"))]
    assert [event.type for event in dram.jobs.events("job_1")] == [
        "job.failed",
        "job.retried",
        "job.succeeded",
    ]


def test_events_of_a_finished_job_end_where_nothing_more_comes(dram: Dram, script: Script) -> None:
    script.answers = [Answer(body=b""), job("succeeded")]
    assert list(dram.jobs.events("job_1", after=7)) == []
    assert script.asked[0].headers["Last-Event-ID"] == "7"


def test_events_of_an_unknown_job_are_refused(dram: Dram, script: Script) -> None:
    script.answers = [problem(404, code="job_not_found", detail="There is no job.")]
    with pytest.raises(DramApiError, match="There is no job"):
        list(dram.jobs.events("job_x"))


def test_a_broken_download_goes_on_where_it_stopped(dram: Dram, script: Script, tmp_path: Path) -> None:
    def rest(asked: Asked) -> Answer:
        start = int(asked.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        return file(MODEL[start:], status=206)

    script.answers = [file(MODEL, cut=300_000), rest]
    path = dram.students.download("stu_1", tmp_path / "deep" / "student.onnx")
    assert path.read_bytes() == MODEL
    assert 0 < int(script.asked[1].headers["Range"].removeprefix("bytes=").removesuffix("-")) <= 300_000
    assert [entry.name for entry in path.parent.iterdir()] == ["student.onnx"]


def test_what_an_earlier_run_left_is_used(dram: Dram, script: Script, tmp_path: Path) -> None:
    (tmp_path / "s.onnx.partial").write_bytes(MODEL[:1000])
    script.answers = [file(MODEL[1000:], status=206)]
    assert dram.students.download("stu_1", tmp_path / "s.onnx").read_bytes() == MODEL
    assert script.asked[0].headers["Range"] == "bytes=1000-"


def test_leftovers_of_another_file_are_thrown_away(dram: Dram, script: Script, tmp_path: Path) -> None:
    (tmp_path / "s.onnx.partial").write_bytes(b"other" * 200)
    script.answers = [file(MODEL[1000:], status=206), file(MODEL)]
    assert dram.students.download("stu_1", tmp_path / "s.onnx").read_bytes() == MODEL
    assert "Range" not in script.asked[1].headers


def test_leftovers_longer_than_the_file_are_thrown_away(dram: Dram, script: Script, tmp_path: Path) -> None:
    (tmp_path / "s.onnx.partial").write_bytes(MODEL * 2)
    script.answers = [problem(416, code="range_not_satisfiable", detail="Too far."), file(MODEL)]
    assert dram.students.download("stu_1", tmp_path / "s.onnx").read_bytes() == MODEL


def test_a_damaged_download_is_refused_and_not_kept(dram: Dram, script: Script, tmp_path: Path) -> None:
    script.answers = [file(MODEL[:-1] + b"!")]
    with pytest.raises(DamagedDownloadError, match="the service stated"):
        dram.students.download("stu_1", tmp_path / "s.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_download_without_a_digest_is_refused(dram: Dram, script: Script, tmp_path: Path) -> None:
    script.answers = [Answer(body=MODEL)]
    with pytest.raises(DamagedDownloadError):
        dram.students.download("stu_1", tmp_path / "s.onnx")


def test_a_refused_download_leaves_nothing(dram: Dram, script: Script, tmp_path: Path) -> None:
    script.answers = [problem(404, code="student_not_found", detail="There is no student.")]
    with pytest.raises(DramApiError, match="There is no student"):
        dram.students.download_bundle("stu_1", tmp_path / "s.zip")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_packed_by_class_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/1.png", "test/a/3.png", ".git/x", "a/.DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    with packed(tmp_path) as (name, archive), zipfile.ZipFile(archive) as found:
        assert name == tmp_path.name
        assert found.namelist() == ["a/1.png", "b/2.png", "test/a/3.png"]
        assert found.read("test/a/3.png") == b"test/a/3.png"


def test_the_same_files_make_the_same_zip() -> None:
    files: list[tuple[str, Path | bytes]] = [("a/1.png", b"one"), ("b/2.png", b"two")]
    with packed(files) as (_, first), packed(list(files)) as (_, second):
        assert first.read() == second.read()


def test_a_zip_is_sent_as_it_is(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a/1.png", "one")
    (tmp_path / "flowers.zip").write_bytes(content.getvalue())
    with packed(tmp_path / "flowers.zip") as (name, archive_file):
        assert (name, archive_file.read()) == ("flowers", content.getvalue())


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_nothing_to_upload_is_said_before_anything_is_sent(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClientError, match=r"neither a folder|holds no files"), packed(tmp_path / name):
        pass


def test_the_asynchronous_client_does_the_same(script: Script, tmp_path: Path) -> None:
    script.answers = [
        None,
        job("queued"),
        stream((1, "job.created"), cut=True),
        stream((2, "job.succeeded")),
        file(MODEL, cut=200_000),
        lambda asked: file(MODEL[int(asked.headers["Range"][6:-1]) :], status=206),
        problem(409, code="too_late", detail="It has ended."),
    ]

    async def use() -> None:
        async with AsyncDram(script.url, "dram_k", timeout_s=5) as dram:
            assert (await dram.jobs.get("job_1")).status == "queued"
            assert [event.id async for event in dram.jobs.events("job_1")] == [1, 2]
            assert (await dram.students.download("stu_1", tmp_path / "s.onnx")).read_bytes() == MODEL
            with pytest.raises(DramApiError, match="It has ended"):
                await dram.jobs.cancel("job_1")

    asyncio.run(use())
    assert script.answers == []


def test_both_clients_offer_the_same_operations() -> None:
    def operations(client: object) -> dict[str, set[str]]:
        return {
            group: {name for name in dir(getattr(client, group)) if not name.startswith("_")}
            for group in ("datasets", "teachers", "jobs", "students")
        }

    with Dram() as blocking:
        assert operations(blocking) == operations(AsyncDram())
