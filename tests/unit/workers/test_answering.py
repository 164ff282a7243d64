"""A stage asks its teacher: a real process at one end of the pipe, the real database at the other."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import ids
from app.db import Database
from app.jobs import lifecycle, queries
from app.jobs.tables import Job, JobEvent, JobStage, Shard, StageOutput, TeacherAnswer
from app.security.secretbox import SecretBox
from app.teachers.tables import Teacher
from app.wiring import Wiring
from models.methods import METHODS
from models.pipeline import Method, Params, Stage
from tests.unit.workers.jobs import claim_of, status_of, submit_to
from workers import runner, tasks
from workers.answering import Answering
from workers.lease import Lease
from workers.runner import ComputeProcess

#: Like the real child, but without torch: runs the program that the claim brings.
CHILD = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from models.errors import BudgetSpent
from workers.asking import PipeLedger
saying = Lock()
def say(kind, **members):
    with saying:
        sys.stdout.write(json.dumps({"kind": kind, **members}) + "\\n"); sys.stdout.flush()
for line in sys.stdin.buffer:
    claim = json.loads(line)
    ledger = PipeLedger(say, sys.stdin.buffer)
    found = {}
    try:
        exec(claim["params"]["program"])
        say("done", files={"found": json.dumps(found)}, bytes=1, facts=None)
    except BudgetSpent as error:
        say("failed", code=error.code, detail=error.detail, hint=error.hint, retryable=False)
"""

Run = Callable[..., str]


@pytest.fixture
def compute(wiring: Wiring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ComputeProcess]:
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(runner, "CHILD", (sys.executable, str(tmp_path / "child.py")))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    asking = Stage("only", lambda context, params: None, output="trained", inputs=(), asks=True)
    toy = Method("toy", "Toy", "none", needs=frozenset(), params=Params, stages=(asking,))
    monkeypatch.setitem(METHODS, "toy", toy)
    made = ComputeProcess(wiring.settings)
    yield made
    made.kill()


@pytest.fixture
def run(wiring: Wiring, compute: ComputeProcess) -> Run:
    """Has a worker run a job of one stage: that program. The job's id."""
    quick = replace(wiring, settings=wiring.settings.model_copy(update={"heartbeat_s": 0.1}))

    def run(program: str, **columns: Any) -> str:
        job_id = submit_to(wiring, **columns)
        with wiring.database.writing() as session:
            of_job = sa.update(JobStage).where(JobStage.job_id == job_id)
            session.execute(of_job.values(params={"program": textwrap.dedent(program)}, output="made"))
            session.execute(
                sa.insert(JobStage).values(
                    id=ids.new("stg"), job_id=job_id, position=1, name="later", key="l", output="bundle",
                    needs=["made"], queue="cpu", weight=1.0, params={}, shards=1, status="waiting",
                )
            )  # fmt: skip
        tasks.work(quick, compute, claim_of(wiring, job_id))
        return job_id

    return run


def job_of(wiring: Wiring, job_id: str) -> Job:
    with wiring.database.reading() as session:
        return session.get_one(Job, job_id)


def found(wiring: Wiring, job_id: str) -> Any:
    """What the program has found."""
    with wiring.database.reading() as session:
        key = sa.select(Shard.key).where(Shard.job_id == job_id).scalar_subquery()
        files = session.scalars(sa.select(StageOutput.files).where(StageOutput.key == key)).one()
    return json.loads(files["found"])


ASKS = """
names = [f"i{number}" for number in range(60)]
known = ledger.known("teacher", names)
def ask(name):
    ledger.reserve(1)
    ledger.record("teacher", {name: name.encode()})
with ThreadPoolExecutor(8) as threads:
    list(threads.map(ask, [name for name in names if name not in known]))
found = {name: answer.decode() for name, answer in ledger.known("teacher", names).items()}
"""


def test_many_threads_ask_and_a_second_job_finds_what_the_first_has_paid(wiring: Wiring, run: Run) -> None:
    first = run(ASKS, query_budget=60)
    assert (job_of(wiring, first).queries_spent, job_of(wiring, first).queries_cached) == (60, 0)
    assert found(wiring, first) == {f"i{number}": f"i{number}" for number in range(60)}
    second = run(ASKS, query_budget=0)
    job = job_of(wiring, second)
    assert (job.queries_spent, job.shown_spent) == (0, 0)
    assert found(wiring, second) == found(wiring, first)


def test_answers_of_earlier_jobs_are_counted_once_when_the_stage_is_done(wiring: Wiring, run: Run) -> None:
    run("ledger.record('teacher', {'i1': b'1', 'i2': b'2'})")
    job_id = run("ledger.known('teacher', ['i1', 'i2', 'i3'])")
    job = job_of(wiring, job_id)
    assert (job.queries_cached, job.shown_cached) == (2, 2)


