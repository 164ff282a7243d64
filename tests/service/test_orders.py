"""Orders that put questions to a black box: what is refused before anything is spent, and what is shown."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from app import ids
from app.jobs import lifecycle
from app.jobs.tables import Job, JobStage, Shard, StageOutput
from app.teachers.tables import Teacher
from app.wiring import Wiring
from models.methods import METHODS
from models.teachers.black_box import AnswerKind, HttpTeacher, InputFormat
from tests.service.black_boxes import unlabelled_zip
from tests.service.stack import few_shot_zip

#: fsbbt asks about 12 images to learn from, 12 to test on, and the synthetic ones.
ORDER = {"method": "fsbbt", "student": "conv4", "params": {"synthesis": {"images": 100}}}
PLANNED = 124


def upload(client: httpx.Client, content: bytes) -> str:
    answer = client.post("/v1/datasets", files={"archive": ("set.zip", content, "application/zip")})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


@pytest.fixture
def dataset(client: httpx.Client) -> str:
    return upload(client, few_shot_zip())


def add_teacher(wiring: Wiring, *classes: str, tenant: str = "default", **more: Any) -> str:
    teacher_id = ids.new("tch")
    spec = HttpTeacher(
        name=teacher_id, title="Mine", classes=classes or ("class2", "class1", "class0", "another"),
        input=InputFormat(height=32, width=32), source="https://127.0.0.1/answer", **more,
    )  # fmt: skip
    with wiring.database.writing() as session:
        session.add(
            Teacher(
                id=teacher_id, tenant=tenant, title="Mine", kind="http", spec=spec.model_dump(mode="json"), files={},
                header_names=[],
            )
        )  # fmt: skip
    return teacher_id


def refused(client: httpx.Client, order: dict[str, Any]) -> dict[str, Any]:
    """The problem that both the order and its dry run are answered with."""
    answer = client.post("/v1/jobs", json=order)
    assert answer.status_code == 422, answer.text
    dry = client.post("/v1/jobs", json={**order, "dry_run": True}).json()
    problem: dict[str, Any] = answer.json()
    assert (dry["code"], dry["detail"]) == (problem["code"], problem["detail"])
    return problem


def test_a_budget_below_the_plan_is_refused_with_both_numbers(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    order = {**ORDER, "dataset_id": dataset, "teacher_id": add_teacher(wiring)}
    problem = refused(client, {**order, "query_budget": PLANNED - 1})
    assert problem["code"] == "query_budget_too_small"
    assert problem["errors"][0]["pointer"] == "/query_budget"
    for words in ("124", "123", "synthesis.images"):
        assert words in problem["detail"]
    job = client.post("/v1/jobs", json={**order, "query_budget": PLANNED}).json()
    assert job["queries"] == {"budget": PLANNED, "planned": PLANNED, "spent": 0, "cached": 0}


def test_a_plan_says_how_many_questions_it_would_ask(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    order = {**ORDER, "dataset_id": dataset, "teacher_id": add_teacher(wiring), "dry_run": True}
    assert client.post("/v1/jobs", json=order).json()["queries_planned"] == PLANNED
    kd = {"dataset_id": dataset, "teacher_id": "efficientnet_lite0", "student": "conv4", "dry_run": True}
    assert client.post("/v1/jobs", json=kd).json()["queries_planned"] is None


def test_a_method_that_asks_no_black_box_shows_no_plan(client: httpx.Client, dataset: str) -> None:
    order = {"dataset_id": dataset, "teacher_id": "efficientnet_lite0", "student": "conv4"}
    job = client.post("/v1/jobs", json=order).json()
    assert job["queries"] == {"budget": None, "planned": None, "spent": 0, "cached": 0}


@pytest.mark.parametrize("budget", [-1, 1.5, "many"])
def test_a_budget_is_a_whole_number(client: httpx.Client, dataset: str, budget: Any) -> None:
    order = {**ORDER, "dataset_id": dataset, "teacher_id": "efficientnet_lite0", "query_budget": budget}
    problem = client.post("/v1/jobs", json=order).json()
    assert (problem["status"], problem["errors"][0]["pointer"]) == (422, "/query_budget")


def test_classes_that_the_teacher_does_not_know_are_listed(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    teacher = add_teacher(wiring, "class1", "Class0", "bolt")
    problem = refused(client, {**ORDER, "dataset_id": dataset, "teacher_id": teacher})
    assert problem["code"] == "teacher_lacks_classes"
    assert "2 of the 3 classes" in problem["detail"]
    assert "'class0', 'class2'" in problem["detail"]
    assert "'bolt'" in problem["detail"]


def test_a_black_box_cannot_teach_by_a_method_that_looks_inside(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    teacher = add_teacher(wiring, answers=AnswerKind.LABEL)
    problem = refused(
        client, {**ORDER, "method": "kd", "params": {}, "dataset_id": dataset, "teacher_id": teacher}
    )
    assert problem["code"] == "teacher_offers_too_little"
    assert "offers only labels" in problem["detail"]


@pytest.mark.parametrize(
    ("method", "student", "code", "words"),
    [
        ("wecolora", "conv4", "method_lacks_student", "'conv4'; it can make: shortened_vit."),
        ("kd", "shortened_vit", "method_lacks_student", "'shortened_vit'; it can make: conv4,"),
        ("kd", "conv5", "unknown_student", "there are: conv4,"),
    ],
)  # fmt: skip
def test_a_student_that_the_method_cannot_make_is_refused_with_those_that_it_can(
    client: httpx.Client, dataset: str, method: str, student: str, code: str, words: str
) -> None:
    order = {"dataset_id": dataset, "teacher_id": "dinov2_small", "method": method, "student": student}
    problem = client.post("/v1/jobs", json=order).json()
    assert (problem["status"], problem["code"]) == (422, code)
    assert problem["errors"][0]["pointer"] == "/student"
    assert words in problem["detail"]


def test_a_network_that_is_no_vision_transformer_cannot_be_shortened(
    client: httpx.Client, dataset: str
) -> None:
    order = {
        "dataset_id": dataset,
        "teacher_id": "efficientnet_lite0",
        "method": "wecolora",
        "student": client.get("/v1/methods/wecolora").json()["student"],
    }
    problem = refused(client, order)
    assert problem["code"] == "teacher_offers_too_little"
    assert "needs tokens of its teacher" in problem["detail"]
    assert "one of these teachers: dinov2_base, dinov2_small" in problem["detail"]


def test_images_without_labels_need_a_method_and_a_teacher_that_need_none(
    client: httpx.Client, wiring: Wiring
) -> None:
    dataset = upload(client, unlabelled_zip(12))
    kd = {"dataset_id": dataset, "teacher_id": "efficientnet_lite0", "student": "conv4"}
    problem = refused(client, kd)
    assert problem["code"] == "dataset_lacks_images"
    assert problem["detail"] == (
        f"Method 'kd' needs labelled images; data set {dataset} has only unlabelled images. Choose method 'fsbbt', or "
        "add them."
    )
    problem = refused(client, {**ORDER, "dataset_id": dataset, "teacher_id": "efficientnet_lite0"})
    assert problem["code"] == "dataset_lacks_images"
    assert "POST /v1/teachers" in problem["detail"]
    own = {**ORDER, "dataset_id": dataset, "teacher_id": add_teacher(wiring), "query_budget": 112}
    answer = client.post("/v1/jobs", json=own)
    assert answer.status_code == 201, answer.text
    assert answer.json()["queries"]["planned"] == 112


def test_a_teacher_of_another_tenant_does_not_exist(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    foreign, mine = add_teacher(wiring, tenant="somebody else"), add_teacher(wiring)
    problem = refused(client, {**ORDER, "dataset_id": dataset, "teacher_id": foreign})
    assert (problem["code"], problem["errors"][0]["pointer"]) == ("unknown_teacher", "/teacher_id")
    assert mine in json.dumps(problem)


def test_a_teacher_that_its_probe_found_wanting_is_refused_with_the_reason(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    teacher = add_teacher(wiring)
    probed = client.post(f"/v1/teachers/{teacher}/probe").json()
    assert not probed["ok"]  # nothing of ours may ask 127.0.0.1
    problem = refused(client, {**ORDER, "dataset_id": dataset, "teacher_id": teacher})
    assert problem["code"] == "teacher_unavailable"


def test_an_unfinished_job_keeps_its_teacher(client: httpx.Client, wiring: Wiring, dataset: str) -> None:
    teacher = add_teacher(wiring)
    job = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset, "teacher_id": teacher}).json()
    assert client.delete(f"/v1/teachers/{teacher}").status_code == 409
    client.post(f"/v1/jobs/{job['id']}/cancel")
    assert client.delete(f"/v1/teachers/{teacher}").status_code == 204
    assert client.get(f"/v1/jobs/{job['id']}").json()["teacher_id"] == teacher


def test_a_retried_job_does_not_ask_a_teacher_that_was_deleted(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    teacher = add_teacher(wiring)
    job = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset, "teacher_id": teacher}).json()
    url = f"/v1/jobs/{job['id']}"
    for _ in range(2):  # while the teacher is there it may be retried
        client.post(f"{url}/cancel")
        assert client.get(url).json()["status"] == "cancelled"
        assert client.post(f"{url}/retry").status_code == 202
    client.post(f"{url}/cancel")
    assert client.delete(f"/v1/teachers/{teacher}").status_code == 204
    answer = client.post(f"{url}/retry")
    assert (answer.status_code, answer.json()["code"]) == (409, "teacher_deleted")
    assert client.get(url).json()["status"] == "cancelled"
    with wiring.database.writing() as session:  # what is left asks nobody
        asking = [stage.name for stage in METHODS["fsbbt"].stages if stage.asks]
        of_job = JobStage.job_id == job["id"]
        session.execute(
            sa.update(JobStage).where(of_job, JobStage.name.in_(asking)).values(status="succeeded")
        )
        for shard in session.scalars(
            sa.select(Shard)
            .join(JobStage, Shard.stage_id == JobStage.id)
            .where(of_job, JobStage.name.in_(asking))
        ):
            shard.status = "succeeded"
            session.add(StageOutput(tenant="default", key=shard.key, files={}, bytes=0))
    assert client.post(f"{url}/retry").status_code == 202


def test_a_job_that_is_ordered_names_its_teachers_files_for_its_stages(
    client: httpx.Client, wiring: Wiring, dataset: str
) -> None:
    teacher = add_teacher(wiring)
    with wiring.database.writing() as session:
        session.execute(sa.update(Teacher).values(files={"model.onnx": "0" * 64}))
    job_id = client.post("/v1/jobs", json={**ORDER, "dataset_id": dataset, "teacher_id": teacher}).json()[
        "id"
    ]
    with wiring.database.writing() as session:
        job = session.get_one(Job, job_id)
        lifecycle.lock(session, job_id)
        files = job.sources["teacher"]["files"]
    assert files["model.onnx"] == "0" * 64
    with wiring.blobs.open(files["teacher.json"]) as document:
        assert json.load(document)["name"] == teacher
