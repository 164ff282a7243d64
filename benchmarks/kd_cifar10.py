"""kd on CIFAR-10, 10-way 10-shot, Conv4-64 at 32 px, tested on all test images.

    python -m benchmarks.kd_cifar10 [--data FOLDER] [--quick] [--through-api URL]

Two arms on the same draws of the supports: the 100 real images alone, and with 4,000 unlabelled images. Each has
a student and a teacher: a frozen network with a head that is fitted to what the arm has. `--through-api` makes
the last student of the first draw once more by the HTTP API. What is under `--work` from an earlier run is not
done again, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import statistics
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from app.client import Dram
from benchmarks import command, record
from models import local, students
from models.data import archive, fewshot
from models.methods import METHODS
from models.pipeline import Params
from models.runtime import generator, use_threads
from models.training.cross_validation import predict

NAME = "kd_cifar10"
TEACHER, TEACHER_SIZE, STUDENT = "efficientnet_lite2", 128, "conv4"
SHOTS, UNLABELLED = 10, 4000
REAL, UNLABELLED_TOO, BY_API = "real only", "with unlabelled", "unlabelled, through the API"
TARGETS = {
    f"teacher, {UNLABELLED_TOO}": 0.54,
    f"student, {REAL}": 0.37,
    f"student, {UNLABELLED_TOO}": 0.59,
    f"student, {BY_API}": 0.59,
}


@dataclass(frozen=True)
class Files:
    classes: tuple[str, ...]
    train: tuple[Path, ...]
    train_labels: torch.Tensor
    test: tuple[Path, ...]
    test_labels: torch.Tensor


def unpacked(data: Path, work: Path) -> Files:
    """CIFAR-10 as files, unpacked once under `work`."""
    root = work / "cifar10"
    if not root.is_dir():
        partial = work / "cifar10.partial"
        with tarfile.open(data / "cifar10.tar.xz") as archive:
            archive.extractall(partial, filter="data")
        partial.rename(root)
    classes = tuple(sorted(path.name for path in (root / "train").iterdir()))
    files = {
        split: [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((root / split / name).iterdir())
        ]
        for split in ("train", "test")
    }
    paths = {split: tuple(path for path, _ in rows) for split, rows in files.items()}
    labels = {split: torch.tensor([label for _, label in rows]) for split, rows in files.items()}
    return Files(classes, paths["train"], labels["train"], paths["test"], labels["test"])


def draw(images: Files, seed: int, unlabelled: int, tested: int, folder: Path) -> dict[str, Path]:
    """The packed splits of one draw: supports, unlabelled images that are no supports, test images."""
    support = fewshot.draw_support(images.train_labels, SHOTS, seed)
    order = torch.randperm(len(images.train), generator=generator(seed, "unlabelled"))
    others = order[~torch.isin(order, support)][:unlabelled].tolist()
    # --quick tests on an even part of every class.
    test = range(0, len(images.test), len(images.test) // tested)
    wanted: dict[str, tuple[Path, list[Path], list[int | None]]] = {
        "support": (
            folder / f"support{seed}",
            [images.train[i] for i in support],
            images.train_labels[support].tolist(),
        ),
        "unlabelled": (folder / f"unlabelled{seed}", [images.train[i] for i in others], [None] * len(others)),
        "test": (folder / "test", [images.test[i] for i in test], images.test_labels[list(test)].tolist()),
    }
    return {
        name: fewshot.pack(path, images.classes, files, labels)
        for name, (path, files, labels) in wanted.items()
    }


def parameters(preset: str, quick: bool) -> Params:
    overrides: dict[str, Any] = {"teacher": {"input_size": TEACHER_SIZE}}
    if quick:
        overrides = {"teacher": {"input_size": 64, "views": 2}, "distillation": {"steps": 30}}
    return METHODS["kd"].resolve(preset, overrides)


def student_accuracy(run: local.LocalRun, test: Path) -> float:
    student = students.load(run.folder("trained_student"))
    split = fewshot.load(test, student.input_size)
    return float((predict(student.network, split.pixels).argmax(1) == split.labels).double().mean())


def teacher_accuracy(run: local.LocalRun) -> float:
    shards = [load_file(folder / "probabilities.safetensors") for folder in run.folders["teacher_on_test"]]
    hits = torch.cat([shard["probabilities"].argmax(1) == shard["labels"] for shard in shards])
    return float(hits.double().mean())


@dataclass(frozen=True)
class Task:
    """One arm on one draw; `images` are the splits that the arm may use."""

    arm: str
    seed: int
    images: Mapping[str, Path]
    params: Params
    out: Path
    device: str
    threads: int


def measure(task: Task) -> list[dict[str, Any]]:
    """Distil and examine; one row for the student, one for the teacher."""
    use_threads(task.threads)
    run = local.run(
        "kd",
        task.images,
        TEACHER,
        STUDENT,
        task.out,
        params=task.params,
        seed=task.seed,
        device=task.device,
        wanted=["trained_student", "teacher_on_test"],
    )
    return [
        row("student", task.arm, task.seed, student_accuracy(run, task.images["test"])),
        row("teacher", task.arm, task.seed, teacher_accuracy(run)),
    ]


def row(who: str, arm: str, seed: int, accuracy: float) -> dict[str, Any]:
    print(f"draw {seed}  {who}, {arm}: {accuracy:.4f}", flush=True)
    return {"who": who, "arm": arm, "draw": seed, "accuracy": accuracy}


def measure_all(
    splits: Sequence[Mapping[str, Path]], params: Params, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Both arms of every draw, `--processes` at a time."""
    tasks = []
    for seed, images in enumerate(splits):
        few = {name: folder for name, folder in images.items() if name != "unlabelled"}
        for arm, given in ((UNLABELLED_TOO, images), (REAL, few)):
            out = args.work / "runs" / arm.replace(" ", "-")
            tasks.append(Task(arm, seed, given, params, out, args.device, args.threads))
    return [found for rows in command.at_once(measure, tasks, args.processes) for found in rows]


