"""wecolora on CIFAR-10: what a shorter ViT keeps of the embedded one, from 1 % and 10 % of the images, unlabelled.

    python -m benchmarks.wecolora_cifar10 [--data FOLDER] [--teacher FOLDER] [--quick]

Every row of a draw has the same unlabelled training images, the same number of steps and views, and is judged by the
same linear probe: 5,000 labelled training images, all of `test/`. The embedded ViT has learnt from all training images
before; no student sees more of them than its row says. The rows of the paper share one recipe (its optimiser, one
learning rate, as many updates as it makes with 1 % of ImageNet, though of fewer images), as they do there; what another
recipe gives is in rows of its own, what four times as many updates give in a setting of its own. Students train in
bfloat16 on a CPU that has it and are judged in float32. Then, in one run each: the time that students and teacher take
for an image in ONNX Runtime, turn by turn, and the training with kept teacher tokens beside a plain loop that asks the
teacher at every step. What is under `--work` from an earlier run is not done again, so a stopped run goes on.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, record
from benchmarks.kd_cifar10 import Files, interval, unpacked
from models import local, teachers
from models.arrays import Features, Pixels
from models.data import augment, fewshot, images
from models.evaluation import depth_latency, latency
from models.methods import METHODS
from models.methods.wecolora import TokenDistillationParams
from models.pipeline import Params
from models.runtime import cpu_has_bfloat16, generator, resolve_device, use_bfloat16_on_cpu, use_threads
from models.students import SHORTENED_VIT, block_selection, shortened_vit, vit_families
from models.students.shortened_vit import Shortening, TokenTap
from models.teachers import TEACHERS, TeacherSpec
from models.teachers.protocol import Teacher
from models.training import linear_probe, low_rank, optimiser, token_distillation
from models.training.loop import NoCheckpoints

NAME = "wecolora_cifar10"
TEACHER = "embedded_vit"
METHOD = METHODS["wecolora_features"]  # which needs no labels

#: Of the paper's rows, and Dram's default; chosen for WeCoLoRA on draw 100, where 500 updates fail with twice as much.
LEARNING_RATE = 1e-2
#: What suits all weights better; found on draw 100, too.
GENTLER = 4e-3
#: The paper's with 1 % of ImageNet: ten epochs of 12,811 images, 1,024 at a time. Here they are of 64 views each.
UPDATES = 125
PROBED = 5000  # training images that the linear probes are fitted to
PENALTY = 1e-3
AT_ONCE = 256
QUICK_ROWS = 5

COPIED, PAPER, RANDOM = "weight copy + KD", "WeCoLoRA", "random + KD"
OURS = "WeCoLoRA, blocks by influence"
#: The distillation of every row, and its rule of blocks, but for what the row changes.
SHARED = {"start": "copied", "lr": LEARNING_RATE}
RULE = "last_of_group"
FULL = {"adaptation": "full"}
REFITTED = {"start": "refitted"}
INFLUENCE = {"rule": "influence"}
#: What each row changes in the parameters, the most telling first. The paper's are the first four; the fifth is Dram's
#: default.
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    COPIED: {"distillation": FULL},
    PAPER: {},
    RANDOM: {"distillation": {**FULL, "start": "random"}},
    "weight copy + plain LoRA": {"distillation": {"adaptation": "lora"}},
    OURS: {"blocks": INFLUENCE},
    "WeCoLoRA, blocks by influence, refitted, at 4e-3": {
        "blocks": INFLUENCE,
        "distillation": {**REFITTED, "lr": GENTLER},
    },
    "WeCoLoRA, refitted blocks, at 4e-3": {"distillation": {**REFITTED, "lr": GENTLER}},
    "weight copy alone": {"distillation": {"adaptation": "none"}},
    "refitted blocks alone": {"distillation": {**REFITTED, "adaptation": "none"}},
    "weight copy + KD, at 4e-3": {"distillation": {**FULL, "lr": GENTLER}},
    "WeCoLoRA, at 4e-3": {"distillation": {"lr": GENTLER}},
    "weight copy + KD, blocks by influence, refitted, at 4e-3": {
        "blocks": INFLUENCE,
        "distillation": {**FULL, **REFITTED, "lr": GENTLER},
    },
    "WeCoLoRA, after every block": {"distillation": {"match": "all"}},
    "WeCoLoRA, the first of every r blocks": {"blocks": {"rule": "first_of_group"}},
    "WeCoLoRA, with magnitudes (DoRA)": {"distillation": {"adaptation": "dora"}},
}
MAIN_ROWS = tuple(ROWS)[:5]


@dataclass(frozen=True)
class Setting:
    """A share of the training images, one block kept of every `r`, and the rows that are measured there."""

    unlabelled: int
    r: int
    updates: int = UPDATES
    rows: tuple[str, ...] = MAIN_ROWS

    def __str__(self) -> str:
        return f"{self.unlabelled:,} images, r = {self.r}, {self.updates} updates"


MAIN = Setting(500, 2, rows=tuple(ROWS))
LONGER = Setting(500, 2, updates=4 * UPDATES, rows=(COPIED, PAPER, RANDOM))
SETTINGS = (MAIN, LONGER, Setting(500, 3), Setting(5000, 2), Setting(5000, 3))
#: Points by which WeCoLoRA is to be ahead of a row with 500 images and r = 2.
AHEAD = {COPIED: 0.03, RANDOM: 0.20}
#: How many times faster than its teacher a student is to be.
FASTER = {2: 1.8, 3: 2.6}
#: Of the two training loops.
SPEED_ROUNDS, SPEED_STEPS, SPEED_IMAGES = 3, 30, 30


@dataclass(frozen=True)
class Probe:
    """The labelled images that features are judged by: the fitted and the tested ones, each packed."""

    fitted: Path
    tested: Path


@dataclass(frozen=True)
class Task:
    """All rows of one draw of one setting."""

    setting: Setting
    seed: int
    quick: bool
    unlabelled: Path
    probe: Probe
    teacher: TeacherSpec
    work: Path
    device: str
    threads: int


def parameters(row: str, setting: Setting, quick: bool) -> Params:
    changed = ROWS[row]
    budget = {"steps": 3, "batch_size": 8} if quick else {"steps": setting.updates}
    shared: dict[str, dict[str, Any]] = {
        "blocks": {"rule": RULE, "r": setting.r, "images": 4 if quick else 64},
        "distillation": {**SHARED, **budget},
    }
    return METHOD.resolve(
        "balanced", {name: {**own, **changed.get(name, {})} for name, own in shared.items()}
    )


def measure(task: Task) -> list[dict[str, Any]]:
    """All rows of one draw, one after the other."""
    use_threads(task.threads)
    use_bfloat16_on_cpu()
    found = []
    for name in task.setting.rows:
        run = local.run(
            METHOD,
            {"unlabelled": task.unlabelled},
            task.teacher,
            SHORTENED_VIT,
            task.work / "runs",
            params=parameters(name, task.setting, task.quick),
            seed=task.seed,
            device=task.device,
            wanted=["backbone"],
        )
        row: dict[str, Any] = {"setting": str(task.setting), "row": name, "draw": task.seed}
        row["accuracy"] = student_accuracy(run, task.probe, task.work, task.device)
        print(row, flush=True)
        found.append(row)
    return found


def student_accuracy(run: local.LocalRun, probe: Probe, work: Path, device: str) -> float:
    """The student's test accuracy, measured once for each student."""
    folder = run.folder("backbone")
    kept = work / "probed" / probe.tested.name / f"{folder.name}.json"
    if not kept.is_file():
        student = shortened_vit.load_backbone(folder).as_teacher(resolve_device(device))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(probe_accuracy(student, probe)))
    accuracy: float = json.loads(kept.read_text())
    return accuracy


