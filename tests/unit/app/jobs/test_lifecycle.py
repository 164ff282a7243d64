"""The state machine, driven by hand on SQLite: claims, fencing, loss, cancel, retry, reuse."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app import ids
from app.db import Base, Database
from app.jobs import claims, events, lifecycle, plan, service
from app.jobs.claims import Claim, LeaseLost
from app.jobs.lifecycle import JobError
from app.jobs.tables import Job, JobEvent, JobStage, Shard, StageOutput
from app.settings import Settings
from app.students.tables import Student
from app.tables import Dataset
from models.pipeline import JobShape, Method, Params, Stage

SETTINGS = Settings(lease_ttl_s=60, max_attempts=3, reap_s=0.001, stall_s=0.05)
FACTS = {"classes": ["a", "b"], "summary": {"accuracy": 0.9}}


def _nothing(context: Any, params: Any) -> None: ...


def method(student_version: int = 1) -> Method:
    return Method(
        name="toy",
        title="Toy",
        source="none",
        needs=frozenset(),
        params=Params,
        stages=(
            Stage("ask", _nothing, output="answers", inputs=("support",), shards=lambda shape, params: 2),
            Stage(
                "train", _nothing, output="trained", inputs=("answers", "student"), version=student_version
            ),
            Stage("bundle", _nothing, output="bundle", inputs=("trained",), queue="cpu"),
        ),
    )


def database_at(path: Path) -> Database:
    database = Database(f"sqlite:///{path}")
    Base.metadata.create_all(database.engine)
    with database.writing() as session:
        session.add(
            Dataset(
                id="ds_1", tenant="t", name="d", digest="d", classes=["a", "b"], splits={}, smallest_class=2, report={}
            )
        )  # fmt: skip
    return database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = database_at(tmp_path / "dram.db")
    yield made
    made.close()


def submit(database: Database, toy: Method | None = None) -> str:
    """A job of the toy method, as the service would write it."""
    sources = {"support": {"files": {"images.zip": "d1"}}, "student": {"files": {"student.json": "d2"}}}
    toy = toy or method()
    shape = JobShape(classes=2, support=4, smallest_class=2)
    with database.writing() as session:
        job = Job(
            id=ids.new("job"), tenant="t", dataset_id="ds_1", teacher="x", method="toy", student="s",
            preset="draft", params={}, seed=0, labels={}, sources=sources, shape={}, status="queued",
            attempt=1, percent=0.0, last_event=0, created_at=time.time(),
        )  # fmt: skip
        session.add(job)
        session.flush()
        events.append(session, job, "job.created")
        plan.write(session, job, plan.stages(toy, shape, sources, Params(), 0))
        lifecycle.start(session, job)
    return job.id


def ready(database: Database, job_id: str) -> list[str]:
    with database.reading() as session:
        select = (
            sa.select(Shard.id)
            .where(Shard.job_id == job_id, Shard.status == "ready")
            .order_by(Shard.position)
        )
        return list(session.scalars(select))


def take(database: Database, shard_id: str, worker: str = "w") -> Claim | None:
    with database.writing() as session:
        return claims.claim(session, shard_id, worker, SETTINGS)[0]


def finish(database: Database, claim: Claim) -> None:
    facts = FACTS if claim.output == "bundle" else None
    with database.writing() as session:
        claims.complete(session, claim, {"file": f"blob-{claim.shard_id}"}, 1, facts)


def run_to_end(database: Database, job_id: str) -> list[str]:
    """Claim and finish whatever is ready until nothing is; the stages that ran."""
    ran = []
    while shards := ready(database, job_id):
        claim = take(database, shards[0])
        if claim is not None:
            ran.append(claim.stage)
            finish(database, claim)
    return ran


def job_of(database: Database, job_id: str) -> Job:
    with database.reading() as session:
        return session.get_one(Job, job_id)


def types(database: Database, job_id: str) -> list[str]:
    with database.reading() as session:
        rows = session.scalars(
            sa.select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.number)
        ).all()
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    return [row.type for row in rows]


def let_lease_end(database: Database) -> None:
    with database.writing() as session:
        session.execute(sa.update(Shard).where(Shard.status == "running").values(lease_until=0.0))


def reap(database: Database) -> None:
    with database.reading() as session:
        running = list(
            session.scalars(sa.select(Shard.id).where(Shard.status == "running", Shard.lease_until < 1.0))
        )
    for shard_id in running:
        with database.writing() as session:
            claims.reap(session, shard_id, SETTINGS)


def test_a_job_runs_its_stages_in_order_and_ends_with_one_student(database: Database) -> None:
    job_id = submit(database)
    assert len(ready(database, job_id)) == 2  # both shards of `ask`; `train` waits for them
    assert run_to_end(database, job_id) == ["ask", "ask", "train", "bundle"]
    job = job_of(database, job_id)
    assert (job.status, job.percent) == ("succeeded", 100.0)
    assert types(database, job_id) == [
        "job.created", "job.started", "stage.started", "stage.progress", "stage.succeeded", "stage.started",
        "stage.succeeded", "stage.started", "stage.succeeded", "job.succeeded",
    ]  # fmt: skip
    with database.reading() as session:
        student = session.scalars(sa.select(Student)).one()
    assert (student.id, student.job_id, student.summary) == (job.student_id, job_id, FACTS["summary"])


def test_a_stage_gets_the_outputs_of_all_shards_of_its_inputs_in_order(database: Database) -> None:
    job_id = submit(database)
    first, second = ready(database, job_id)
    for shard_id in (second, first):
        claim = take(database, shard_id)
        assert claim is not None
        finish(database, claim)
    claim = take(database, ready(database, job_id)[0])
    assert claim is not None
    assert claim.inputs["answers"] == [{"file": f"blob-{first}"}, {"file": f"blob-{second}"}]
    assert claim.inputs["student"] == [{"student.json": "d2"}]


def test_a_locked_job_is_as_it_is_then_and_not_as_it_was_read_before(database: Database) -> None:
    job_id = submit(database)
    with database.reading() as session:  # without a transaction: SQLite's would let nobody else write
        job = session.get_one(Job, job_id)
        with database.writing() as other:
            lifecycle.request_cancel(other, lifecycle.lock(other, job_id))
        assert lifecycle.lock(session, job_id) is job
        assert job.status == "cancelled"


def test_a_shard_is_claimed_once_however_often_it_is_rung(database: Database) -> None:
    job_id = submit(database)
    shard_id = ready(database, job_id)[0]
    assert take(database, shard_id, "w1") is not None
    assert take(database, shard_id, "w2") is None
    assert take(database, "shd_unknown") is None


def test_a_stale_worker_changes_nothing_after_another_claimed_its_shard(database: Database) -> None:
    job_id = submit(database)
    shard_id = ready(database, job_id)[0]
    stale = take(database, shard_id, "w1")
    let_lease_end(database)
    fresh = take(database, shard_id, "w2")
    assert stale is not None
    assert fresh is not None
    assert fresh.epoch == stale.epoch + 1
    for write in (
        lambda session: claims.complete(session, stale, {"file": "stale"}, 1),
        lambda session: claims.renew(session, stale, SETTINGS, 5, 10),
        lambda session: claims.keep_checkpoint(session, stale, 5, {"c": "stale"}),
        lambda session: claims.fail(session, stale, JobError("x", "y"), SETTINGS),
        lambda session: claims.release(session, stale),
    ):
        with pytest.raises(LeaseLost), database.writing() as session:
            write(session)
    finish(database, fresh)
    with database.reading() as session:
        assert session.scalars(sa.select(StageOutput)).one().files == {"file": f"blob-{shard_id}"}
        assert session.get_one(Shard, shard_id).checkpoint is None


def test_lost_work_is_tried_again_from_its_checkpoint_and_counted(database: Database) -> None:
    job_id = submit(database)
    shard_id = ready(database, job_id)[0]
    claim = take(database, shard_id)
    assert claim is not None
    for step in (10, 20):
        with database.writing() as session:
            claims.keep_checkpoint(session, claim, step, {"state": f"blob-{step}"})
    let_lease_end(database)
    reap(database)
    again = take(database, shard_id, "w2")
    assert again is not None
    assert again.attempt == 2
    assert again.checkpoint == {
        "step": 20, "files": {"state": "blob-20"}, "previous": {"step": 10, "files": {"state": "blob-10"}}
    }  # fmt: skip
    assert job_of(database, job_id).attempt == 2
    assert types(database, job_id).count("stage.retried") == 1


def test_the_two_newest_checkpoints_are_remembered_and_the_third_is_handed_back(database: Database) -> None:
    claim = take(database, ready(database, submit(database))[0])
    assert claim is not None
    forgotten = []
    for step in (10, 20, 30, 40):
        with database.writing() as session:
            files = {"state": f"blob-{step}"}
            forgotten.append(claims.keep_checkpoint(session, claim, step, files))
    assert forgotten == [set(), set(), {"blob-10"}, {"blob-20"}]


def test_work_that_always_loses_its_worker_fails_the_job_after_three_times(database: Database) -> None:
    job_id = submit(database)
    shard_id, other = ready(database, job_id)
    for _ in range(3):
        assert take(database, shard_id) is not None
        let_lease_end(database)
        reap(database)
    job = job_of(database, job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error["code"], job.error["stage"], job.error["retryable"]) == ("worker_lost", "ask", True)
    assert take(database, shard_id) is None
    assert take(database, other) is None
    assert types(database, job_id)[-1] == "job.failed"


def test_an_error_that_may_pass_is_tried_again_and_one_that_will_not_is_final(database: Database) -> None:
    job_id = submit(database)
    shard_id = ready(database, job_id)[0]
    claim = take(database, shard_id)
    assert claim is not None
    with database.writing() as session:
        claims.fail(session, claim, JobError("disk_full", "full", retryable=True), SETTINGS)
    time.sleep(0.01)
    claim = take(database, shard_id)
    assert claim is not None
    with database.writing() as session:
        claims.fail(session, claim, JobError("data_unusable", "broken"), SETTINGS)
    assert job_of(database, job_id).status == "failed"


def test_a_pause_that_the_teacher_asks_for_is_kept_between_attempts(database: Database) -> None:
    job_id = submit(database)
    shard_id = ready(database, job_id)[0]
    claim = take(database, shard_id)
    assert claim is not None
    busy = JobError("teacher_busy", "no time", retryable=True, after_s=120.0)
    with database.writing() as session:
        claims.fail(session, claim, busy, SETTINGS)
        ready_at = session.get_one(Shard, shard_id).ready_at
    assert ready_at is not None
    assert 110 < ready_at - time.time() < 121
    assert take(database, shard_id) is None


def test_a_teacher_that_asks_for_a_very_long_pause_is_not_asked_again_by_the_job(database: Database) -> None:
    job_id = submit(database)
    claim = take(database, ready(database, job_id)[0])
    assert claim is not None
    with database.writing() as session:
        busy = JobError("teacher_busy", "in an hour", retryable=True, after_s=3600.0)
        claims.fail(session, claim, busy, SETTINGS)
    job = job_of(database, job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error["code"], job.error["retryable"]) == ("teacher_busy", True)


def test_cancel_stops_waiting_work_now_and_running_work_at_its_heartbeat(database: Database) -> None:
    job_id = submit(database)
    claim = take(database, ready(database, job_id)[0])
    assert claim is not None
    with database.writing() as session:
        lifecycle.request_cancel(session, lifecycle.lock(session, job_id))
    assert job_of(database, job_id).status == "cancelling"
    assert ready(database, job_id) == []
    with database.writing() as session:
        assert claims.renew(session, claim, SETTINGS, 1, 10) == "cancel"
    with database.writing() as session:
        claims.stopped(session, claim)
    assert job_of(database, job_id).status == "cancelled"
    assert types(database, job_id)[-1] == "job.cancelled"


def test_a_queued_job_is_cancelled_at_once(database: Database) -> None:
    job_id = submit(database)
    with database.writing() as session:
        lifecycle.request_cancel(session, lifecycle.lock(session, job_id))
    assert job_of(database, job_id).status == "cancelled"


def test_a_cancelling_job_whose_worker_died_is_cancelled_by_the_reaper(database: Database) -> None:
    job_id = submit(database)
    take(database, ready(database, job_id)[0])
    with database.writing() as session:
        lifecycle.request_cancel(session, lifecycle.lock(session, job_id))
    let_lease_end(database)
    reap(database)
    assert job_of(database, job_id).status == "cancelled"


def test_a_job_past_its_deadline_is_cancelled_and_says_why(database: Database) -> None:
    job_id = submit(database)
    claim = take(database, ready(database, job_id)[0])
    assert claim is not None
    with database.writing() as session:
        session.execute(sa.update(Job).values(deadline_at=1.0))
    with database.writing() as session:
        assert claims.renew(session, claim, SETTINGS, 1, 10) == "cancel"
    with database.writing() as session:
        claims.stopped(session, claim)
    job = job_of(database, job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("cancelled", "deadline_exceeded")


def test_retry_continues_where_the_job_stopped(database: Database) -> None:
    job_id = submit(database)
    first, second = ready(database, job_id)
    claim = take(database, first)
    assert claim is not None
    finish(database, claim)
    claim = take(database, second)
    assert claim is not None
    with database.writing() as session:
        claims.fail(session, claim, JobError("x", "y"), SETTINGS)
    with database.writing() as session:
        lifecycle.retry(session, lifecycle.lock(session, job_id))
    job = job_of(database, job_id)
    assert (job.status, job.error, job.attempt) == ("queued", None, 2)
    assert run_to_end(database, job_id) == ["ask", "train", "bundle"]  # only the failed shard of `ask` again
    assert job_of(database, job_id).status == "succeeded"


def test_a_second_job_reuses_equal_stages_and_an_identical_one_is_done_at_once(database: Database) -> None:
    first = submit(database)
    run_to_end(database, first)
    other = submit(database, method(student_version=2))
    assert run_to_end(database, other) == ["train", "bundle"]
    same = submit(database)
    job = job_of(database, same)
    assert job.status == "succeeded"
    assert job.student_id not in (None, job_of(database, first).student_id)
    with database.reading() as session:
        states = session.execute(sa.select(JobStage.status).where(JobStage.job_id == same)).scalars().all()
    assert set(states) == {"reused"}


def test_a_shard_that_another_job_made_meanwhile_is_not_computed_again(database: Database) -> None:
    first, second = submit(database), submit(database)
    run_to_end(database, first)
    assert run_to_end(database, second) == []
    assert job_of(database, second).status == "succeeded"


def test_progress_never_falls_and_stalls_are_noticed(database: Database) -> None:
    job_id = submit(database)
    claim = take(database, ready(database, job_id)[0])
    assert claim is not None
    with database.writing() as session:
        assert claims.renew(session, claim, SETTINGS, 50, 100) == "go on"
    percent = job_of(database, job_id).percent
    assert percent == pytest.approx(
        100 * 0.25 / 3, abs=0.01
    )  # half of one of two shards, one of three stages
    time.sleep(0.06)
    with database.writing() as session:
        assert claims.renew(session, claim, SETTINGS, 50, 100) == "stalled"
    with database.writing() as session:
        claims.fail(session, claim, JobError("stage_stalled", "s", retryable=True), SETTINGS)
    time.sleep(0.01)
    claim = take(database, claim.shard_id)
    assert claim is not None
    with database.writing() as session:
        claims.renew(session, claim, SETTINGS, 1, 100)
    assert job_of(database, job_id).percent >= percent


def test_a_released_shard_does_not_count_as_tried(database: Database) -> None:
    job_id = submit(database)
    claim = take(database, ready(database, job_id)[0])
    assert claim is not None
    with database.writing() as session:
        claims.release(session, claim)
    again = take(database, claim.shard_id)
    assert again is not None
    assert again.attempt == 1
    assert job_of(database, job_id).attempt == 1


class AnyOrder(RuleBasedStateMachine):
    """Two workers, crashes, cancels and retries in any order: the invariants of a job always hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.database = database_at(Path(self.folder.name) / "dram.db")
        self.job_id = submit(self.database)
        self.held: list[Claim] = []
        self.highest = 0.0
        self.shown: tuple[int, Any] = (0, None)

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()

    @precondition(lambda self: ready(self.database, self.job_id))
    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        claim = take(self.database, data.draw(st.sampled_from(ready(self.database, self.job_id))))
        if claim is not None:
            self.held.append(claim)

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        ending=st.sampled_from(["complete", "fail", "poison", "renew", "release", "die", "stop"]),
    )
    def end(self, data: st.DataObject, ending: str) -> None:
        claim = data.draw(st.sampled_from(self.held))
        if ending != "renew":
            self.held.remove(claim)
        if ending == "die":
            let_lease_end(self.database)
            reap(self.database)
            return
        try:
            with self.database.writing() as session:
                if ending == "renew":
                    claims.renew(session, claim, Settings(), 1, 10)
                elif ending == "complete":
                    claims.complete(session, claim, {"f": "b"}, 1, FACTS)
                elif ending == "release":
                    claims.release(session, claim)
                elif ending == "stop" and session.get_one(Job, self.job_id).status == "cancelling":
                    claims.stopped(session, claim)
                else:
                    claims.fail(session, claim, JobError("e", "d", retryable=ending == "fail"), SETTINGS)
        except LeaseLost:
            pass

    @rule()
    def cancel(self) -> None:
        with self.database.writing() as session:
            job = lifecycle.lock(session, self.job_id)
            if job.status in ("queued", "running"):
                lifecycle.request_cancel(session, job)

    @rule()
    def retry(self) -> None:
        with self.database.writing() as session:
            job = lifecycle.lock(session, self.job_id)
            if job.status in ("failed", "cancelled"):
                lifecycle.retry(session, job)

    @invariant()
    def the_history_is_sound(self) -> None:
        job = job_of(self.database, self.job_id)
        seen = types(self.database, self.job_id)
        with self.database.reading() as session:
            shards = session.scalars(sa.select(Shard)).all()
            students = session.scalar(sa.select(sa.func.count()).select_from(Student))
        assert all(shard.attempt <= SETTINGS.max_attempts for shard in shards)
        assert students == seen.count("job.succeeded") == (job.status == "succeeded")
        assert (job.error is not None) == (job.status == "failed")
        if job.status in lifecycle.FINISHED:
            assert seen[-1] == f"job.{job.status}"
            assert not any(shard.status in ("ready", "running", "waiting") for shard in shards)
        assert job.percent >= self.highest
        self.highest = job.percent

    @invariant()
    def what_the_api_shows_changes_only_with_an_event(self) -> None:
        with self.database.reading() as session:
            job = session.get_one(Job, self.job_id)
            shown = service.view(session, job).model_dump(exclude={"progress": {"eta"}})
        version, before = self.shown
        assert job.last_event > version or shown == before
        self.shown = (job.last_event, shown)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = hypothesis_settings(max_examples=25, stateful_step_count=25, deadline=None)
