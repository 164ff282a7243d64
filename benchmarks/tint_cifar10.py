"""tint on CIFAR-10: what images made from a few labelled ones teach a Conv4-64 student, and what is left to win.

    python -m benchmarks.tint_cifar10 [--data FOLDER] [--generator FOLDER] [--quick]

The labelled images are drawn from CIFAR-10's `test/`, which the generator has not seen, and class tokens start from
a neutral word. All rows of one draw have the same labelled images, teacher (its head is fitted to them alone), student
and training budget; a student is tested on all other test images. "Headroom closed" is (row - real only) / (oracle -
real only), where real only is a student of the labelled images alone and the oracle's teacher labels 400 unlabelled
training images a class. What is under `--work` from an earlier run is not done again, so a stopped run goes on.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, record
from benchmarks.kd_cifar10 import (
    STUDENT,
    TEACHER,
    TEACHER_SIZE,
    Files,
    interval,
    student_accuracy,
    teacher_accuracy,
    unpacked,
)
from models import generators, local
from models.data import fewshot
from models.generators import GENERATORS, GeneratorSpec
from models.methods import METHODS
from models.runtime import generator, use_bfloat16_on_cpu, use_threads

NAME = "tint_cifar10"
UNLABELLED = 400  # of each class
#: Test images of each class on which the teacher is measured; the students are on all.
EXAMINED = 100
REAL, KD, ORACLE, REFINED = "real only", "kd", "oracle", "oracle, its head trained on the unlabelled too"
TINT = "tint, alpha random"
#: What differs from the preset: a neutral first word, and less computing for each of thousands of images. The
#: guidance is the embedded generator's own.
MAKING = {
    "textual_inversion": {"initial_word": "object", "steps": 200, "patience": 75},
    "null_text_inversion": {"steps": 20, "guidance": 3.0},
    "generation": {"sampler": "dpm_solver++", "steps": 10, "guidance": 3.0},
}
STEPS = {"steps": 1500}
NO_HEAD_TRAINING = {"rounds": 0}

#: What each row changes in its method's parameters; the first four are measured in every setting. "As published" but
#: for one thing: synthetic features are centred apart in every row.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    REAL: ("kd", {"distillation": {"kd_weight": 0.0, "support_weight": 1.0}}),
    KD: ("kd", {}),
    TINT: ("tint", {}),
    ORACLE: ("kd", {"head": NO_HEAD_TRAINING}),
    "textual inversion only": ("tint", {"null_text_inversion": {"mode": "none"}}),
    REFINED: ("kd", {}),
    "tint as published": ("tint", {"null_text_inversion": {"mode": "null_text"}, "head": {"intended": 0}}),
    "null-text inversion only": (
        "tint",
        {"textual_inversion": {"steps": 0}, "null_text_inversion": {"mode": "null_text"}},
    ),
    "tint, alpha 1": ("tint", {"generation": {"alpha": 1.0}}),
    "tint, alpha 0.5": ("tint", {"generation": {"alpha": 0.5}}),
}
UNLABELLED_ROWS = (ORACLE, REFINED)
SHORT = tuple(ROWS)[:4]


@dataclass(frozen=True)
class Setting:
    """N-way K-shot, and the rows that are measured there."""

    ways: int
    shots: int
    rows: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.ways}-way {self.shots}-shot"


MAIN = Setting(10, 10, tuple(ROWS))
SETTINGS = (MAIN, Setting(10, 5, SHORT), Setting(10, 1, SHORT), Setting(5, 10, SHORT))
CHECKS = {TINT: 0.4}


@dataclass(frozen=True)
class Task:
    """One draw of a setting; `images` are its splits, `tested` those that the student is tested on."""

    setting: Setting
    seed: int
    images: Mapping[str, Path]
    tested: Path
    maker: GeneratorSpec
    preset: str
    quick: bool
    out: Path
    device: str
    threads: int


def draw(
    images: Files, setting: Setting, seed: int, unlabelled: int, folder: Path
) -> tuple[dict[str, Path], Path]:
    """The packed splits of one draw, with a small `test`, and all other test images."""
    random = generator(seed, "classes")
    chosen = torch.randperm(len(images.classes), generator=random)[: setting.ways].sort().values
    names = tuple(images.classes[i] for i in chosen)
    member = torch.isin(images.test_labels, chosen).nonzero()[:, 0]
    labels = torch.searchsorted(chosen, images.test_labels[member])
    support = fewshot.draw_support(labels, setting.shots, seed)
    others = torch.tensor(sorted(set(range(len(member))) - set(support.tolist())))
    examined = others[fewshot.draw_support(labels[others], min(EXAMINED, unlabelled), seed)]
    train = torch.isin(images.train_labels, chosen).nonzero()[:, 0]
    free = train[
        fewshot.draw_support(torch.searchsorted(chosen, images.train_labels[train]), unlabelled, seed)
    ]

    def packed(name: str, rows: torch.Tensor) -> Path:
        files = [images.test[int(member[row])] for row in rows]
        return fewshot.pack(folder / f"{name}{seed}", names, files, labels[rows].tolist())

    splits = {"support": packed("support", support), "test": packed("test", examined)}
    splits["unlabelled"] = fewshot.pack(
        folder / f"unlabelled{seed}", names, [images.train[int(row)] for row in free], [None] * len(free)
    )
    return splits, packed("tested", others)


def overrides(row: str, quick: bool) -> dict[str, Any]:
    """The parameters of a row: those that it is about, and what all rows share."""
    method, own = ROWS[row]
    shared: dict[str, dict[str, Any]] = {
        "teacher": {"input_size": TEACHER_SIZE},
        "distillation": dict(STEPS),
    }
    if method == "tint":
        shared |= {group: dict(changed) for group, changed in MAKING.items()}
    if quick:
        shared |= {"teacher": {"input_size": 64, "views": 2}, "distillation": {"steps": 30}}
    if quick and method == "tint":
        shared["textual_inversion"] |= {"steps": 4}
        shared["null_text_inversion"] |= {"steps": 3, "inner_steps": 2}
        shared["generation"] |= {"images_per_class": 4}
    return {group: {**shared.get(group, {}), **own.get(group, {})} for group in (*shared, *own)}


def measure(task: Task) -> list[dict[str, Any]]:
    """All rows of one draw, one after the other: they share what they can."""
    use_threads(task.threads)
    use_bfloat16_on_cpu()
    found = []
    for name in task.setting.rows:
        method = ROWS[name][0]
        names = ("support", "test", "unlabelled") if name in UNLABELLED_ROWS else ("support", "test")
        run = local.run(
            method,
            {split: task.images[split] for split in names},
            TEACHER,
            STUDENT,
            task.out,
            params=METHODS[method].resolve(task.preset, overrides(name, task.quick)),
            seed=task.seed,
            device=task.device,
            wanted=["trained_student", "teacher_on_test"],
            generator=task.maker,
        )
        row = {
            "setting": str(task.setting),
            "row": name,
            "draw": task.seed,
            "accuracy": student_accuracy(run, task.tested),
            "teacher": teacher_accuracy(run),
        }
        print(row, flush=True)
        found.append(row)
    return found


def summary(rows: Sequence[dict[str, Any]], tested: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each row's mean over the draws and the headroom it closes, with 95 % intervals; and the checks."""
    means, checks = [], []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = [row for row in rows if row["setting"] == setting]
        groups = {
            name: {row["draw"]: row["accuracy"] for row in here if row["row"] == name}
            for name in dict.fromkeys(row["row"] for row in here)
        }
        for name, values in groups.items():
            low, high = interval(list(values.values()), tested)
            mean = {"setting": setting, "row": name, "draw": "mean", "low": low, "high": high}
            mean["accuracy"] = statistics.fmean(values.values())
            mean["teacher"] = statistics.fmean(row["teacher"] for row in here if row["row"] == name)
            closed = [
                (value - groups[REAL][seed]) / (groups[ORACLE][seed] - groups[REAL][seed])
                for seed, value in values.items()
            ]
            mean["closed"] = statistics.fmean(closed)
            means.append(mean)
            if setting == str(MAIN) and name in CHECKS and len(closed) > 1:
                title = f"headroom closed by {name}, {setting}"
                bounds = interval(closed, tested)
                checks.append(record.check(title, mean["closed"], bounds, at_least=CHECKS[name]))
    return means, checks


