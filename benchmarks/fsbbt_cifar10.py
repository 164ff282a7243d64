"""FS-BBT on CIFAR-10: 2,000 unlabelled images and a teacher of which only answers are known, tested on all test images.

    python -m benchmarks.fsbbt_cifar10 [--makers] [--data FOLDER] [--work FOLDER] [--quick]

The teacher is a ResNet-8 that is trained here on all 50,000 training images, ten epochs, and handed over as an ONNX
file. Students: of the teacher's own architecture, and with half its channels. Rows: the student alone (cross-entropy
with the true labels of the 2,000), standard KD (the teacher's answers about them), FS-BBT (MixUp and CVAE images, as in
the paper), our best. With `--makers`, on the first draw, in a result of its own: every image maker at 2,000 (nothing
made), 10,000 and 42,000 questions, and active choice; the maker `diffusion` is the embedded generator, which has seen
all 50,000 training images, so it tells what such a generator is worth and is no rival of the others. What is under
`--work` from an earlier run is not done again, so a stopped run goes on.
"""

from __future__ import annotations

import hashlib
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import command, record
from benchmarks.kd_cifar10 import Files, interval, student_accuracy, unpacked
from models import local, students
from models.arrays import Labels, Pixels
from models.data import augment, fewshot, images
from models.methods import METHODS
from models.runtime import generator, seed_weights, use_bfloat16_on_cpu, use_threads
from models.teachers.black_box import InputFormat, OnnxTeacher
from models.training.loop import Schedule, fit

NAME = "fsbbt_cifar10"
SIDE, REAL = 32, 2000
STUDENT, HALF = "resnet8", "resnet8_half"
TEACHER, TEACHER_SEED, EPOCHS, BATCH = "resnet8", 0, 10, 128
MAKERS = ("mixup", "mixup_cvae", "cutmix", "mixup_cutmix", "diffusion")
PAPERS, BEST = "mixup_cvae", "mixup_cutmix"
#: Chosen with draw 100, on training images beside its 2,000.
RECIPE: dict[str, Any] = {
    "steps": 3000,
    "batch_size": 128,
    "lr": 0.01,
    "weight_decay": 0.05,
    "temperature": 4.0,
    "shift": 0.125,
    "flip": True,
    "colour": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema_decay": 0.995,
}
STEPS_ON_FEW, STEPS_ON_FEWER, STEPS_OF_HALF = 1000, 1500, 4500
DRAWING = {"sampler": "dpm_solver++", "steps": 10}
#: The CVAE's loss is flat from about 20 passes on; the paper makes 600.
CVAE = {"epochs": 60}
TARGETS = {
    ("FS-BBT", STUDENT): 0.7617,
    ("FS-BBT", HALF): 0.7410,
    ("best", STUDENT): 0.80,
}


@dataclass(frozen=True)
class Arm:
    """One way to a student. `params`: beside the method's defaults. `labels`: whether the real images have theirs."""

    name: str
    student: str
    maker: str
    questions: int
    params: Mapping[str, Mapping[str, Any]]
    labels: bool = False


@dataclass(frozen=True)
class Task:
    arm: Arm
    seed: int
    splits: dict[str, Path]
    teacher: OnnxTeacher
    model: Path
    out: Path
    threads: int
    bfloat16: bool = False


class Probabilities(nn.Module):
    """RGB images float [N, 3, S, S] in 0..1 -> class probabilities [N, C]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(images.normalise(image))
        return logits.softmax(1)


def train_teacher(pixels: Pixels, labels: Labels, epochs: int, checkpoints: Path) -> nn.Module:
    """A ResNet-8 of images uint8 [N, 3, 32, 32] and labels [N]: shifts and mirroring, no mixing, no smoothing."""
    seed_weights(TEACHER_SEED, "teacher")
    network: nn.Module = students.build(TEACHER, 10, SIDE).to(memory_format=torch.channels_last)
    transform = augment.Augmentation(shift=0.125, flip=True)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]).expand(BATCH, 5)
    batches = len(pixels) // BATCH

    def loss_at(step: int) -> Tensor:
        order = torch.randperm(len(pixels), generator=generator(TEACHER_SEED, "epoch", step // batches))
        chosen = order[step % batches * BATCH :][:BATCH]
        random = generator(TEACHER_SEED, "batch", step)
        seen = images.normalise(transform(pixels[chosen].float() / 255, whole, random))
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = network(seen.contiguous(memory_format=torch.channels_last))
        return functional.cross_entropy(logits.float(), labels[chosen])

    def report(step: int, total: int, **metrics: float) -> None:
        if step % batches == 0:
            print(f"teacher: epoch {step // batches} of {epochs}, loss {metrics['loss']:.3f}", flush=True)

    schedule = Schedule(epochs * batches, lr=0.01, weight_decay=0.05, ema_decay=0.998)
    return fit(network, loss_at, schedule, report, local.FolderCheckpoints(checkpoints))[0]


def write_teacher(network: nn.Module, path: Path) -> None:
    """Export to ONNX: `image` float [N, 3, 32, 32] in 0..1 -> `probabilities` [N, 10]."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Probabilities(network).eval(),
            (torch.rand(2, 3, SIDE, SIDE),),
            dynamo=True,
            external_data=False,
            input_names=["image"],
            output_names=["probabilities"],
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None
    partial = path.with_suffix(".partial")
    program.save(partial)
    partial.rename(path)


