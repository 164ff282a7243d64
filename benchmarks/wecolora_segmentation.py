"""wecolora_segmentation on images with masks: what a shorter ViT keeps of its teacher, from a few masks.

    python -m benchmarks.wecolora_segmentation --images FOLDER [--teacher FOLDER] [--quick]

`examples/make_masks.py` makes such a folder: coasts, and what of them is land. Every draw takes its labelled images
from `images/`; all learn from the same `unlabelled/` images besides, and are judged by all of `test/`. Each row is a
whole job but for the bundle; its figures are those of the job's report, measured with the exported ONNX files. What is
under `--work` from an earlier run is not done again, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, record
from benchmarks.kd_cifar10 import interval
from benchmarks.wecolora_cifar10 import spec_of
from models import local, teachers
from models.data import archive, masked_folder
from models.methods import METHODS
from models.runtime import generator, use_threads
from models.students import SHORTENED_VIT
from models.teachers import TeacherSpec

NAME = "wecolora_segmentation"
METHOD = METHODS[NAME]
COPIED, OURS = "weight copy alone", "WeCoLoRA, blocks by influence"
#: What each row changes in the parameters.
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    OURS: {},
    COPIED: {"blocks": {"rule": "last_of_group"}, "distillation": {"start": "copied", "adaptation": "none"}},
}
#: The student's mean IoU minus the teacher's, at r = 2.
TARGET = -0.02


def measure(
    splits: Mapping[str, Path],
    spec: TeacherSpec,
    work: Path,
    seed: int,
    row: str,
    r: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The report of one job, as a row."""
    steps = 3 if args.quick else args.steps
    changed = {
        "blocks": {"r": r},
        "distillation": {"input_size": args.size, "steps": steps},
        "evaluation": {"latency_runs": 5 if args.quick else 100},
    }
    params = METHOD.resolve(
        "balanced", {name: {**own, **ROWS[row].get(name, {})} for name, own in changed.items()}
    )
    run = local.run(
        METHOD,
        splits,
        spec,
        SHORTENED_VIT,
        work,
        params=params,
        seed=seed,
        device=args.device,
        wanted=["report"],
    )
    report = json.loads((run.folder("report") / "report.json").read_text())
    student, against = report["student"]["miou"], report["student_against_teacher"]
    return {
        "row": f"{row}, r = {r}",
        "draw": seed,
        "miou": student["value"],
        "low": student["low"],
        "high": student["high"],
        "teacher": report["teacher"]["miou"]["value"],
        "minus_teacher": against["miou_difference"],
        "parameters": report["student"]["parameters"],
        "times_faster": report["latency"]["speedup"]["value"],
    }


def drawn(split: Path, count: int, seed: int, folder: Path) -> Path:
    """`count` images of a split with their masks, as a split."""
    index = archive.read_index(split / archive.FILE_NAME)
    order = (
        torch.randperm(len(index.images), generator=generator(seed, "draw"))[:count].sort().values.tolist()
    )
    images, masks = (dict(read(split / archive.FILE_NAME)) for read in (archive.contents, archive.masks))
    chosen = tuple(index.images[position] for position in order)
    contents = (content for image in chosen for content in (images[image], masks[image]))
    folder.mkdir(parents=True, exist_ok=True)
    archive.write(folder / archive.FILE_NAME, archive.ArchiveIndex(index.classes, chosen), contents)
    return folder


def summary(rows: Sequence[dict[str, Any]], tested: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each row's mean over the draws with its 95 % interval, the teacher's, and whether the target is met."""
    means, checks = [], []
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in rows:
        groups.setdefault(found["row"], []).append(found)
    for name, of_row in [("teacher", next(iter(groups.values()))), *groups.items()]:
        values = [found["teacher" if name == "teacher" else "miou"] for found in of_row]
        low, high = interval(values, tested)
        means.append(
            {"row": name, "draw": "mean", "miou": statistics.fmean(values), "low": low, "high": high}
        )
        if name == f"{OURS}, r = 2":
            behind = [found["minus_teacher"] for found in of_row]
            title = f"{name}: mean IoU minus the teacher's"
            ends = interval(behind, tested)
            checks.append(record.check(title, statistics.fmean(behind), ends, at_least=TARGET))
    return means, checks


def main() -> None:
    parser = command.parser(__doc__, NAME)
    parser.add_argument("--images", type=Path, help="folder with images/, masks/, test/ and unlabelled/")
    parser.add_argument("--teacher", type=Path, help="folder of a timm ViT; the embedded one if not given")
    parser.add_argument("--draws", type=int, default=3, help="draws of labelled images")
    parser.add_argument("--shots", type=int, default=8, help="labelled images of a draw")
    parser.add_argument("--steps", type=int, default=500, help="updates of every student, of 64 views each")
    parser.add_argument("--size", type=int, default=64, help="side of the student's images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.images is None or not masked_folder.is_one(args.images):
        print("skipped: name a folder of images with masks by --images; examples/make_masks.py makes one")
        return
    spec = spec_of(args.teacher)
    state = teachers.availability(spec)
    if not state.available:
        print(f"skipped: {state.reason} Name a checkpoint's folder with --teacher.")
        return
    use_threads(args.threads)
    packed = masked_folder.pack(args.images, args.work / "splits")
    tested = len(archive.read_index(packed["test"] / archive.FILE_NAME).images)
    seeds = list(range(1 if args.quick else args.draws))
    rows = []
    for seed in seeds:
        support = drawn(
            packed["support"], args.shots, seed, args.work / "splits" / f"support{args.shots}-{seed}"
        )
        for row in ROWS:
            for r in (2,) if args.quick else (2, 3):
                splits = {**packed, "support": support}
                rows.append(measure(splits, spec, args.work, seed, row, r, args))
    means, checks = summary(rows, tested) if len(seeds) > 1 else ([], [])
    record.write(NAME, rows=[*means, *rows], checks=checks, seeds=seeds, quick=args.quick)


if __name__ == "__main__":
    main()
