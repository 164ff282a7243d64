"""A small real student and small real splits on disk, in the form in which the stages leave them."""

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from models import students, teachers
from models.data import archive, fewshot, images
from models.evaluation import report
from models.evaluation.answers import held_out_positions
from models.export import bundle, onnx_graph, teacher_graph
from models.pipeline import JobShape, StageContext
from models.stages import EvaluationParams, ExportParams
from models.teachers.black_box import MODEL_FILE, AnswerKind
from models.teachers.black_box_questions import Introduction

CLASSES = ("käse", "red brick", "sky")
COLOURS = ((200, 180, 60), (170, 60, 50), (80, 140, 220))
SHAPE = JobShape(classes=3, support=24, smallest_class=8, unlabelled=18, test=30)
SIZES = ((40, 52), (33, 21), (64, 64), (90, 37))


class NoCheckpoints:
    def latest(self):
        return None

    def due(self):
        return False

    def save(self, step, write):
        raise AssertionError("not due")


def photograph(label, number):
    """Bytes of a JPEG of odd size: the class's colour with a texture and noise of its own."""
    random = np.random.default_rng([label, number])
    height, width = SIZES[number % len(SIZES)]
    waves = np.sin(np.arange(width) * (label + 1) / 3)[None, :, None] * 25
    noise = random.normal(0, 30, (height, width, 3)) + random.normal(0, 35, 3)
    pixels = (np.array(COLOURS[label]) + waves + noise).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def split(folder, per_class, first=0, labelled=True):
    folder.mkdir(parents=True)
    entries, contents = [], []
    for label in range(len(CLASSES)):
        for number in range(first, first + per_class):
            name = f"{CLASSES[label]}/{number}.jpg"
            file = f"{len(entries):06d}.jpg"
            entries.append(archive.ArchivedImage(file, label if labelled else None, name))
            contents.append(photograph(label, number))
    archive.write(folder / archive.FILE_NAME, archive.ArchiveIndex(CLASSES, tuple(entries)), contents)
    return folder


@pytest.fixture(scope="session")
def splits(tmp_path_factory):
    root = tmp_path_factory.mktemp("splits")
    return {
        "support": split(root / "support", 8),
        "test": split(root / "test", 10, first=100),
        "unlabelled": split(root / "unlabelled", 6, first=200, labelled=False),
    }


