"""What can be ordered: methods, architectures, teachers, as their registries declare them."""

from __future__ import annotations

import httpx
import pytest

from app.db import now
from app.jobs.tables import Worker
from app.wiring import Wiring
from models.methods import METHODS
from models.students import STUDENTS
from models.teachers import TEACHERS

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def test_methods_come_with_the_schema_of_their_parameters(client: httpx.Client) -> None:
    listed = client.get("/v1/methods").json()
    assert [item["id"] for item in listed["data"]] == list(METHODS)
    kd = client.get("/v1/methods/kd").json()
    assert kd in listed["data"]
    assert kd["params"] == METHODS["kd"].params.model_json_schema()
    steps = kd["params"]["$defs"]["DistillationParams"]["properties"]["steps"]
    assert (steps["minimum"], steps["default"]) == (
        1,
        METHODS["kd"].resolve("balanced", {}).distillation.steps,
    )  # type: ignore[attr-defined]
    assert [stage["name"] for stage in kd["stages"]] == [stage.name for stage in METHODS["kd"].stages]
    assert kd["presets"].keys() >= {"draft", "balanced", "best"}


def test_architectures_come_smallest_first_with_their_cost(client: httpx.Client) -> None:
    listed = client.get("/v1/architectures").json()["data"]
    assert {item["id"] for item in listed} == STUDENTS.keys()
    assert [item["parameters"] for item in listed] == sorted(item["parameters"] for item in listed)
    assert client.get("/v1/architectures/conv4").json()["input_size"] == STUDENTS["conv4"].input_size


def test_teachers_come_with_licence_size_and_whether_they_can_be_had(client: httpx.Client) -> None:
    listed = client.get("/v1/teachers").json()["data"]
    assert {item["id"] for item in listed} == TEACHERS.keys()
    for item in listed:
        assert item["licence"]
        assert item["parameters"] > 0
        assert isinstance(item["available"], bool)
        assert item["reason"].endswith(".")
    one = client.get("/v1/teachers/efficientnet_lite0").json()
    assert one["licence"] == "Apache-2.0"
    assert "features" in one["offers"]


def test_a_teacher_can_be_had_where_a_live_worker_has_it_whatever_the_gateway_sees(
    client: httpx.Client, wiring: Wiring
) -> None:
    def report(worker: str, seen_s_ago: float, states: dict[str, list[bool | str]]) -> None:
        with wiring.database.writing() as session:
            seen = now() - seen_s_ago
            session.add(Worker(id=worker, queues=["gpu"], device="cpu", teachers=states, seen_at=seen))

    def available(teacher: str) -> tuple[bool, str]:
        found = client.get(f"/v1/teachers/{teacher}").json()
        return found["available"], found["reason"]

    report("gone", 3600, {"dinov2_small": [True, "Long ago."]})
    assert available("efficientnet_lite0")[0]  # no live worker has told: what this machine has
    report("one", 1, {"efficientnet_lite0": [False, "Not here."], "dinov2_small": [False, "Not cached."]})
    assert available("efficientnet_lite0") == (False, "Not here.")
    report("two", 1, {"dinov2_small": [True, "In the cache."]})
    assert available("dinov2_small") == (True, "In the cache.")
    assert "DRAM_TEACHERS_FILE" in available("vit_base_16")[1]


@pytest.mark.parametrize(
    ("path", "code", "names"),
    [
        ("/v1/methods/nope", "unknown_method", "kd"),
        ("/v1/architectures/nope", "unknown_student", "conv4"),
        ("/v1/teachers/nope", "not_found", "/v1/teachers"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(
    client: httpx.Client, path: str, code: str, names: str
) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (404, code)
    assert names in answer.json()["detail"]
