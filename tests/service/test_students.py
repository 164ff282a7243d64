"""Students over HTTP: shown with their files, listed, found by their tenant only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from tests.conftest import Gateway


def test_a_student_is_shown_with_its_files(
    client: httpx.Client, student: str, student_files: dict[str, bytes]
) -> None:
    shown = client.get(f"/v1/students/{student}").json()
    assert (shown["object"], shown["id"], shown["classes"]) == ("student", student, ["red", "green", "blue"])
    assert shown["created_at"].endswith("Z")
    assert client.get("/v1/students").json()["data"] == [shown]
    files = {item["name"]: item for item in shown["files"]}
    assert files.keys() == student_files.keys()
    for name, content in student_files.items():
        assert files[name]["sha256"] == hashlib.sha256(content).hexdigest()
        if name == "labels.json":
            assert files[name]["url"] is None
        else:
            assert client.get(files[name]["url"]).content == content


def test_students_are_listed_by_job_and_data_set(
    client: httpx.Client, make_student: Callable[..., str]
) -> None:
    made = [make_student() for _ in range(3)]
    listed = client.get("/v1/students?limit=2").json()
    assert [item["id"] for item in listed["data"]] == [made[2], made[1]]
    assert listed["has_more"]
    one = listed["data"][0]
    for name in ("job_id", "dataset_id"):
        assert [
            item["id"] for item in client.get("/v1/students", params={name: one[name]}).json()["data"]
        ] == [made[2]]


def test_another_tenants_student_is_not_found(
    client: httpx.Client, gateway: Gateway, make_student: Callable[..., str]
) -> None:
    theirs = make_student(tenant="rival")
    with gateway.client(gateway.key_of("rival", "students:read")) as rival:
        assert rival.get(f"/v1/students/{theirs}").status_code == 200
    assert client.get("/v1/students").json()["data"] == []
    for path in ("", "/model.onnx", "/bundle.zip", "/report"):
        assert client.get(f"/v1/students/{theirs}{path}").status_code == 404
    for path in ("/predict", "/class-map"):
        assert client.post(f"/v1/students/{theirs}{path}", content=b"image").status_code == 404


def test_a_deleted_student_is_not_found_any_more_and_its_job_stays(
    client: httpx.Client, gateway: Gateway, make_student: Callable[..., str]
) -> None:
    made, other = make_student(), make_student()
    url = f"/v1/students/{made}"
    job_id = client.get(url).json()["job_id"]
    with gateway.client(gateway.key_of("default", "students:read")) as reader:
        assert reader.delete(url).status_code == 403
    with gateway.client(gateway.key_of("rival", "students:write")) as rival:
        assert rival.delete(url).status_code == 404
    assert [client.delete(url).status_code for _ in range(2)] == [204, 404]
    assert [item["id"] for item in client.get("/v1/students").json()["data"]] == [other]
    for path in ("", "/model.onnx", "/bundle.zip", "/report"):
        assert client.get(url + path).status_code == 404
    assert client.post(f"{url}/predict", content=b"image").status_code == 404
    assert client.get(f"/v1/jobs/{job_id}").status_code == 200
