"""Jobs over HTTP: orders good and bad, reading, listing, events, cancel, retry. No worker: claims are made by hand."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from app.errors import NotFound
from app.jobs import claims, lifecycle
from app.jobs.claims import Claim
from app.jobs.reader import JobReader
from app.jobs.tables import Job, JobStage, Shard, Worker
from app.wiring import Wiring
from tests.conftest import Gateway
from tests.service.stack import few_shot_zip

ORDER = {"teacher_id": "efficientnet_lite0", "student": "conv4", "preset": "draft"}


@pytest.fixture
def dataset(client: httpx.Client) -> str:
    return upload(client)


def upload(client: httpx.Client) -> str:
    answer = client.post("/v1/datasets", files={"archive": ("set.zip", few_shot_zip(), "application/zip")})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def submit(client: httpx.Client, dataset: str, **changes: Any) -> dict[str, Any]:
    answer = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset, **changes})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def claim(wiring: Wiring, job_id: str) -> Claim:
    """Take the first ready shard of the job, as a worker would."""
    with wiring.database.writing() as session:
        ready = sa.select(Shard.id).where(Shard.job_id == job_id, Shard.status == "ready")
        claimed, _ = claims.claim(session, session.scalars(ready).first() or "", "w", wiring.settings)
    assert claimed is not None
    return claimed


def run(wiring: Wiring, job_id: str) -> None:
    """Finish every stage of the job with an output that nobody reads."""
    facts = {"classes": ["a", "b"], "summary": {}}
    while True:
        with wiring.database.reading() as session:
            if session.get_one(Job, job_id).status == "succeeded":
                return
        held = claim(wiring, job_id)
        with wiring.database.writing() as session:
            claims.complete(session, held, {}, 0, facts if held.output == "bundle" else None)


def test_an_order_is_answered_with_a_queued_job_and_its_stages(client: httpx.Client, dataset: str) -> None:
    answer = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset, "metadata": {"team": "line-4"}})
    job = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"/v1/jobs/{job['id']}")
    assert (job["status"], job["attempt"], job["metadata"]) == ("queued", 1, {"team": "line-4"})
    states = {stage["name"]: stage["status"] for stage in job["stages"]}
    assert states["ask"] == "ready"
    assert states["distill"] == "waiting"
    assert "cross_validate" not in states  # the data set has a test split
    assert client.get(job["urls"]["self"]).json() == job
    assert job["params"]["distillation"]["steps"] < 3000  # the preset's


@pytest.mark.parametrize(
    ("change", "code", "pointer", "says"),
    [
        ({"teacher_id": "gpt"}, "unknown_teacher", "/teacher_id", "efficientnet_lite0"),
        ({"method": "magic"}, "unknown_method", "/method", "kd"),
        ({"student": "vgg"}, "unknown_student", "/student", "mobilenetv3_small_050"),
        (
            {"params": {"distillation": {"stepz": 1}}}, "unknown_parameter", "/params/distillation/stepz",
            "distillation.steps",
        ),
        ({"params": {"magic": {}}}, "unknown_parameter", "/params/magic", "distillation"),
        (
            {"params": {"distillation": {"steps": 0}}}, "parameter_invalid", "/params/distillation/steps",
            "greater than or equal to 1",
        ),
        ({"params": {"distillation": 7}}, "parameter_invalid", "/params/distillation", "distillation"),
        ({"preset": "perfect"}, "invalid", "/preset", "balanced"),
        ({"seed": -1}, "invalid", "/seed", "greater than or equal to 0"),
        ({"precision": "int4"}, "invalid", "/precision", "int8"),
        ({"dataset_id": "ds_nope"}, "dataset_not_found", None, "ds_nope"),
    ],
)  # fmt: skip
def test_a_bad_order_says_what_is_wrong_where_and_what_is_valid(
    client: httpx.Client, wiring: Wiring, dataset: str,
    change: dict[str, Any], code: str, pointer: str | None, says: str,
) -> None:  # fmt: skip
    answer = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset, **change})
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["status"] == answer.status_code == (404 if pointer is None else 422)
    assert problem["code"] == code, problem
    if pointer is not None:
        assert pointer in [error["pointer"] for error in problem["errors"]]
    assert says in json.dumps(problem)
    with wiring.database.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Job)) == 0


def test_every_mistake_of_an_order_is_told_at_once(client: httpx.Client, dataset: str) -> None:
    order = {"dataset_id": dataset, "teacher_id": "x", "student": "y", "params": {"export": {"int9": True}}}
    problem = client.post("/v1/jobs", json=order).json()
    assert [error["code"] for error in problem["errors"]] == [
        "unknown_student", "unknown_teacher", "unknown_parameter",
    ]  # fmt: skip


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "names", [[f"x{number}" for number in range(50_000)], ["x" * 500_000]], ids=["many", "long"]
)
def test_an_order_of_many_mistakes_gets_a_short_answer(
    client: httpx.Client, dataset: str, names: list[str]
) -> None:
    wrong = dict.fromkeys(names, 0)
    order = {**ORDER, "dataset_id": dataset, "params": wrong, "student": names[-1]}
    answer = client.post("/v1/jobs", json=order)
    assert (answer.status_code, answer.json()["code"]) == (422, "unknown_student")
    told = [error["code"] for error in answer.json()["errors"]]
    assert told.count("unknown_parameter") == min(len(names), 99)
    assert ("more_findings" in told) == (len(names) > 99)
    assert len(answer.content) < 50_000


def test_a_teacher_that_cannot_be_had_is_refused_with_the_reason(client: httpx.Client, dataset: str) -> None:
    teachers = client.get("/v1/teachers", params={"limit": 100}).json()["data"]
    missing = [teacher["id"] for teacher in teachers if not teacher["available"]]
    if not missing:
        pytest.skip("every teacher of the catalogue can be had here")
    answer = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset, "teacher_id": missing[0]})
    assert (answer.status_code, answer.json()["code"]) == (422, "teacher_unavailable")


def test_the_same_idempotency_key_gives_the_same_job_and_another_order_is_refused(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    order = {**ORDER, "dataset_id": dataset}
    headers = {"Idempotency-Key": '"once"'}
    first = client.post("/v1/jobs", json=order, headers=headers)
    again = client.post("/v1/jobs", json=order, headers={"Idempotency-Key": "once"})
    assert first.json()["id"] == again.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    other = client.post("/v1/jobs", json={**order, "seed": 5}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    with wiring.database.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Job)) == 1


def test_a_repeated_order_is_answered_with_its_job_though_it_could_not_be_made_any_more(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    order, headers = {**ORDER, "dataset_id": dataset}, {"Idempotency-Key": "once"}
    first = client.post("/v1/jobs", json=order, headers=headers)
    with wiring.database.writing() as session:  # the only worker finds the teacher gone
        gone = {ORDER["teacher_id"]: [False, "Its weights are damaged."]}
        session.add(Worker(id="w", queues=["gpu", "cpu"], device="cpu", teachers=gone, generators={}))
    refused = client.post("/v1/jobs", json=order, headers={"Idempotency-Key": "another"})
    assert refused.json()["code"] == "teacher_unavailable"
    again = client.post("/v1/jobs", json=order, headers=headers)
    assert again.status_code == 201, again.text
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (first.json()["id"], "true")
    other = client.post("/v1/jobs", json={**order, "seed": 5}, headers=headers)
    assert other.json()["code"] == "idempotency_key_reused"


def test_many_posts_with_one_idempotency_key_at_once_make_one_job(gateway: Gateway, dataset: str) -> None:
    answers: list[httpx.Response] = []

    def post() -> None:
        with gateway.client(gateway.key) as http:
            order = {**ORDER, "dataset_id": dataset}
            answers.append(http.post("/v1/jobs", json=order, headers={"Idempotency-Key": "k"}))

    threads = [threading.Thread(target=post) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {201}, [answer.text for answer in answers]
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_a_dry_run_plans_and_writes_nothing(client: httpx.Client, wiring: Wiring, dataset: str) -> None:
    answer = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset, "dry_run": True})
    assert answer.status_code == 200
    assert [stage["name"] for stage in answer.json()["stages"]][:3] == ["ask", "label", "distill"]
    assert not any(stage["reused"] for stage in answer.json()["stages"])
    with wiring.database.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Job)) == 0


def test_a_second_job_with_another_student_reuses_what_does_not_depend_on_it(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    run(wiring, submit(client, dataset)["id"])
    second = submit(client, dataset, student="resnet12")
    reused = {stage["name"] for stage in second["stages"] if stage["status"] == "reused"}
    assert reused == {"ask", "label", "examine", "teacher_graph"}
    plan = client.post(
        "/v1/jobs", json={**ORDER, "dataset_id": dataset, "student": "resnet12", "dry_run": True}
    )
    assert {stage["name"] for stage in plan.json()["stages"] if stage["reused"]} == reused


def test_what_one_tenant_made_is_not_reused_by_another(
    gateway: Gateway, client: httpx.Client, dataset: str
) -> None:
    run(gateway.wiring, submit(client, dataset)["id"])
    with gateway.client(gateway.key_of("other", "admin")) as other:
        job = submit(other, upload(other))
    assert not [stage for stage in job["stages"] if stage["status"] == "reused"]


def test_another_tenants_job_does_not_exist(gateway: Gateway, client: httpx.Client, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    with gateway.client(gateway.key_of("other", "admin")) as other:
        for method, path in (
            ("GET", ""), ("GET", "/events"), ("GET", "/metrics"), ("POST", "/cancel"), ("POST", "/retry"),
        ):  # fmt: skip
            answer = other.request(method, f"/v1/jobs/{job_id}{path}")
            assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found"), path
        assert other.get("/v1/jobs").json()["data"] == []
        assert other.post("/v1/jobs", json={**ORDER, "dataset_id": dataset}).status_code == 404


def test_callers_who_poll_at_once_each_get_their_own_job_as_it_is_now(
    gateway: Gateway, client: httpx.Client, dataset: str
) -> None:
    with gateway.client(gateway.key_of("other", "admin")) as other:
        mine, theirs = submit(client, dataset)["id"], submit(other, upload(other))["id"]
        client.post(f"/v1/jobs/{mine}/cancel")
        seen: list[tuple[str, int, str]] = []

        def poll(http: httpx.Client, job_id: str) -> None:
            for _ in range(20):
                answer = http.get(f"/v1/jobs/{job_id}")
                seen.append((job_id, answer.status_code, answer.json().get("status", "")))

        cases = [(client, mine), (other, theirs), (client, theirs), (other, mine)] * 2
        threads = [threading.Thread(target=poll, args=case) for case in cases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {entry for entry in seen if entry[1] == 200} == {(mine, 200, "cancelled"), (theirs, 200, "queued")}
    assert sum(entry[1] == 404 for entry in seen) == len(seen) // 2


def test_what_cannot_be_read_of_one_caller_is_read_of_the_others(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    job_id = submit(client, dataset)["id"]

    async def together() -> list[Any]:
        reader = JobReader(wiring)
        asked = [("default", job_id), ("default", "job_\0"), ("other", job_id)]
        return await asyncio.gather(*(reader.read(*key) for key in asked), return_exceptions=True)

    mine, broken, foreign = asyncio.run(together())
    assert json.loads(mine.document)["id"] == job_id
    assert isinstance(broken, Exception)  # PostgreSQL takes no NUL; SQLite finds no such job
    assert isinstance(foreign, NotFound)


def test_what_is_no_character_is_refused_wherever_it_is_sent(client: httpx.Client, dataset: str) -> None:
    for path in ("/v1/jobs/%00", "/v1/jobs/%00/events", "/v1/students/%00", "/v1/jobs?after=%00"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["code"]) == (400, "address_invalid"), path
    for name, value in (("dataset_id", "ds_\0"), ("teacher_id", "tch_\ud800"), ("params", {"\ud800": [1]})):
        order = json.dumps({**ORDER, "dataset_id": dataset, name: value})  # half a pair is sent as \ud800
        answer = client.post("/v1/jobs", content=order, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, f"/{name}")


def test_a_scope_is_needed_to_order_and_to_read(gateway: Gateway, dataset: str) -> None:
    with gateway.client(gateway.key_of("default", "jobs:read")) as reader:
        assert reader.get("/v1/jobs").status_code == 200
        answer = reader.post("/v1/jobs", json={**ORDER, "dataset_id": dataset})
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


def test_an_unchanged_job_is_not_sent_twice(client: httpx.Client, wiring: Wiring, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    first = client.get(f"/v1/jobs/{job_id}")
    again = client.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    claim(wiring, job_id)
    changed = client.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": first.headers["etag"]})
    assert (changed.status_code, changed.json()["status"]) == (200, "running")


def test_prefer_wait_holds_the_answer_until_the_job_ends(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    job_id = submit(client, dataset)["id"]
    start = time.monotonic()
    assert client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=1"}).json()["status"] == "queued"
    assert 1.0 <= time.monotonic() - start < 3.0
    timer = threading.Timer(0.5, run, (wiring, job_id))
    timer.start()
    assert client.get(f"/v1/jobs/{job_id}", headers={"Prefer": "wait=20"}).json()["status"] == "succeeded"
    timer.join()


def test_a_list_is_paged_newest_first_and_filtered(client: httpx.Client, dataset: str) -> None:
    made = [submit(client, dataset, seed=seed)["id"] for seed in range(5)]
    first = client.get("/v1/jobs", params={"limit": 2}).json()
    assert ([job["id"] for job in first["data"]], first["has_more"]) == ([made[4], made[3]], True)
    rest = client.get("/v1/jobs", params={"limit": 3, "after": made[3]}).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == (made[2::-1], False)
    client.post(f"/v1/jobs/{made[0]}/cancel")
    cancelled = client.get("/v1/jobs", params={"status": "cancelled"}).json()["data"]
    assert [job["id"] for job in cancelled] == [made[0]]
    assert client.get("/v1/jobs", params={"status": "lost"}).status_code == 422


def test_events_are_listed_and_followed_until_the_job_ends(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    job_id = submit(client, dataset)["id"]
    timer = threading.Timer(0.5, run, (wiring, job_id))
    timer.start()
    streamed = list(stream(client, job_id))
    timer.join()
    listed = client.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert [(event["id"], event["type"]) for event in listed] == streamed
    assert (streamed[0], streamed[-1][1]) == ((1, "job.created"), "job.succeeded")
    assert list(stream(client, job_id, last=streamed[3][0])) == streamed[4:]
    assert list(stream(client, job_id, last=streamed[-1][0])) == []  # nothing follows: the stream ends
    page = client.get(f"/v1/jobs/{job_id}/events", params={"limit": 2, "after": 2}).json()
    assert ([event["id"] for event in page["data"]], page["has_more"]) == ([3, 4], True)
    for last in (b"x", b"\xb2", b"9" * 20, b""):  # the second is ², a digit that is no number
        bad = client.get(f"/v1/jobs/{job_id}/events", headers={b"Last-Event-ID": last})
        assert (bad.status_code, bad.json()["code"]) == (400, "bad_request"), last


@pytest.mark.parametrize("number", [2**53, 10**20])
def test_numbers_that_no_database_keeps_are_refused(client: httpx.Client, dataset: str, number: int) -> None:
    job_id = submit(client, dataset)["id"]
    for path in ("events", "samples"):
        answer = client.get(f"/v1/jobs/{job_id}/{path}", params={"after": number})
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/query/after"), path
        assert client.get(f"/v1/jobs/{job_id}/{path}", params={"after": 2**53 - 1}).json()["data"] == []
    answer = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset, "query_budget": number})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/query_budget")


def stream(client: httpx.Client, job_id: str, last: int = 0) -> Iterator[tuple[int, str]]:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(last)}
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            if line.startswith("id: "):
                yield int(line.removeprefix("id: ")), kind


def test_training_curves_are_kept_once_also_when_a_stage_is_resumed(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    job_id = submit(client, dataset)["id"]
    held = claim(wiring, job_id)
    for value in (2.0, 1.0):
        with wiring.database.writing() as session:
            claims.renew(session, held, wiring.settings, 10, 100, [(10, "loss", value)])
    (point,) = client.get(f"/v1/jobs/{job_id}/metrics").json()["data"]
    assert point == {"stage": "ask", "shard": 0, "name": "loss", "step": 10, "value": 1.0}


def test_a_job_shows_its_progress_and_an_eta(client: httpx.Client, wiring: Wiring, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    held = claim(wiring, job_id)
    time.sleep(0.1)
    with wiring.database.writing() as session:
        claims.renew(session, held, wiring.settings, 50, 100)
    progress = client.get(f"/v1/jobs/{job_id}").json()["progress"]
    assert (progress["stage"], progress["step"], progress["total_steps"]) == ("ask", 50, 100)
    assert 0 < progress["percent"] < 100
    assert progress["eta"] is not None


def test_the_eta_of_a_retried_job_counts_neither_the_pause_nor_what_was_done_before(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    job_id = submit(client, dataset)["id"]

    def progress(held: Claim, step: int) -> dict[str, Any]:
        with wiring.database.writing() as session:
            claims.renew(session, held, wiring.settings, step, 100)
        return dict(client.get(f"/v1/jobs/{job_id}").json()["progress"])

    held = claim(wiring, job_id)
    begun = progress(held, 40)["percent"]
    with wiring.database.writing() as session:
        claims.fail(session, held, lifecycle.JobError("teacher_unusable", "No."), wiring.settings)
        session.execute(sa.update(Job).values(started_at=1000.0, resumed_at=1000.0))  # long ago
    client.post(f"/v1/jobs/{job_id}/retry")
    held = claim(wiring, job_id)
    assert progress(held, 41)["eta"] is None
    time.sleep(0.2)
    answer = progress(held, 100)
    left = datetime.fromisoformat(answer["eta"]).timestamp() - time.time()
    pace = (
        answer["percent"] - begun
    ) / 0.2  # a little more than percent a second: the requests take time, too
    assert 0.9 * (100 - answer["percent"]) / pace < left < 3600
    assert client.get(f"/v1/jobs/{job_id}").json()["started_at"].startswith("1970")


def test_cancel_and_retry_over_http(client: httpx.Client, wiring: Wiring, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    early = client.post(f"/v1/jobs/{job_id}/retry")
    assert (early.status_code, early.json()["code"]) == (409, "job_not_retryable")
    assert client.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    late = client.post(f"/v1/jobs/{job_id}/cancel")
    assert (late.status_code, late.json()["code"]) == (409, "job_finished")
    again = client.post(f"/v1/jobs/{job_id}/retry").json()
    assert (again["status"], again["attempt"]) == ("queued", 2)
    run(wiring, job_id)
    assert client.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"


def test_a_failed_job_says_why_and_what_to_do(client: httpx.Client, wiring: Wiring, dataset: str) -> None:
    job_id = submit(client, dataset)["id"]
    error = lifecycle.JobError("teacher_unusable", "The weights are damaged.", "Install them again.")
    held = claim(wiring, job_id)
    with wiring.database.writing() as session:
        claims.fail(session, held, error, wiring.settings)
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert job["status"] == "failed"
    assert job["error"] == {
        "code": "teacher_unusable", "detail": "The weights are damaged.", "stage": "ask",
        "hint": "Install them again.", "retryable": False,
    }  # fmt: skip


def test_a_tenant_may_have_only_so_many_unfinished_jobs(
    gateway_with: Callable[..., AbstractContextManager[Gateway]],
) -> None:
    with gateway_with(max_active_jobs=2) as gateway, gateway.client(gateway.key) as client:
        dataset = upload(client)
        for seed in range(2):
            submit(client, dataset, seed=seed)
        answer = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset, "seed": 9})
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_jobs")
        assert "retry-after" in answer.headers
        assert client.get("/v1/jobs").json()["has_more"] is False


def test_int8_is_asked_for_by_precision(client: httpx.Client, wiring: Wiring, dataset: str) -> None:
    job = submit(client, dataset, precision="int8")
    assert job["params"]["export"]["int8"] is True
    with wiring.database.reading() as session:
        export = sa.select(JobStage.params).where(JobStage.job_id == job["id"], JobStage.name == "export")
        assert session.scalars(export).one()["int8"] is True