@pytest.fixture(scope="session")
def trained_student(splits, tmp_path_factory):
    """Conv4 after a few steps on the support: neither random nor perfect."""
    folder = tmp_path_factory.mktemp("trained_student")
    torch.manual_seed(0)
    network = students.build("conv4", len(CLASSES), 32)
    data = fewshot.load(splits["support"], 32)
    pixels = images.normalise(data.pixels.float() / 255)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    network.train()
    for _ in range(12):
        loss = functional.cross_entropy(network(pixels), data.labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    save_file(network.state_dict(), folder / "weights.safetensors")
    document = {
        "name": "conv4",
        "input_size": 32,
        "classes": CLASSES,
        "mean": images.MEAN,
        "std": images.STD,
    }
    (folder / "student.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="session")
def student(trained_student):
    return students.load(trained_student)


@pytest.fixture(scope="session")
def sources(splits, trained_student, tmp_path_factory):
    """All artefacts that exist before EXPORT, and a stand-in for the teacher's graph: another Conv4, untrained."""
    root = tmp_path_factory.mktemp("sources")
    for name in ("teacher", "student", "teacher_onnx"):
        (root / name).mkdir()
    spec = teachers.TEACHERS["efficientnet_lite0"]
    (root / "teacher" / "teacher.json").write_text(spec.model_dump_json())
    (root / "student" / "student.json").write_text('{"name": "conv4"}')
    torch.manual_seed(1)
    network = students.build("conv4", len(CLASSES), 64)
    content = onnx_graph.to_bytes(onnx_graph.build(network, 64, images.MEAN, images.STD))
    (root / "teacher_onnx" / teacher_graph.FILE_NAME).write_bytes(content)
    document = {
        "name": spec.name,
        "parameters": onnx_graph.parameter_count(network),
        "bytes": len(content),
        "input_size": 64,
    }
    (root / "teacher_onnx" / teacher_graph.DOCUMENT_NAME).write_text(json.dumps(document))
    made = {name: (root / name,) for name in ("teacher", "student", "teacher_onnx")}
    return made | {"support": (splits["support"],), "trained_student": (trained_student,)}


def probabilities(labels, right):
    """Scores [N, 3] that answer the first `right` images of `labels` [N] rightly and the others wrongly."""
    answers = np.where(np.arange(len(labels)) < right, labels, (labels + 1) % 3)
    return torch.from_numpy(np.where(np.eye(3)[answers] == 1, 0.8, 0.1).astype(np.float32))


@pytest.fixture(scope="session")
def judges(splits, tmp_path_factory):
    """The teacher's answers to the test split in two shards, and three folds of a cross-validation."""
    root = tmp_path_factory.mktemp("judges")
    labels = fewshot.read_labels(splits["test"])
    scores = probabilities(labels.numpy(), 24)
    on_test = []
    for shard, rows in enumerate((slice(0, 20), slice(20, 30))):
        folder = root / f"test{shard}"
        folder.mkdir()
        document = {"probabilities": scores[rows].contiguous(), "labels": labels[rows].contiguous()}
        save_file(document, folder / "probabilities.safetensors")
        on_test.append(folder)
    support = fewshot.read_labels(splits["support"])
    folds = []
    for fold in range(3):
        folder = root / f"fold{fold}"
        folder.mkdir()
        index = torch.arange(fold, len(support), 3)
        document = {
            "student": probabilities(support[index].numpy(), 5),
            "teacher": probabilities(support[index].numpy(), 7),
            "labels": support[index].contiguous(),
            "index": index,
        }
        save_file(document, folder / "predictions.safetensors")
        folds.append(folder)
    return {"teacher_on_test": tuple(on_test), "cross_validation": tuple(folds)}


@pytest.fixture(scope="session")
def black_box_judges(splits, tmp_path_factory):
    """Makes what a black box answered to held-out images: to the last of the labelled and of the unlabelled ones."""

    def make(index, labels):
        folder = tmp_path_factory.mktemp("held_out")
        document = {
            "probabilities": probabilities(np.arange(len(index)) % 3, len(index)),
            "index": torch.tensor(index),
            "labels": torch.tensor(labels),
        }
        save_file(document, folder / "answers.safetensors")
        return folder

    return make


@pytest.fixture(scope="session")
def context_of(tmp_path_factory):
    def make(name, inputs, shape=SHAPE):
        output = tmp_path_factory.mktemp(name)
        return StageContext(
            inputs=inputs,
            output=output,
            shape=shape,
            seed=7,
            device="cpu",
            report=lambda step, total, **metrics: None,
            checkpoints=NoCheckpoints(),
        )

    return make


@pytest.fixture(scope="session")
def black_box_journey(context_of, sources, tmp_path_factory):
    """EXPORT, EVALUATE and BUNDLE of a student of a black box. Returns the folder of each artefact."""

    def make(teacher, inputs, shape, *, model=None, int8=False, max_accuracy_drop=0.01) -> dict[str, Path]:
        root = tmp_path_factory.mktemp("black_box_journey")
        asked = inputs.get("teacher_on_held_out")
        held_out = held_out_positions(*asked) if asked else []
        introduction = Introduction(
            CLASSES, (0, 1, 2), AnswerKind.PROBABILITIES, "k", 0.1, 28, tuple(held_out)
        )
        (root / "black_box").mkdir()
        (root / "black_box" / "black_box.json").write_text(json.dumps(asdict(introduction)))
        (root / "teacher").mkdir()
        (root / "teacher" / "teacher.json").write_text(teacher.model_dump_json())
        if model is not None:
            (root / "teacher" / MODEL_FILE).write_bytes(model)
        made = {name: sources[name] for name in ("trained_student", "student")} | inputs
        made |= {name: (root / name,) for name in ("teacher", "black_box")}
        context = context_of("black_box_export", made, shape)
        onnx_graph.run(context, ExportParams(int8=int8, max_accuracy_drop=max_accuracy_drop))
        made["student_onnx"] = (context.output,)
        context = context_of("black_box_report", made, shape)
        report.run(context, EvaluationParams(latency_runs=5))
        made["report"] = (context.output,)
        context = context_of("black_box_bundle", made, shape)
        bundle.run(context, None)
        return {
            "student_onnx": made["student_onnx"][0],
            "report": made["report"][0],
            "bundle": context.output,
        }

    return make


@pytest.fixture(scope="session")
def journey(context_of, sources, splits, judges):
    """EXPORT, EVALUATE and BUNDLE in a row. Returns the folder of each artefact."""

    def make(name="journey", *, int8=False, max_accuracy_drop=0.01, with_test=True) -> dict[str, Path]:
        shape = replace(SHAPE, test=30 if with_test else 0)
        made = dict(sources) | {"unlabelled": (splits["unlabelled"],)}
        extra = (
            {"test": (splits["test"],), "teacher_on_test": judges["teacher_on_test"]}
            if with_test
            else {"cross_validation": judges["cross_validation"]}
        )
        context = context_of(f"{name}_export", made, shape)
        onnx_graph.run(context, ExportParams(int8=int8, max_accuracy_drop=max_accuracy_drop))
        made |= extra | {"student_onnx": (context.output,)}
        context = context_of(f"{name}_report", made, shape)
        report.run(context, EvaluationParams(latency_runs=5))
        made["report"] = (context.output,)
        context = context_of(f"{name}_bundle", made, shape)
        bundle.run(context, None)
        return {
            "student_onnx": made["student_onnx"][0],
            "report": made["report"][0],
            "bundle": context.output,
        }

    return make
