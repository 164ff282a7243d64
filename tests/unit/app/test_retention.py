"""What retention forgets, and what it must never forget."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import ids, retention
from app.datasets.tables import Dataset, DatasetImage
from app.db import now
from app.jobs import claims, lifecycle, plan
from app.jobs.tables import IdempotencyKey, Job, JobStage, Shard, StageOutput, Worker
from app.storage import YOUNG_S, LocalStore
from app.students.tables import Student
from app.teachers.tables import Teacher
from app.wiring import Wiring
from models.pipeline import JobShape, Method, Params, Stage
from tests.service.stack import few_shot_zip

DAY_S = 86400.0
LONG_AGO = time.time() - 365 * DAY_S


def blob(wiring: Wiring, content: str, *, age: float = 2 * YOUNG_S) -> str:
    """A blob of that age."""
    assert isinstance(wiring.blobs, LocalStore)
    path = wiring.settings.home / "content"
    path.write_text(content)
    digest = wiring.blobs.put(path)
    os.utime(wiring.blobs.path(digest), (time.time() - age,) * 2)
    return digest


def add_dataset(session: Session, splits: dict[str, str], deleted_at: float | None = None) -> str:
    dataset = Dataset(
        id=ids.new("ds"), tenant="t", name="d", digest=ids.new("digest"), classes=["a", "b"], smallest_class=2,
        report={}, deleted_at=deleted_at,
        splits={name: {"digest": digest, "images": 4, "bytes": 1} for name, digest in splits.items()},
    )  # fmt: skip
    session.add(dataset)
    session.flush()
    return dataset.id


def add_job(
    session: Session, status: str, *, key: str = "", shard_status: str = "waiting",
    sources: dict[str, Any] | None = None, checkpoint: dict[str, Any] | None = None,
    dataset_id: str = "", finished_at: float | None = None,
) -> Job:  # fmt: skip
    """A job of one stage and one shard, whose output has that key."""
    job = Job(
        id=ids.new("job"), tenant="t", dataset_id=dataset_id or add_dataset(session, {}), teacher="x", method="toy",
        student="s", preset="draft", params={}, seed=0, labels={}, sources=sources or {}, shape={}, status=status,
        finished_at=finished_at,
    )  # fmt: skip
    session.add(job)
    session.flush()
    stage = JobStage(
        id=ids.new("stg"), job_id=job.id, position=0, name="only", key=key, output="bundle", needs=[], queue="cpu",
        weight=1.0, params={}, shards=1, status=shard_status,
    )  # fmt: skip
    session.add(stage)
    session.flush()
    session.add(
        Shard(
            id=ids.new("shd"), job_id=job.id, stage_id=stage.id, position=0, key=key, queue="cpu",
            status=shard_status, checkpoint=checkpoint,
        )
    )  # fmt: skip
    session.flush()
    return job


def add_output(session: Session, key: str, digest: str, used_at: float) -> None:
    session.add(
        StageOutput(tenant="t", key=key, files={"f": digest}, bytes=1, created_at=LONG_AGO, used_at=used_at)
    )


def outputs(wiring: Wiring) -> set[str]:
    with wiring.database.reading() as session:
        return set(session.scalars(sa.select(StageOutput.key)))


def test_outputs_that_nobody_has_used_for_long_go_with_their_blobs(wiring: Wiring) -> None:
    days = wiring.settings.retention_days
    old, recent = blob(wiring, "old"), blob(wiring, "recent")
    with wiring.database.writing() as session:
        add_output(session, "old", old, time.time() - (days + 1) * DAY_S)
        add_output(session, "recent", recent, time.time() - (days - 1) * DAY_S)
    assert retention.sweep(wiring) == 1
    assert outputs(wiring) == {"recent"}
    assert not wiring.blobs.exists(old)
    assert wiring.blobs.exists(recent)


@pytest.mark.parametrize(
    ("status", "stays"),
    [("queued", True), ("running", True), ("cancelling", True), ("succeeded", False), ("failed", False)],
)
def test_old_outputs_of_unfinished_jobs_stay(status: str, stays: bool, wiring: Wiring) -> None:
    with wiring.database.writing() as session:
        add_output(session, "made", blob(wiring, "made"), LONG_AGO)
        add_job(session, status, key="made", shard_status="succeeded")
    retention.sweep(wiring)
    assert outputs(wiring) == ({"made"} if stays else set())


def test_old_idempotency_keys_and_worker_rows_go(wiring: Wiring) -> None:
    with wiring.database.writing() as session:
        for name, age in (("old", 31 * DAY_S), ("recent", 29 * DAY_S)):
            session.add(
                IdempotencyKey(
                    tenant="t", key=name, request_digest="d", resource_id="r", created_at=time.time() - age
                )
            )
        for name, age in (("dead", 2 * 3600.0), ("alive", 10.0)):
            session.add(Worker(id=name, queues=[], device="cpu", seen_at=time.time() - age))
    retention.sweep(wiring)
    with wiring.database.reading() as session:
        assert session.scalars(sa.select(IdempotencyKey.key)).all() == ["recent"]
        assert session.scalars(sa.select(Worker.id)).all() == ["alive"]


def test_whatever_a_row_names_stays_however_old_it_is(wiring: Wiring) -> None:
    named = {
        name: blob(wiring, name)
        for name in ("split", "source", "output", "student", "checkpoint", "previous", "only source of a job")
    }
    orphan = blob(wiring, "orphan")
    checkpoint = {"step": 20, "files": {"c": named["checkpoint"]},
                  "previous": {"step": 10, "files": {"c": named["previous"]}}}  # fmt: skip
    with wiring.database.writing() as session:
        add_dataset(session, {"support": named["split"]})
        add_dataset(session, {"support": named["only source of a job"]}, deleted_at=LONG_AGO)
        sources = {"teacher": {"files": {"teacher.json": named["source"]}},
                   "support": {"files": {"images.zip": named["only source of a job"]}}}  # fmt: skip
        add_job(session, "failed", shard_status="failed", sources=sources, checkpoint=checkpoint)
        add_output(session, "used", named["output"], time.time())
        made = add_job(session, "succeeded", shard_status="succeeded")
        session.add(
            Student(
                id=ids.new("stu"), tenant="t", job_id=made.id, dataset_id=made.dataset_id, teacher="x",
                method="toy", architecture="s", classes=["a"], files={"model.onnx": named["student"]}, summary={},
            )
        )  # fmt: skip
    assert retention.sweep(wiring) == 1
    assert not wiring.blobs.exists(orphan)
    assert [name for name, digest in named.items() if not wiring.blobs.exists(digest)] == []


def add_teacher(session: Session, model: str, deleted_at: float | None = None) -> None:
    session.add(
        Teacher(
            id=ids.new("tch"), tenant="t", title="own", kind="onnx", spec={}, files={"model.onnx": model},
            header_names=[], secret=None, probe=None, deleted_at=deleted_at,
        )
    )  # fmt: skip


def test_a_model_stays_as_long_as_its_teacher_lives_or_a_job_names_it(wiring: Wiring) -> None:
    named = {name: blob(wiring, name) for name in ("of a live teacher", "of an unfinished job", "of nobody")}
    with wiring.database.writing() as session:
        add_teacher(session, named["of a live teacher"])
        add_teacher(session, named["of an unfinished job"], deleted_at=LONG_AGO)
        add_teacher(session, named["of nobody"], deleted_at=LONG_AGO)
        files = {"teacher.json": blob(wiring, "spec"), "model.onnx": named["of an unfinished job"]}
        add_job(session, "running", sources={"teacher": {"files": files}})
    assert retention.sweep(wiring) == 1
    assert [name for name, digest in named.items() if not wiring.blobs.exists(digest)] == ["of nobody"]


def test_the_images_of_a_deleted_data_set_that_no_job_used_go(wiring: Wiring) -> None:
    images = blob(wiring, "images")
    with wiring.database.writing() as session:
        add_dataset(session, {"support": images}, deleted_at=time.time())
    assert retention.sweep(wiring) == 1
    assert not wiring.blobs.exists(images)


@pytest.mark.parametrize(
    ("status", "days_ago", "deleted", "stays"),
    [
        ("running", None, True, True),
        ("failed", 29, True, True),
        ("failed", 31, True, False),
        ("succeeded", 31, True, False),
        ("succeeded", 31, False, True),
    ],
)
def test_a_job_holds_the_images_of_a_deleted_data_set_for_a_while_after_its_end_only(
    status: str, days_ago: float | None, deleted: bool, stays: bool, wiring: Wiring
) -> None:
    images = blob(wiring, "images")
    files = {"support": {"files": {"images.zip": images}}}
    with wiring.database.writing() as session:
        ended = None if days_ago is None else time.time() - days_ago * DAY_S
        dataset = add_dataset(session, {"support": images}, LONG_AGO if deleted else None)
        job = add_job(session, status, sources=files, dataset_id=dataset, finished_at=ended)
    retention.sweep(wiring)
    assert wiring.blobs.exists(images) is stays
    with wiring.database.reading() as session:
        assert session.get_one(Job, job.id).sources == (files if stays else {})


def test_the_names_of_the_images_of_a_deleted_data_set_go(wiring: Wiring) -> None:
    with wiring.database.writing() as session:
        for name, deleted_at in (("live", None), ("deleted", LONG_AGO)):
            about: dict[str, Any] = {"split": "support", "file": "0.png", "width": 1, "height": 1}
            dataset = add_dataset(session, {}, deleted_at)
            session.add(DatasetImage(id=ids.new("img"), dataset_id=dataset, name=name, **about))
    retention.sweep(wiring)
    with wiring.database.reading() as session:
        assert session.scalars(sa.select(DatasetImage.name)).all() == ["live"]


def test_the_files_of_a_deleted_student_go(wiring: Wiring) -> None:
    network = blob(wiring, "network")
    with wiring.database.writing() as session:
        made = add_job(session, "succeeded", shard_status="succeeded")
        session.add(
            Student(
                id=ids.new("stu"), tenant="t", job_id=made.id, dataset_id=made.dataset_id, teacher="x", method="toy",
                architecture="s", classes=["a"], files={"model.onnx": network}, summary={}, deleted_at=LONG_AGO,
            )
        )  # fmt: skip
    assert retention.sweep(wiring) == 1
    assert not wiring.blobs.exists(network)


def test_the_checkpoint_of_a_job_that_ended_long_ago_goes(wiring: Wiring) -> None:
    kept = {days: blob(wiring, f"checkpoint {days}") for days in (29, 31)}
    with wiring.database.writing() as session:
        for days, digest in kept.items():
            checkpoint = {"step": 20, "files": {"c": digest}, "previous": None}
            ended = time.time() - days * DAY_S
            add_job(session, "failed", shard_status="failed", checkpoint=checkpoint, finished_at=ended)
    assert retention.sweep(wiring) == 1
    assert [days for days, digest in kept.items() if wiring.blobs.exists(digest)] == [29]


@pytest.mark.parametrize("status", ["succeeded", "reused"])
def test_the_checkpoint_of_work_that_is_done_goes(status: str, wiring: Wiring) -> None:
    kept = blob(wiring, "checkpoint")
    with wiring.database.writing() as session:
        checkpoint = {"step": 20, "files": {"c": kept}, "previous": None}
        add_job(session, "running", shard_status=status, checkpoint=checkpoint)
    assert retention.sweep(wiring) == 1
    assert not wiring.blobs.exists(kept)


def test_a_young_blob_without_a_row_stays(wiring: Wiring) -> None:
    young = blob(wiring, "young", age=YOUNG_S - 60)
    assert retention.sweep(wiring) == 0
    assert wiring.blobs.exists(young)


def test_what_killed_writers_left_is_removed_after_a_day(wiring: Wiring) -> None:
    assert isinstance(wiring.blobs, LocalStore)
    garbage = wiring.blobs.root / "tmp" / "garbage"
    garbage.touch()
    os.utime(garbage, (LONG_AGO, LONG_AGO))
    retention.sweep(wiring)
    assert not garbage.exists()


class Interrupted:
    """A sweep that stops after it has read which blobs are named, until it is told to go on."""

    def __init__(self, wiring: Wiring, monkeypatch: pytest.MonkeyPatch) -> None:
        self._read, self._go_on = Event(), Event()
        named = retention._named

        def stop(session: Session) -> Iterator[str]:
            yield from list(named(session))
            self._read.set()
            assert self._go_on.wait(10)

        monkeypatch.setattr(retention, "_named", stop)
        self._sweep = Thread(target=retention.sweep, args=[wiring])
        self._sweep.start()
        assert self._read.wait(10)

    def finish(self) -> None:
        self._go_on.set()
        self._sweep.join()


def test_an_orphan_that_is_stored_again_during_a_sweep_is_not_swept(
    wiring: Wiring, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    orphan = blob(wiring, "orphan")
    sweep = Interrupted(wiring, monkeypatch)
    (tmp_path / "again").write_text("orphan")
    assert wiring.blobs.put(tmp_path / "again") == orphan
    sweep.finish()
    assert wiring.blobs.exists(orphan)


def test_a_job_of_an_old_teacher_document_keeps_it_from_the_sweep(
    wiring: Wiring, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.jobs import service

    digest = service._store(wiring, "student.json", {"name": "conv4"})
    assert isinstance(wiring.blobs, LocalStore)
    os.utime(wiring.blobs.path(digest), (LONG_AGO, LONG_AGO))
    sweep = Interrupted(wiring, monkeypatch)
    assert service._store(wiring, "student.json", {"name": "conv4"}) == digest
    sweep.finish()
    assert wiring.blobs.exists(digest)


METHOD = Method(
    name="toy", title="Toy", source="none", needs=frozenset(), params=Params,
    stages=(
        Stage("train", lambda context, params: None, output="trained", inputs=("support",)),
        Stage("bundle", lambda context, params: None, output="bundle", inputs=("trained",), queue="cpu"),
    ),
)  # fmt: skip


def submit(wiring: Wiring) -> str:
    sources = {"support": {"files": {"images.zip": "d1"}}}
    shape = JobShape(classes=2, support=4, smallest_class=2)
    with wiring.database.writing() as session:
        job = Job(
            id=ids.new("job"), tenant="t", dataset_id=add_dataset(session, {}), teacher="x", method="toy",
            student="s", preset="draft", params={}, seed=0, labels={}, sources=sources, shape={}, status="queued",
            attempt=1, last_event=0,
        )  # fmt: skip
        session.add(job)
        session.flush()
        plan.write(session, job, plan.stages(METHOD, shape, sources, Params(), 0))
        lifecycle.start(session, job)
    return job.id


def finish_stage(wiring: Wiring, job_id: str) -> str:
    """Do what is ready; the name of its stage."""
    with wiring.database.writing() as session:
        ready = sa.select(Shard.id).where(Shard.job_id == job_id, Shard.status == "ready")
        claim, _ = claims.claim(session, session.scalars(ready).one(), "w", wiring.settings)
        assert claim is not None
        facts = {"classes": ["a"], "summary": {}} if claim.output == "bundle" else None
        claims.complete(session, claim, {"f": "b"}, 1, facts)
    return claim.stage


def forget_outputs(wiring: Wiring) -> None:
    with wiring.database.writing() as session:
        session.execute(sa.update(StageOutput).values(used_at=LONG_AGO))
    retention.sweep(wiring)
    assert outputs(wiring) == set()


def test_a_job_retried_after_its_outputs_were_forgotten_makes_them_again(wiring: Wiring) -> None:
    job_id = submit(wiring)
    assert finish_stage(wiring, job_id) == "train"
    with wiring.database.writing() as session:
        lifecycle.request_cancel(session, lifecycle.lock(session, job_id))
    forget_outputs(wiring)
    with wiring.database.writing() as session:
        lifecycle.retry(session, lifecycle.lock(session, job_id))
    assert [finish_stage(wiring, job_id), finish_stage(wiring, job_id)] == ["train", "bundle"]
    with wiring.database.reading() as session:
        assert session.get_one(Job, job_id).status == "succeeded"


def test_retrying_a_job_makes_its_outputs_used_again(wiring: Wiring) -> None:
    job_id = submit(wiring)
    finish_stage(wiring, job_id)
    with wiring.database.writing() as session:
        lifecycle.request_cancel(session, lifecycle.lock(session, job_id))
        session.execute(sa.update(StageOutput).values(used_at=LONG_AGO))
    with wiring.database.writing() as session:
        lifecycle.retry(session, lifecycle.lock(session, job_id))
    with wiring.database.reading() as session:
        assert session.scalars(sa.select(StageOutput.used_at > now() - 60)).all() == [True]
    assert finish_stage(wiring, job_id) == "bundle"


def test_a_job_reuses_an_output_or_retention_takes_it_but_never_both(wiring: Wiring) -> None:
    """The sweep waits for a job that is being written, and then finds the output used."""
    first = submit(wiring)
    finish_stage(wiring, first)
    finish_stage(wiring, first)
    with wiring.database.writing() as session:
        session.execute(sa.update(StageOutput).values(used_at=LONG_AGO))
    sources = {"support": {"files": {"images.zip": "d1"}}}
    planned = plan.stages(METHOD, JobShape(classes=2, support=4, smallest_class=2), sources, Params(), 0)
    sweep = Thread(target=retention.sweep, args=[wiring])
    with wiring.database.writing() as session:
        job = add_job(session, "queued")
        session.execute(sa.update(JobStage).where(JobStage.job_id == job.id).values(position=9))
        plan.write(session, job, planned)
        sweep.start()
        sweep.join(0.5)
        assert sweep.is_alive()
    sweep.join()
    assert outputs(wiring) == {key for stage in planned for key in stage.shard_keys}


def test_an_upload_during_a_sweep_of_the_same_images_as_a_deleted_data_set_keeps_its_images(
    client: httpx.Client, wiring: Wiring, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"archive": ("set.zip", few_shot_zip(), "application/zip")}
    first = client.post("/v1/datasets", files=files).json()["id"]
    assert client.delete(f"/v1/datasets/{first}").is_success
    assert isinstance(wiring.blobs, LocalStore)
    for digest in wiring.blobs.older_than(-1):
        os.utime(wiring.blobs.path(digest), (LONG_AGO, LONG_AGO))
    sweep = Interrupted(wiring, monkeypatch)
    second = client.post("/v1/datasets", files=files).json()["id"]
    sweep.finish()
    images = client.get(f"/v1/datasets/{second}/images").json()["data"]
    answer = client.get(f"/v1/datasets/{second}/images/{images[0]['id']}")
    assert (second != first, answer.status_code) == (True, 200)
