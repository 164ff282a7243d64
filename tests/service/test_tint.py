"""The method tint through a whole service with two workers, and a tiny random generator of the operator's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from app.jobs.tables import JobStage, Shard, Worker
from tests import tiny_diffusion
from tests.service.stack import Stack, until

IMAGES = 4
ORDER: dict[str, Any] = {
    "method": "tint",
    "generator_id": "bolts",
    "params": {
        "textual_inversion": {"steps": 5, "batch_size": 2},
        "null_text_inversion": {"mode": "null_text", "steps": 3, "inner_steps": 2},
        "generation": {"images_per_class": IMAGES, "size": 32},
        "teacher": {"input_size": 64, "views": 1},
        "selection": {"least_probability": 0},
        "distillation": {"steps": 5, "batch_size": 8, "input_size": 32},
        "evaluation": {"latency_runs": 5},
    },
}
#: One shard each of three classes.
BY_CLASS = ("textual_inversion", "null_text_inversion", "generate")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("tint")
    folder = tiny_diffusion.write(root / "tiny")
    (root / "teachers.toml").write_text(
        f'[[generator]]\nname = "bolts"\ntitle = "Bolts"\nkind = "local"\nsource = "{folder}"\nresolution = 16\n'
        'licence = "proprietary"\nlicence_url = "https://example.org/licence"\n'
    )
    made = Stack(root / "home", DRAM_TEACHERS_FILE=str(root / "teachers.toml"))
    try:
        made.start_all()
        made.start("worker-2")
        until(lambda: workers(made) == 2, 60, "the second worker")
        yield made
    finally:
        made.stop()


def workers(stack: Stack) -> int:
    with stack.database.reading() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(Worker)) or 0


@pytest.fixture(scope="module")
def dataset(stack: Stack) -> str:
    return stack.upload()


@pytest.fixture(scope="module")
def finished(stack: Stack, dataset: str) -> dict[str, Any]:
    return stack.finished(stack.submit(dataset, **ORDER)["id"], seconds=300)


def test_both_workers_of_a_machine_share_the_classes_of_a_job(stack: Stack, finished: dict[str, Any]) -> None:
    assert finished["status"] == "succeeded", finished
    stack.check_history(finished["id"])
    with stack.database.reading() as session:
        select = sa.select(JobStage.name, Shard.worker).join(Shard, Shard.stage_id == JobStage.id)
        ran = session.execute(select.where(JobStage.job_id == finished["id"])).all()
    by_class = [worker for name, worker in ran if name in BY_CLASS]
    assert len(by_class) == 3 * len(BY_CLASS)
    assert len({worker for name, worker in ran if name == "textual_inversion"}) == 2
    assert None not in by_class


@pytest.mark.parametrize(
    ("changed", "first_again"),
    [
        ({"student": "lenet5"}, "distill"),
        ({"params": {"generation": {"images_per_class": IMAGES + 1}}}, "generate"),
    ],
    ids=["another student", "more images"],
)
def test_a_second_job_on_the_same_images_redoes_no_inversion(
    stack: Stack, dataset: str, finished: dict[str, Any], changed: dict[str, Any], first_again: str
) -> None:
    params = {
        name: {**group, **changed.get("params", {}).get(name, {})} for name, group in ORDER["params"].items()
    }
    order = {**ORDER, **changed, "params": params}
    if "student" in changed:
        order["params"]["distillation"] = {**params["distillation"], "input_size": 28}
    stages = stack.submit(dataset, **order)["stages"]
    again = [stage["name"] for stage in stages if stage["status"] != "reused"]
    assert again[0] == first_again
    assert {"textual_inversion", "null_text_inversion"}.isdisjoint(again)
    assert [stage["name"] for stage in finished["stages"] if stage["status"] == "reused"] == []