def test_a_budget_that_does_not_suffice_fails_the_job(wiring: Wiring, run: Run) -> None:
    job = job_of(wiring, run(ASKS, query_budget=50))
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error["code"], job.error["stage"], job.error["retryable"]) == (
        "query_budget_spent",
        "only",
        False,
    )
    assert "50 questions" in job.error["detail"]
    assert "query_budget" in job.error["hint"]
    assert (job.queries_spent, job.shown_spent) == (50, 50)
    with wiring.database.reading() as session:
        kept = session.scalar(sa.select(sa.func.count()).select_from(TeacherAnswer))
    assert kept is not None
    assert 40 < kept <= 50  # what was answered until then; some threads were in the middle


def test_questions_taken_back_may_be_asked_again(wiring: Wiring, run: Run) -> None:
    job_id = run("ledger.reserve(10); ledger.release(4); ledger.reserve(4)", query_budget=10)
    assert job_of(wiring, job_id).queries_spent == 10


class LosesItsFirstCommit:
    """A database whose connection breaks when the first write unit has been committed, but not confirmed."""

    def __init__(self, database: Database) -> None:
        self._database, self.lost = database, 0

    @contextmanager
    def writing(self) -> Iterator[Session]:
        with self._database.writing() as session:
            yield session
        self.lost += 1
        if self.lost == 1:
            raise sa.exc.OperationalError("COMMIT", {}, Exception("connection lost"))


@pytest.mark.parametrize(("call", "spent"), [("release", 6), ("reserve", 18)])
def test_a_commit_that_may_have_been_lost_never_makes_the_job_spend_more(
    wiring: Wiring, call: str, spent: int
) -> None:
    job_id = submit_to(wiring)
    held = claim_of(wiring, job_id)
    with wiring.database.writing() as session:
        queries.reserve(session, held, 10)
    losing: Any = LosesItsFirstCommit(wiring.database)
    answering = Answering(Lease(replace(wiring, database=losing), held))
    assert answering.reply(call, {"count": 4}) == {"result": None}
    assert job_of(wiring, job_id).queries_spent == spent


FOR_EVER = "while True: ledger.reserve(1)"


def test_a_job_is_cancelled_while_it_asks(wiring: Wiring, run: Run, compute: ComputeProcess) -> None:
    def cancel() -> None:
        with wiring.database.writing() as session:
            job_id = session.scalars(sa.select(Job.id)).one()
            lifecycle.request_cancel(session, lifecycle.lock(session, job_id))

    timer = Timer(0.8, cancel)
    timer.start()
    job_id = run(FOR_EVER)
    timer.join()
    assert status_of(wiring, job_id) == "cancelled"
    assert compute._process is None  # killed
    job = job_of(wiring, job_id)
    assert job.shown_spent == job.queries_spent > 0


def test_a_worker_that_lost_its_claim_asks_no_more(wiring: Wiring, run: Run, compute: ComputeProcess) -> None:
    def take_away() -> None:
        with wiring.database.writing() as session:
            session.execute(sa.update(Shard).values(epoch=Shard.epoch + 1))

    timer = Timer(0.8, take_away)
    timer.start()
    job_id = run(FOR_EVER)
    timer.join()
    assert status_of(wiring, job_id) == "running"
    assert compute._process is None


def own_teacher(wiring: Wiring, sealed_for: str = "") -> str:
    teacher_id = ids.new("tch")
    secret = json.dumps({"X-Key": "hush"}).encode()
    with wiring.database.writing() as session:
        session.add(
            Teacher(
                id=teacher_id, tenant="t", title="Mine", kind="http", spec={}, files={}, header_names=["X-Key"],
                secret=SecretBox.sealing(wiring.settings).seal(secret, sealed_for or teacher_id),
            )
        )  # fmt: skip
    return teacher_id


def change_teacher(wiring: Wiring, teacher: str) -> None:
    with wiring.database.writing() as session:
        session.execute(sa.update(Job).values(teacher=teacher))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)  # which makes a key of its own
def test_the_process_is_given_the_secret_headers_of_the_teacher(
    wiring: Wiring, compute: ComputeProcess, capfd: pytest.CaptureFixture[str]
) -> None:
    job_id = submit_to(wiring)
    change_teacher(wiring, own_teacher(wiring))
    with wiring.database.writing() as session:
        session.execute(
            sa.update(JobStage).values(params={"program": "raise BudgetSpent(str(claim['headers']))"})
        )
    tasks.work(wiring, compute, claim_of(wiring, job_id))
    error = job_of(wiring, job_id).error
    assert error is not None
    assert error["detail"] == "{'X-Key': 'hush'}"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_headers_that_cannot_be_opened_are_told_in_words(wiring: Wiring, compute: ComputeProcess) -> None:
    job_id = submit_to(wiring)
    change_teacher(wiring, own_teacher(wiring, sealed_for="another row"))
    tasks.work(wiring, compute, claim_of(wiring, job_id))
    with wiring.database.reading() as session:
        retried = sa.select(JobEvent.data).where(JobEvent.type == "stage.retried")
        (data,) = session.scalars(retried)
    assert "DRAM_SECRET_KEY" in data["reason"]
    assert compute._process is None  # nothing was started