def answers(path: Path, pixels: Pixels) -> Tensor:
    """The probabilities [N, C] that an ONNX teacher gives images uint8 [N, 3, S, S]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def rows() -> Iterator[Tensor]:
        for part in torch.split(pixels, 500):
            (found,) = session.run(["probabilities"], {"image": (part.float() / 255).numpy()})
            yield torch.from_numpy(found)

    return torch.cat(list(rows()))


def described(path: Path, classes: Sequence[str], name: str, channels: int, side: int) -> OnnxTeacher:
    """An ONNX file as the service would know it."""
    content = path.read_bytes()
    return OnnxTeacher(
        name=name,
        title=name,
        classes=tuple(classes),
        input=InputFormat(height=side, width=side, channels=channels),
        source=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        parameters=0,
        input_name="image",
        output_name="probabilities",
    )


def decoded(files: Sequence[Path]) -> Pixels:
    return images.squares(((path.name, path.read_bytes()) for path in files), SIDE)


def draw(files: Files, seed: int, folder: Path) -> dict[str, Path]:
    """The packed splits of one draw: `unlabelled` and, of the same images, `support` with labels; `test`."""
    chosen = torch.randperm(len(files.train), generator=generator(seed, "fsbbt"))[:REAL]
    paths, labels = [files.train[i] for i in chosen], files.train_labels[chosen].tolist()
    nothing: list[int | None] = [None] * REAL
    return {
        "unlabelled": fewshot.pack(folder / f"unlabelled{seed}", files.classes, paths, nothing),
        "support": fewshot.pack(folder / f"support{seed}", files.classes, paths, labels),
        "test": fewshot.pack(folder / "test", files.classes, files.test, files.test_labels.tolist()),
    }


def arms() -> list[Arm]:
    """What is measured on every draw."""
    few = {**RECIPE, "steps": STEPS_ON_FEW}
    alone = {**few, "kd_weight": 0.0, "support_weight": 1.0}
    return [
        Arm("student alone", STUDENT, PAPERS, 0, {"distillation": alone}, labels=True),
        Arm("standard KD", STUDENT, PAPERS, REAL, {"distillation": few}),
        Arm("FS-BBT", STUDENT, PAPERS, 42_000, {"distillation": RECIPE}),
        Arm("FS-BBT", HALF, PAPERS, 42_000, {"distillation": {**RECIPE, "steps": STEPS_OF_HALF}}),
        Arm("best", STUDENT, BEST, 42_000, {"distillation": RECIPE}),
    ]


def makers() -> list[Arm]:
    """Every image maker at every number of questions, with as many steps for one maker as for another."""
    fewer = {**RECIPE, "steps": STEPS_ON_FEWER}
    return [
        Arm("standard KD", STUDENT, PAPERS, REAL, {"distillation": {**RECIPE, "steps": STEPS_ON_FEW}}),
        Arm("active choice", STUDENT, BEST, 10_000, {"distillation": fewer, "synthesis": {"pool": 3.0}}),
        *(
            Arm(maker, STUDENT, maker, asked, {"distillation": recipe, "synthesis": {"drawing": DRAWING}})
            for asked, recipe in ((10_000, fewer), (42_000, RECIPE))
            for maker in MAKERS
        ),
    ]


def quick(arm: Arm) -> Arm:
    """The same arm with a hundred synthetic images and a few steps."""
    params = {
        **arm.params,
        "distillation": {**arm.params["distillation"], "steps": 20},
        "cvae": {"epochs": 1},
    }
    return replace(arm, questions=min(arm.questions, REAL + 100), params=params)


def measure(task: Task) -> dict[str, Any]:
    """Distil by the method as the service runs it, and test the student."""
    use_threads(task.threads)
    use_bfloat16_on_cpu(task.bfloat16)
    arm, method = task.arm, METHODS["fsbbt"]
    synthetic = {
        "images": max(0, arm.questions - REAL),
        "maker": arm.maker,
        **arm.params.get("synthesis", {}),
    }
    given = "support" if arm.labels else "unlabelled"
    run = local.run(
        method,
        {given: task.splits[given], "test": task.splits["test"]},
        task.teacher,
        arm.student,
        task.out,
        params=method.resolve("balanced", {"cvae": CVAE, **arm.params, "synthesis": synthetic}),
        seed=task.seed,
        device="cpu",
        wanted=["trained_student"],
        model=task.model,
    )
    accuracy = student_accuracy(run, task.splits["test"])
    print(
        f"draw {task.seed}  {arm.name}, {arm.student}, {arm.maker}, {arm.questions}: {accuracy:.4f}",
        flush=True,
    )
    return row(arm, task.seed, accuracy) | {"seconds": round(sum(run.seconds.values()))}


def row(arm: Arm, draw: int | str, accuracy: float) -> dict[str, Any]:
    maker = arm.maker if arm.questions > REAL else None
    return {
        "arm": arm.name,
        "student": arm.student,
        "maker": maker,
        "questions": arm.questions,
        "draw": draw,
        "accuracy": accuracy,
    }


def summary(
    rows: Sequence[dict[str, Any]],
    arms: Sequence[Arm],
    targets: Mapping[tuple[str, str], float],
    tested: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The mean of every arm over its draws with a 95 % interval, and the checks of those with a target
    that ask the most questions."""
    most = max(arm.questions for arm in arms)
    means, checks = [], []
    for arm in arms:
        name = row(arm, "", 0.0)
        values = [
            found["accuracy"]
            for found in rows
            if all(found[key] == name[key] for key in ("arm", "student", "maker", "questions"))
        ]
        mean, (low, high) = statistics.fmean(values), interval(values, tested)
        means.append({**row(arm, "mean", mean), "low": low, "high": high, "draws": len(values)})
        target = targets.get((arm.name, arm.student))
        if target is not None and arm.questions == most:
            checks.append(record.check(f"{arm.name}, {arm.student}", mean, (low, high), at_least=target))
    return means, checks