def accuracy_through_api(
    address: str, key: str, splits: Mapping[str, Path], params: Params, seed: int, work: Path
) -> float:
    """Upload the splits, order the student, run its ONNX file on the test images, decoded by Pillow alone."""
    classes = archive.read_index(splits["support"] / archive.FILE_NAME).classes
    members = []
    for split, prefix in (("support", ""), ("test", "test/"), ("unlabelled", "unlabelled/")):
        for image, content in archive.contents(splits[split] / archive.FILE_NAME):
            folder = "" if image.label is None else f"{classes[image.label]}/"
            members.append((f"{prefix}{folder}{image.file}", content))
    with Dram(address, key=key) as dram:
        dataset = dram.datasets.create(members, name=f"cifar10-draw{seed}")
        job = dram.jobs.create(
            dataset_id=dataset.id,
            teacher_id=TEACHER,
            method="kd",
            student=STUDENT,
            params=params.model_dump(mode="json"),
            seed=seed,
        )
        job = dram.jobs.wait(job.id)
        if job.student_id is None:
            raise SystemExit(f"job {job.id} is {job.status}: {job.error}")
        path = dram.students.download(job.student_id, work / f"draw{seed}.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    hits = []
    for image, content in archive.contents(splits["test"] / archive.FILE_NAME):
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[None]
        answer = session.run(None, {session.get_inputs()[0].name: pixels})[0]
        hits.append(int(answer.argmax()) == image.label)
    return float(np.mean(hits))


def interval(values: Sequence[float], tested: int) -> tuple[float, float]:
    """95 % interval of the mean over draws, by Student's t; of one draw, over its test images, by Wilson."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        wilson = stats.binomtest(round(mean * tested), tested).proportion_ci(method="wilson")
        return (float(wilson.low), float(wilson.high))
    reach = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return (mean - float(reach), mean + float(reach))


def summary(rows: Sequence[dict[str, Any]], tested: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The mean of each kind of row over the draws with its 95 % interval, and the checks of those with a target."""
    groups: dict[str, list[float]] = {}
    for found in rows:
        groups.setdefault(f"{found['who']}, {found['arm']}", []).append(found["accuracy"])
    means, checks = [], []
    for name, values in groups.items():
        mean, (low, high) = statistics.fmean(values), interval(values, tested)
        who, arm = name.split(", ", 1)
        means.append({"who": who, "arm": arm, "draw": "mean", "accuracy": mean, "low": low, "high": high})
        if name in TARGETS:
            checks.append(record.check(name, mean, (low, high), at_least=TARGETS[name]))
    return means, checks


def main() -> None:
    parser = command.parser(__doc__, NAME)
    command.add_data(parser)
    command.add_draws(parser)
    parser.add_argument("--preset", default="balanced", choices=["draft", "balanced", "best"])
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--through-api", metavar="URL", help="also distil draw 0 through the gateway at this address"
    )
    args = parser.parse_args()
    key = os.environ.get("DRAM_API_KEY", "")  # no argument: the command line is written into the result
    if args.through_api and not key:
        parser.error("--through-api needs the service's key in DRAM_API_KEY")
    if not command.has_data(args):
        return
    args.work.mkdir(parents=True, exist_ok=True)
    files = unpacked(args.data, args.work)
    params = parameters(args.preset, args.quick)
    unlabelled, tested = (40, 100) if args.quick else (UNLABELLED, len(files.test))
    folder = args.work / ("quick" if args.quick else "splits")
    seeds = list(range(1 if args.quick else args.draws))
    splits = [draw(files, seed, unlabelled, tested, folder) for seed in seeds]
    rows = measure_all(splits, params, args)
    if args.through_api:
        accuracy = accuracy_through_api(args.through_api, key, splits[0], params, seeds[0], args.work)
        rows.append(row("student", BY_API, seeds[0], accuracy))
    means, checks = summary(rows, tested)
    record.write(NAME, rows=[*rows, *means], checks=checks, seeds=seeds, quick=args.quick)


if __name__ == "__main__":
    main()