def maker(folder: Path | None) -> GeneratorSpec:
    """The embedded generator, or another checkpoint in a folder."""
    if folder is None:
        return GENERATORS[generators.DEFAULT]
    found = GENERATORS[generators.DEFAULT].model_dump()
    found |= {"name": folder.name, "kind": "local", "source": str(folder.resolve()), "revision": None}
    return GeneratorSpec(**found)


def main() -> None:
    parser = command.parser(__doc__, NAME)
    command.add_data(parser)
    command.add_draws(parser)
    parser.add_argument("--generator", type=Path, help="a checkpoint of 32 px; the embedded one if not given")
    parser.add_argument("--preset", default="balanced", choices=["draft", "balanced", "best"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of the settings to run")
    parser.add_argument("--rows", type=int, default=len(ROWS), help="how many of the rows to run, 4 or more")
    args = parser.parse_args()
    if not command.has_data(args):
        return
    state = generators.availability(maker(args.generator))
    if not state.available:
        print(f"skipped: {state.reason}; name a checkpoint's folder with --generator")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    files = unpacked(args.data, args.work)
    seeds = list(range(1 if args.quick else args.draws))
    folder = args.work / ("quick" if args.quick else "draws")
    tasks = []
    for setting in (replace(each, rows=each.rows[: args.rows]) for each in SETTINGS[: args.settings]):
        place = folder / f"{setting.ways}x{setting.shots}"
        for seed in seeds:
            splits, tested = draw(files, setting, seed, 4 if args.quick else UNLABELLED, place)
            out = place / f"run{seed}"
            tasks.append(
                Task(
                    setting,
                    seed,
                    splits,
                    tested,
                    maker(args.generator),
                    args.preset,
                    args.quick,
                    out,
                    args.device,
                    args.threads,
                )
            )
    rows = [found for some in command.at_once(measure, tasks, args.processes) for found in some]
    means, checks = summary(rows, len(files.test) - MAIN.ways * MAIN.shots)
    record.write(NAME, rows=[*rows, *means], checks=checks, seeds=seeds, quick=args.quick)


if __name__ == "__main__":
    main()