def main() -> None:
    parser = command.parser(__doc__, NAME)
    command.add_data(parser)
    command.add_draws(parser, processes=1)
    parser.add_argument("--makers", action="store_true", help="compare image makers, on the first draw")
    parser.add_argument("--rows", type=int, help="how many of the rows to run; all if not given")
    args = parser.parse_args()
    if not command.has_data(args):
        return
    args.work.mkdir(parents=True, exist_ok=True)
    use_threads(args.threads)
    files = unpacked(args.data, args.work)
    model = args.work / "teacher.onnx"
    if not model.is_file():
        network = train_teacher(decoded(files.train), files.train_labels, EPOCHS, args.work / "teacher")
        write_teacher(network, model)
    teacher = described(model, files.classes, NAME, 3, SIDE)
    tested = answers(model, decoded(files.test)).argmax(1) == files.test_labels
    found = float(tested.double().mean())
    print(f"teacher: {found:.4f}", flush=True)
    chosen = (makers() if args.makers else arms())[: args.rows]
    if args.quick:
        chosen = [quick(arm) for arm in chosen]
    seeds = list(range(1 if args.quick or args.makers else args.draws))
    splits = [draw(files, seed, args.work / "splits") for seed in seeds]
    tasks = [
        Task(arm, seed, splits[seed], teacher, model, args.work / "runs", args.threads, bfloat16=True)
        for arm in chosen
        for seed in seeds
    ]
    rows = command.at_once(measure, tasks, args.processes)
    means, checks = summary(rows, chosen, TARGETS, len(files.test))
    interval_of_teacher = interval([found], len(files.test))
    checks.append(record.check("teacher, at least", found, interval_of_teacher, at_least=0.83))
    checks.append(record.check("teacher, at most", found, interval_of_teacher, at_most=0.85))
    name = f"{NAME}_makers" if args.makers else NAME
    record.write(name, rows=[*rows, *means], checks=checks, seeds=seeds, quick=args.quick)


if __name__ == "__main__":
    main()