def probe_accuracy(network: Teacher, probe: Probe) -> float:
    """The test accuracy of a linear layer on the features, as in the paper: they are standardised, nothing else."""
    fitted, tested = (read(path, network.input_size) for path in (probe.fitted, probe.tested))
    centre, weight, bias = linear_probe.fit(
        features(network, fitted.pixels), fitted.labels, len(fitted.classes), PENALTY
    )
    answers = ((features(network, tested.pixels) - centre) @ weight + bias).argmax(1)
    return float((answers == tested.labels).double().mean())


@functools.cache
def read(split: Path, size: int) -> fewshot.Split:
    return fewshot.load(split, size)


def features(network: Teacher, pixels: Pixels) -> Features:
    return torch.cat([network.embed(part.float() / 255).cpu() for part in torch.split(pixels, AT_ONCE)])


def draw(files: Files, count: int, seed: int, folder: Path) -> Path:
    """`count` training images of all classes, packed without their labels."""
    chosen = torch.randperm(len(files.train), generator=generator(seed, "unlabelled"))[:count].tolist()
    return fewshot.pack(folder, files.classes, [files.train[i] for i in chosen], [None] * count)


def draw_probe(files: Files, fitted: int, tested: int, folder: Path) -> Probe:
    """The same number of images of every class, the same ones for every row and draw."""

    def packed(name: str, paths: Sequence[Path], labels: torch.Tensor, count: int) -> Path:
        chosen = fewshot.draw_support(labels, count // len(files.classes), 0)
        return fewshot.pack(
            folder / name, files.classes, [paths[int(i)] for i in chosen], labels[chosen].tolist()
        )

    return Probe(
        packed(f"fitted{fitted}", files.train, files.train_labels, fitted),
        packed(f"tested{tested}", files.test, files.test_labels, tested),
    )


def summary(rows: Sequence[dict[str, Any]], tested: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each row's mean over the draws with its 95 % interval, and how far WeCoLoRA is ahead, draw by draw."""
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
            means.append({**mean, "accuracy": statistics.fmean(values.values())})
        if setting not in (str(MAIN), str(LONGER)):
            continue
        for name, points in AHEAD.items():
            ahead = [groups[PAPER][seed] - value for seed, value in groups.get(name, {}).items()]
            if len(ahead) > 1:
                title = f"{PAPER} minus {name}, {setting}"
                bounds = interval(ahead, tested)
                checks.append(record.check(title, statistics.fmean(ahead), bounds, at_least=points))
    return means, checks


def time_graphs(teacher: Teacher, runs: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Teacher and students in ONNX Runtime, one image and one thread, turn by turn.

    Each with a head for ten classes. Training changes nothing here, so that the students are copies.
    """
    networks = {"teacher": teacher.network}
    depth = len(vit_families.blocks_of(teacher.network))
    for r in FASTER:
        networks[f"r = {r}"] = shortened_vit.shorten(teacher.network, block_selection.last_of_group(depth, r))
    sessions = {name: depth_latency.session(teacher, network) for name, network in networks.items()}
    random = torch.randint(0, 256, (teacher.input_size, teacher.input_size, 3), generator=generator(0))
    seconds = latency.interleaved(sessions, random.to(torch.uint8).numpy(), runs)
    rows, checks = [], []
    for name, taken in seconds.items():
        rows.append({"row": f"latency, {name}", **asdict(latency.summary(taken))})
    for r, times in FASTER.items():
        found = latency.speedup(seconds["teacher"], seconds[f"r = {r}"])
        title = f"times faster than the teacher, r = {r}"
        checks.append(record.check(title, found.value, (found.low, found.high), at_least=times))
    return rows, checks


def time_training(teacher: Teacher, steps: int, rounds: int, pixels: Pixels) -> list[dict[str, Any]]:
    """Images a second of both loops, turn by turn: the same images, views and updates."""
    depth = len(vit_families.blocks_of(teacher.network))
    shortening = Shortening(block_selection.last_of_group(depth, MAIN.r), depth, "last_of_group")
    params = TokenDistillationParams(start="copied", steps=steps, lr=LEARNING_RATE)
    speeds: dict[str, list[float]] = {"kept teacher tokens": [], "plain loop": []}
    for _ in range(rounds):
        for name, found in speeds.items():
            started = time.perf_counter()
            if name == "plain loop":
                plain_loop(teacher, shortening, pixels, params)
            else:
                token_distillation.train(
                    teacher, shortening, pixels, params, 0, lambda *_, **__: None, NoCheckpoints()
                )
            found.append(steps * params.batch_size / (time.perf_counter() - started))
    ratios = [kept / plain for kept, plain in zip(*speeds.values(), strict=True)]
    rows: list[dict[str, Any]] = [
        {"row": f"training, {name}", "images_per_s": statistics.fmean(found)}
        for name, found in speeds.items()
    ]
    low, high = interval(ratios, 1) if len(ratios) > 1 else (min(ratios), max(ratios))
    faster = {"times_faster": statistics.fmean(ratios), "low": low, "high": high}
    return [*rows, {"row": "training, kept tokens beside plain loop", **faster}]


def plain_loop(
    teacher: Teacher, shortening: Shortening, pixels: Pixels, params: TokenDistillationParams
) -> None:
    """The same training as it would be written first: the teacher looks at every batch."""
    student = copy.deepcopy(shortened_vit.shorten(teacher.network, shortening.kept)).eval()
    low_rank.attach(
        student, "enhanced_lora", token_distillation.rank_of(params, teacher), generator(0, "updates")
    )
    learning = [value for value in student.parameters() if value.requires_grad]
    adamw = torch.optim.AdamW(learning, weight_decay=params.weight_decay, betas=(0.9, 0.95))
    random = torch.Generator().manual_seed(0)
    for step in range(params.steps):
        chosen = torch.randint(len(pixels), (params.batch_size,), generator=random)
        views = augment.view_boxes(chosen, torch.randint(params.views, chosen.shape, generator=random), 0.2)
        seen = augment.look(pixels[chosen].to(teacher_device(teacher)).float() / 255, views)
        ready = images.normalise(seen, teacher.mean, teacher.std)
        with torch.no_grad(), TokenTap(teacher.network, [shortening.depth - 1]) as tap:
            (wanted,) = tap(ready)
        with TokenTap(student, [len(shortening.kept) - 1]) as tap:
            (tokens,) = tap(ready)
        loss = (tokens - wanted).abs().mean()
        for group in adamw.param_groups:
            group["lr"] = optimiser.one_cycle(step, params.steps, LEARNING_RATE)
        adamw.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adamw.step()


def teacher_device(teacher: Teacher) -> torch.device:
    return next(teacher.network.parameters()).device


def spec_of(folder: Path | None) -> TeacherSpec:
    """The embedded ViT, or another of timm's for images of 32 pixels in a folder."""
    if folder is None:
        return TEACHERS[TEACHER]
    changed = {"name": "given", "kind": "timm", "source": str(folder.resolve()), "revision": None}
    return TeacherSpec(**{**TEACHERS[TEACHER].model_dump(), **changed})


def main() -> None:
    parser = command.parser(__doc__, NAME)
    command.add_data(parser)
    command.add_draws(parser)
    parser.add_argument(
        "--teacher", type=Path, help="folder of a timm ViT for 32 pixels; the embedded one if not given"
    )
    parser.add_argument("--first-draw", type=int, default=0, help="seed of the first draw, the next follow")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of the settings to run")
    parser.add_argument("--rows", type=int, default=len(ROWS), help="how many of the rows to run, 3 or more")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if not command.has_data(args):
        return
    spec = spec_of(args.teacher)
    state = teachers.availability(spec)
    if not state.available:
        print(f"skipped: {state.reason} Name a checkpoint's folder with --teacher.")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    use_threads(args.threads)
    files = unpacked(args.data, args.work)
    seeds = [args.first_draw + number for number in range(1 if args.quick else args.draws)]
    fitted, tested = (200, 200) if args.quick else (PROBED, len(files.test))
    folder = args.work / "splits"
    probe = draw_probe(files, fitted, tested, folder)
    tasks = []
    chosen = SETTINGS[: 1 if args.quick else args.settings]
    shown = min(args.rows, QUICK_ROWS) if args.quick else args.rows
    for setting in (replace(each, rows=each.rows[:shown]) for each in chosen):
        count = 20 if args.quick else setting.unlabelled
        for seed in seeds:
            tasks.append(
                Task(
                    setting,
                    seed,
                    args.quick,
                    draw(files, count, seed, folder / f"unlabelled{count}-{seed}"),
                    probe,
                    spec,
                    args.work,
                    args.device,
                    args.threads,
                )
            )
    students = [found for some in command.at_once(measure, tasks, args.processes) for found in some]
    means, ahead = summary(students, tested)
    on_device = teachers.load(spec, str(resolve_device(args.device)))
    low, high = interval([accuracy := probe_accuracy(on_device, probe)], tested)
    rows: list[dict[str, Any]] = [{"row": "teacher", "accuracy": accuracy, "low": low, "high": high}]
    rows.append({"row": "students train in bfloat16", "value": cpu_has_bfloat16()})
    teacher = teachers.load(spec, "cpu")
    timed, checks = time_graphs(teacher, 5 if args.quick else 300)
    few = read(tasks[0].unlabelled, teacher.input_size).pixels[:SPEED_IMAGES]
    timed += time_training(teacher, 2 if args.quick else SPEED_STEPS, 1 if args.quick else SPEED_ROUNDS, few)
    record.write(
        NAME, rows=[*rows, *students, *means, *timed], checks=[*ahead, *checks], seeds=seeds, quick=args.quick
    )


if __name__ == "__main__":
    main()
