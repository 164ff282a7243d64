"""kd on CIFAR-10, 10-way 10-shot, Conv4-64 at 32 px, tested on all test images: python -m benchmarks.kd_cifar10.

Three arms on the same draws of the supports: the teacher itself; the student from the 100 real images alone;
the student with 4,000 unlabelled images. `--through-api` makes the last arm once more by the HTTP API.
What is under `--work` from an earlier run is not done again, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import io
import math
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
from benchmarks import record
from models import local, students
from models.data import archive, fewshot
from models.methods import METHODS
from models.pipeline import Params
from models.runtime import generator, use_threads
from models.training.cross_validation import predict

NAME = "kd_cifar10"
TEACHER, TEACHER_SIZE, STUDENT = "efficientnet_lite2", 128, "conv4"
SHOTS, UNLABELLED = 10, 4000
TARGETS = {
    "teacher": 0.54,
    "real only": 0.37,
    "with unlabelled": 0.59,
    "with unlabelled, through the API": 0.59,
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


def measure(images: Files, seeds: Sequence[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each draw and arm."""
    params = parameters(args.preset, args.quick)
    rows = []
    for seed in seeds:
        unlabelled, tested = (40, 100) if args.quick else (UNLABELLED, len(images.test))
        splits = draw(images, seed, unlabelled, tested, args.work / ("quick" if args.quick else "splits"))
        options: dict[str, Any] = {"params": params, "seed": seed, "device": args.device}
        out = args.work / "runs"
        few = {name: splits[name] for name in ("support", "test")}
        runs = {
            "with unlabelled": local.run(
                "kd", splits, TEACHER, STUDENT, out, wanted=["trained_student", "teacher_on_test"], **options
            ),
            "real only": local.run("kd", few, TEACHER, STUDENT, out, wanted=["trained_student"], **options),
        }
        accuracies = {"teacher": teacher_accuracy(runs["with unlabelled"])}
        accuracies |= {arm: student_accuracy(run, splits["test"]) for arm, run in runs.items()}
        if args.through_api:
            accuracies["with unlabelled, through the API"] = accuracy_through_api(
                args.through_api, args.key, splits, params, seed, args.work
            )
        for arm, accuracy in accuracies.items():
            seconds = runs[arm].seconds.get("distill", 0.0) if arm in runs else 0.0
            rows.append({"arm": arm, "draw": seed, "accuracy": accuracy, "distil_seconds": round(seconds)})
            print(f"draw {seed}  {arm}: {accuracy:.4f}", flush=True)
    return rows


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


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean over draws, by Student's t."""
    if len(values) < 2:
        return (0.0, 1.0)
    reach = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return (mean - float(reach), mean + float(reach))


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    checks = []
    for arm, target in TARGETS.items():
        values = [row["accuracy"] for row in rows if row["arm"] == arm]
        if values:
            checks.append(record.check(arm, statistics.fmean(values), interval(values), at_least=target))
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with cifar10.tar.xz"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(".dram/benchmarks/kd_cifar10"), help="kept between runs"
    )
    parser.add_argument("--preset", default="balanced", choices=["draft", "balanced", "best"])
    parser.add_argument("--draws", type=int, default=3, help="draws of the supports; seeds 0, 1, ...")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="one draw, few images and steps; writes no result"
    )
    parser.add_argument(
        "--through-api", metavar="URL", help="also distil through the gateway at this address"
    )
    parser.add_argument("--key", help="API key for --through-api")
    args = parser.parse_args()
    if args.through_api and not args.key:
        parser.error("--through-api needs --key")
    use_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.data / "cifar10.tar.xz").is_file():
        print(f"skipped: {args.data} has no cifar10.tar.xz; name its folder with --data")
        return
    seeds = range(1 if args.quick else args.draws)
    rows = measure(unpacked(args.data, args.work), seeds, args)
    record.write(NAME, rows=rows, checks=summary(rows), seeds=list(seeds), quick=args.quick)


if __name__ == "__main__":
    main()
