"""The Python client and the real gateway agree: every operation of the client is answered in the shape it reads."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from app.client import Dram, DramApiError

if TYPE_CHECKING:
    from tests.conftest import Gateway


@pytest.fixture
def dram(gateway: Gateway) -> Iterator[Dram]:
    with Dram(gateway.url, gateway.key) as client:
        yield client


def pictures(classes: int = 2, shots: int = 2) -> list[tuple[str, Path | bytes]]:
    """Noise, each image another."""
    numbers = np.random.default_rng(0)
    images: list[tuple[str, Path | bytes]] = []
    for label in range(classes):
        for shot in range(shots):
            content = io.BytesIO()
            Image.fromarray(numbers.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(content, "PNG")
            images.append((f"class-{label}/{shot}.png", content.getvalue()))
    return images


def test_data_sets(dram: Dram, tmp_path: Path) -> None:
    for name, content in pictures():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        assert isinstance(content, bytes)
        (tmp_path / name).write_bytes(content)
    made = dram.datasets.create(tmp_path, name="noise")
    assert (made.name, made.classes) == ("noise", ["class-0", "class-1"])
    assert made.splits["support"]["images"] == 4
    assert dram.datasets.get(made.id).id == made.id
    assert [item.id for item in dram.datasets.list().data] == [made.id]
    dram.datasets.delete(made.id)
    with pytest.raises(DramApiError) as caught:
        dram.datasets.get(made.id)
    assert caught.value.status == 404


def test_the_catalogue(dram: Dram) -> None:
    assert "efficientnet_lite0" in [teacher.id for teacher in dram.teachers.list().data]
    assert "kd" in [method.id for method in dram.methods().data]
    assert "conv4" in [student.id for student in dram.architectures().data]


def test_jobs_from_plan_to_cancellation(dram: Dram) -> None:
    made = dram.datasets.create(pictures(), name="noise")
    order = {"dataset_id": made.id, "teacher_id": "efficientnet_lite0", "method": "kd", "student": "conv4"}
    planned = dram.jobs.plan(**order)
    assert [stage.name for stage in planned.stages][-1] == "bundle"
    assert {stage.reused for stage in planned.stages} == {False}
    assert list(dram.jobs.list().data) == []
    job = dram.jobs.create(**order, preset="draft", seed=5, precision="int8", metadata={"for": "a test"})
    assert (job.status, job.method, job.student) == ("queued", "kd", "conv4")
    again = dram.jobs.create(**order, seed=6, idempotency_key="one")
    assert dram.jobs.create(**order, seed=6, idempotency_key="one").id == again.id
    assert [item.id for item in dram.jobs.list(limit=1).data] == [again.id]
    assert dram.jobs.cancel(job.id).status in {"cancelling", "cancelled"}
    assert dram.jobs.wait(job.id, timeout_s=20).status == "cancelled"
    kinds = [event.type for event in dram.jobs.events(job.id)]
    assert (kinds[0], kinds[-1]) == ("job.created", "job.cancelled")
    assert [event.type for event in dram.jobs.history(job.id).data] == kinds
    assert list(dram.jobs.metrics(job.id).data) == []
    assert dram.jobs.retry(job.id).status == "queued"


def test_refusals_name_what_is_wrong(dram: Dram) -> None:
    made = dram.datasets.create(pictures(), name="noise")
    with pytest.raises(DramApiError) as caught:
        dram.jobs.create(dataset_id=made.id, teacher_id="nobody", method="kd", student="conv4")
    assert caught.value.status in {404, 422}
    assert "efficientnet_lite0" in f"{caught.value.detail} {caught.value.errors}"
    with pytest.raises(DramApiError) as caught:
        dram.students.report("stu_none")
    assert (caught.value.status, caught.value.request_id is not None) == (404, True)


def test_a_wrong_key_is_refused(gateway: Gateway) -> None:
    with Dram(gateway.url, key="dram_wrong") as stranger, pytest.raises(DramApiError) as caught:
        stranger.jobs.list()
    assert caught.value.status == 401
