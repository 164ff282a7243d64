"""Questions to a teacher: counted before they are sent, never above the budget, answered once for a tenant."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from app import ids, retention
from app.db import now
from app.jobs import claims, events, lifecycle, queries, service
from app.jobs.claims import Claim, LeaseLost
from app.jobs.lifecycle import JobError
from app.jobs.queries import Known
from app.jobs.tables import Job, Shard, TeacherAnswer
from app.security.secretbox import SecretBox
from app.teachers import service as teachers
from app.teachers.tables import Teacher
from app.wiring import Wiring
from models.errors import BudgetSpent
from tests.unit.workers.jobs import change_shards, claim_of, submit_to

KEY = base64.b64encode(bytes(range(32))).decode()


def write(wiring: Wiring, change: Callable[..., Any], *arguments: Any) -> Any:
    with wiring.database.writing() as session:
        return change(session, *arguments)


def spent(wiring: Wiring, job_id: str) -> int:
    with wiring.database.reading() as session:
        return session.get_one(Job, job_id).queries_spent


def shown(wiring: Wiring, job_id: str) -> tuple[int, dict[str, Any]]:
    """Version and questions of the job, as GET answers."""
    reading = service.read(wiring, "t", [job_id])[job_id]
    return reading.version, json.loads(reading.document)["queries"]


def test_questions_are_refused_above_the_budget_with_both_numbers(wiring: Wiring) -> None:
    job_id = submit_to(wiring, query_budget=10)
    held = claim_of(wiring, job_id)
    write(wiring, queries.reserve, held, 8)
    with pytest.raises(BudgetSpent, match=r"10 questions .* 8 are spent, and 3 more") as refused:
        write(wiring, queries.reserve, held, 3)
    assert "query_budget" in refused.value.hint
    write(wiring, queries.reserve, held, 2)
    assert spent(wiring, job_id) == 10
    write(wiring, queries.release, held, 4)
    write(wiring, queries.reserve, held, 3)
    assert spent(wiring, job_id) == 9


def test_a_job_without_a_budget_asks_as_it_likes(wiring: Wiring) -> None:
    job_id = submit_to(wiring)
    held = claim_of(wiring, job_id)
    for _ in range(3):
        write(wiring, queries.reserve, held, 10**9)
    assert spent(wiring, job_id) == 3 * 10**9


def test_workers_that_ask_at_once_never_spend_more_than_the_budget(wiring: Wiring) -> None:
    job_id = submit_to(wiring, shards=4, query_budget=100)
    held_by_four = [claim_of(wiring, job_id, f"w{number}") for number in range(4)]

    def greedy(held: Claim) -> int:
        granted = 0
        while True:
            try:
                write(wiring, queries.reserve, held, 7)
            except BudgetSpent:
                return granted
            granted += 7

    with ThreadPoolExecutor(8) as threads:
        granted = sum(threads.map(greedy, held_by_four * 2))
    assert granted == spent(wiring, job_id) == 98


def test_what_was_paid_for_is_kept_though_the_claim_was_lost_meanwhile(wiring: Wiring) -> None:
    job_id = submit_to(wiring)
    stale = claim_of(wiring, job_id)
    change_shards(wiring, lease_until=1.0)
    write(wiring, claims.reap, stale.shard_id, wiring.settings)
    newest = claim_of(wiring, job_id, "another")
    write(wiring, queries.record_answers, stale, "teacher", {"i": b"paid"})
    assert write(wiring, queries.known_answers, newest, "teacher", ["i"]).answers == {"i": b"paid"}


@pytest.mark.parametrize("calls", ["reserve", "release", "known", "cached"])
def test_a_worker_that_lost_its_claim_counts_and_learns_nothing(wiring: Wiring, calls: str) -> None:
    job_id = submit_to(wiring)
    stale = claim_of(wiring, job_id)
    write(wiring, queries.reserve, stale, 5)
    change_shards(wiring, lease_until=1.0)
    write(wiring, claims.reap, stale.shard_id, wiring.settings)
    claim_of(wiring, job_id, "another")
    call: tuple[Callable[..., Any], tuple[Any, ...]] = {
        "reserve": (queries.reserve, (1,)),
        "release": (queries.release, (1,)),
        "known": (queries.known_answers, ("teacher", ["i"])),
        "cached": (queries.count_cached, (1,)),
    }[calls]
    with pytest.raises(LeaseLost):
        write(wiring, call[0], stale, *call[1])
    with wiring.database.reading() as session:
        job = session.get_one(Job, job_id)
        assert session.scalars(sa.select(TeacherAnswer)).all() == []
    assert (job.queries_spent, job.queries_cached) == (5, 0)


def test_answers_are_found_again_by_teacher_and_image_and_say_who_paid(wiring: Wiring) -> None:
    first = claim_of(wiring, submit_to(wiring))
    answers = {f"i{number}": bytes([number % 251, 0, 255]) for number in range(1201)}
    write(wiring, queries.record_answers, first, "teacher", answers)
    write(wiring, queries.record_answers, first, "another teacher", {"i0": b"else"})
    names = [*answers, "never asked"]
    assert write(wiring, queries.known_answers, first, "teacher", names) == Known(answers, earlier=0)
    second = claim_of(wiring, submit_to(wiring))
    write(wiring, queries.record_answers, second, "teacher", {"new": b"n"})
    known = write(wiring, queries.known_answers, second, "teacher", [*names, "new"])
    assert known == Known({**answers, "new": b"n"}, earlier=1201)
    assert write(wiring, queries.known_answers, second, "another teacher", names).answers == {"i0": b"else"}


def test_the_first_answer_to_an_image_stands(wiring: Wiring) -> None:
    held = claim_of(wiring, submit_to(wiring))
    write(wiring, queries.record_answers, held, "teacher", {"i": b"first"})
    write(wiring, queries.record_answers, held, "teacher", {"i": b"later", "j": b"new"})
    known = write(wiring, queries.known_answers, held, "teacher", ["i", "j"])
    assert known.answers == {"i": b"first", "j": b"new"}


def test_answers_of_another_tenant_are_not_found(wiring: Wiring) -> None:
    held = claim_of(wiring, submit_to(wiring))
    write(wiring, queries.record_answers, held, "teacher", {"i": b"secret"})
    with wiring.database.writing() as session:
        session.execute(sa.update(TeacherAnswer).values(tenant="somebody else"))
    assert write(wiring, queries.known_answers, held, "teacher", ["i"]).answers == {}
    write(wiring, queries.record_answers, held, "teacher", {"i": b"mine"})
    assert write(wiring, queries.known_answers, held, "teacher", ["i"]).answers == {"i": b"mine"}


def test_what_is_spent_is_shown_with_the_next_event_and_not_before(wiring: Wiring) -> None:
    job_id = submit_to(wiring, query_budget=50, queries_planned=40)
    held = claim_of(wiring, job_id)
    before = shown(wiring, job_id)
    assert before[1] == {"budget": 50, "planned": 40, "spent": 0, "cached": 0}
    write(wiring, queries.reserve, held, 30)
    assert shown(wiring, job_id) == before  # or one version would have two documents
    write(wiring, claims.renew, held, wiring.settings, 0, 0)  # a heartbeat at the same step
    version, questions = shown(wiring, job_id)
    assert (version, questions["spent"]) == (before[0] + 1, 30)
    write(wiring, claims.renew, held, wiring.settings, 0, 0)
    assert shown(wiring, job_id)[0] == version  # nothing new, no event
    with wiring.database.reading() as session:
        (event,) = events.after(session, job_id, version - 1, 10)
    assert (event.type, event.data["queries_spent"]) == ("stage.progress", 30)


def test_the_final_figures_are_shown_at_the_end(wiring: Wiring) -> None:
    job_id = submit_to(wiring, query_budget=50)
    held = claim_of(wiring, job_id)
    shown(wiring, job_id)
    write(wiring, queries.reserve, held, 20)
    write(wiring, queries.count_cached, held, 7)
    error = JobError("query_budget_spent", "spent")
    write(wiring, claims.fail, held, error, wiring.settings)
    assert shown(wiring, job_id)[1] == {"budget": 50, "planned": None, "spent": 20, "cached": 7}


def test_a_retried_job_goes_on_counting(wiring: Wiring) -> None:
    job_id = submit_to(wiring, query_budget=10)
    held = claim_of(wiring, job_id)
    write(wiring, queries.reserve, held, 6)
    write(wiring, claims.fail, held, JobError("teacher_unusable", "no"), wiring.settings)
    with wiring.database.writing() as session:
        lifecycle.retry(session, lifecycle.lock(session, job_id))
    held = claim_of(wiring, job_id)
    with pytest.raises(BudgetSpent):
        write(wiring, queries.reserve, held, 5)
    assert spent(wiring, job_id) == 6


def test_a_question_that_was_under_way_at_a_loss_stays_counted(wiring: Wiring) -> None:
    job_id = submit_to(wiring, query_budget=10)
    write(wiring, queries.reserve, claim_of(wiring, job_id), 6)
    change_shards(wiring, lease_until=1.0)
    with wiring.database.reading() as session:
        (shard_id,) = session.scalars(sa.select(Shard.id).where(Shard.job_id == job_id))
    write(wiring, claims.reap, shard_id, wiring.settings)
    assert shown(wiring, job_id)[1]["spent"] == 6


def test_answers_are_forgotten_when_nobody_has_used_them_for_long(wiring: Wiring) -> None:
    held = claim_of(wiring, submit_to(wiring))
    write(wiring, queries.record_answers, held, "teacher", {"unused": b"o", "used": b"u"})
    with wiring.database.writing() as session:
        old = now() - wiring.settings.retention_days * 86400 - 60
        session.execute(sa.update(TeacherAnswer).values(created_at=old, used_at=old))
    later = claim_of(wiring, submit_to(wiring))
    write(wiring, queries.known_answers, later, "teacher", ["used"])
    write(wiring, queries.record_answers, later, "teacher", {"new": b"n"})
    retention.sweep(wiring)
    known = write(wiring, queries.known_answers, held, "teacher", ["unused", "used", "new"])
    assert known.answers == {"used": b"u", "new": b"n"}


def test_the_secret_headers_are_those_of_the_tenants_own_teacher(wiring: Wiring) -> None:
    settings = wiring.settings.model_copy(update={"secret_key": SecretStr(KEY)})
    teacher_id = ids.new(teachers.PREFIX)
    sealed = SecretBox.sealing(settings).seal(json.dumps({"X-Key": "hush"}).encode(), teacher_id)
    held = claim_of(wiring, submit_to(wiring))
    with wiring.database.writing() as session:
        session.add(
            Teacher(
                id=teacher_id, tenant="t", title="Mine", kind="http", spec={}, files={}, header_names=["X-Key"],
                secret=sealed,
            )
        )  # fmt: skip
    with wiring.database.reading() as session:
        assert queries.secret_headers(session, settings, held) == {}  # of the catalogue
    with wiring.database.writing() as session:
        session.execute(sa.update(Job).values(teacher=teacher_id))
    with wiring.database.reading() as session:
        assert queries.secret_headers(session, settings, held) == {"X-Key": "hush"}
    assert "hush" not in repr(held)
