"""What the journeys through the service share: students that are there without a job having run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from app import ids
from app.datasets.tables import Dataset
from app.jobs.tables import Job
from app.students.tables import Student
from app.wiring import Wiring

LABELS = ["red", "green", "blue"]


def graph(labels: list[str] = LABELS) -> bytes:
    """A student that knows the mean colour: uint8 [batch, height, width, 3] -> probabilities of red, green, blue."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    made = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
            helper.make_tensor("scale", TensorProto.FLOAT, [], [1 / 25]),
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, {"labels": json.dumps(labels)})
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def store(wiring: Wiring, content: bytes, folder: Path) -> str:
    path = folder / "content"
    path.write_bytes(content)
    return wiring.blobs.put(path)


def add_student(wiring: Wiring, folder: Path, files: dict[str, bytes], tenant: str = "default") -> str:
    student_id, job_id, dataset_id = ids.new("stu"), ids.new("job"), ids.new("ds")
    common: dict[str, Any] = {"teacher": "efficientnet_lite0", "method": "kd"}
    with wiring.database.writing() as session:
        session.add(
            Dataset(
                id=dataset_id,
                tenant=tenant,
                name="colours",
                digest=ids.new("d"),
                classes=LABELS,
                splits={},
                smallest_class=2,
                report={},
            )
        )
        session.flush()
        session.add(
            Job(
                id=job_id,
                tenant=tenant,
                dataset_id=dataset_id,
                student="conv4",
                preset="draft",
                params={},
                seed=0,
                labels={},
                sources={},
                shape={},
                status="succeeded",
                **common,
            )
        )
        session.flush()
        session.add(
            Student(
                id=student_id,
                tenant=tenant,
                job_id=job_id,
                dataset_id=dataset_id,
                architecture="conv4",
                classes=LABELS,
                files={name: store(wiring, content, folder) for name, content in files.items()},
                summary={"accuracy": 1.0},
                **common,
            )
        )
    return student_id


FILES = {
    "model.onnx": graph(),
    "bundle.zip": bytes(range(256)) * 4000,
    "report.json": b'{"accuracy": 1.0}',
    "labels.json": json.dumps(LABELS).encode(),
}


@pytest.fixture
def make_student(wiring: Wiring, tmp_path: Path) -> Callable[..., str]:
    """Makes a student that knows colours, with files of fixed content; its id."""

    def make(tenant: str = "default") -> str:
        return add_student(wiring, tmp_path, FILES, tenant)

    return make


@pytest.fixture
def student(make_student: Callable[..., str]) -> str:
    return make_student()


@pytest.fixture
def student_files() -> dict[str, bytes]:
    """The files of every student here."""
    return FILES


@pytest.fixture
def store_graph(wiring: Wiring, tmp_path: Path) -> Callable[[list[str]], str]:
    """Keeps a graph with these labels; its digest."""
    return lambda labels: store(wiring, graph(labels), tmp_path)
