"""Train the embedded ViT: a small vision transformer that serves as a teacher.

    python -m models.zoo.train_vit --data cifar10/train --out models/zoo/vit --work .dram/vit

`--data` is a folder of class folders; it may be given several times. First a convolutional teacher of the catalogue
looks at every image once, then the ViT learns from it and from the classes. `--test` adds to the model card how well
its features and its head do on images that it has not seen. The state lies in `--work`: a run that was stopped goes on
from there when the same command is given again. `--minutes` stops by itself, with a checkpoint and exit status 75.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models import runtime, teachers
from models.arrays import Features, Pixels
from models.data import images as image_tensors
from models.data.augment import Augmentation
from models.errors import DataError
from models.pipeline import digest
from models.stages import HeadParams
from models.teachers import TEACHERS, few_shot_head
from models.zoo import command, pictures, vit_network, vit_release, vit_targets, vit_training
from models.zoo.command import Pausing
from models.zoo.pictures import Pictures
from models.zoo.vit_network import Budget

BUDGETS = {
    # Two CPU cores for about an hour: on one, a step took 0.64 s with half of the patches and about 1.2 s with all of
    # them, and the teacher 1 s for 150 images.
    "cpu": Budget(
        width=192,
        depth=12,
        heads=3,
        teacher="efficientnet_lite2",
        steps=7_000,
        batch_size=64,
        augmentation=Augmentation(shift=0.0625),
    ),
    # One large GPU; 400 times all of CIFAR-10. Its speed has not been measured.
    "gpu": Budget(
        width=192,
        depth=12,
        heads=3,
        teacher="efficientnet_lite2",
        steps=40_000,
        batch_size=512,
        lr=2e-3,
        ema_decay=0.9995,
        augmentation=Augmentation(shift=0.125, crop=0.4, colour=0.3, erase=0.25),
        cutmix=0.5,
    ),
    # Seconds, to try the command.
    "toy": Budget(
        width=32,
        depth=3,
        heads=2,
        teacher="efficientnet_lite0",
        steps=40,
        batch_size=16,
        lr=4e-3,
        ema_decay=0.9,
        map_channels=8,
    ),
}
_LICENCE = "apache-2.0"
_BATCH = 500


def train(
    data: Sequence[Path],
    out: Path,
    work: Path,
    budget: Budget,
    *,
    test: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    deadline: float = float("inf"),
    say: Callable[[str], None] = print,
) -> None:
    """Train the ViT and write it to `out`, with the model card `README.md`.

    `work` holds checkpoints and the teacher's answers, by what they depend on: another length of the training takes
    the answers that are there. Raises `command.PausedError` at `deadline` (monotonic seconds), `DataError` where the
    images cannot be used, `TeacherError` where the budget's teacher cannot be had.
    """
    place = runtime.resolve_device(device)
    shown = pictures.read(data, vit_network.SIZE)
    unseen = _unseen(test, shown.classes) if test else None
    spec = TEACHERS[budget.teacher]
    asked = {
        "teacher": spec.model_dump(include={"kind", "source", "revision"}),
        "channels": budget.map_channels,
        "seed": seed,
        "pixels": shown.digest(),
        "classes": dict(zip(shown.classes, shown.counts.tolist(), strict=True)),
    }
    run = digest({"targets": asked, "budget": asdict(budget)})
    say(f"{len(shown.pixels):,} images in {len(shown.classes)} classes, on {place}")
    targets = vit_targets.make(
        teachers.load(spec, str(place), vit_targets.TEACHER_SIZE),
        shown,
        budget.map_channels,
        work / f"teacher-{digest(asked)[:16]}",
        seed=seed,
        deadline=deadline,
        say=say,
    )
    network, history = vit_training.train(
        budget,
        shown,
        targets,
        seed=seed,
        device=place,
        report=command.reporter("ViT", say),
        checkpoints=Pausing(work / f"vit-{run[:16]}", deadline=deadline),
    )
    runs = [
        f"{budget.steps:,} steps of {budget.batch_size} images, loss {command.recent_loss(history):.4f} at the end"
    ]
    if unseen:
        runs.append(accuracy(network, shown, unseen))
        say(runs[-1])
    parameters = sum(value.numel() for value in network.parameters())
    vit_release.write_checkpoint(out, network, budget, shown.classes)
    card = vit_release.model_card(shown, data, parameters, spec, budget, runs, _LICENCE)
    (out / "README.md").write_text(card)
    say(f"written to {out}")


def accuracy(network: Any, shown: Pictures, unseen: Pictures) -> str:
    """How often the head, and a ridge regression on the features of all `shown` images, name an unseen one's class."""
    features, unseen_features = embed(network, shown.pixels), embed(network, unseen.pixels)
    ridge = few_shot_head.fit(
        features,
        shown.labels,
        torch.arange(len(features)),
        features.mean(0),
        HeadParams(rounds=0),
        shown.classes,
        vit_network.SIZE,
    )
    head = unseen_features @ network.head.weight.cpu().T + network.head.bias.cpu()
    shares = [
        float((logits.argmax(1) == unseen.labels).float().mean())
        for logits in (head, ridge.logits(unseen_features))
    ]
    return (
        f"on {len(unseen.pixels):,} images that it has not seen: {shares[0]:.1%} right by its head, "
        f"{shares[1]:.1%} by a linear probe (ridge regression) on its features"
    )


@torch.inference_mode()
def embed(network: Any, pixels: Pixels) -> Features:
    """The class tokens float32 [N, D] of all images."""
    device = network.pos_embed.device
    rows = []
    for part in torch.split(pixels, _BATCH):
        images = image_tensors.normalise(image_tensors.resize(part.to(device), vit_network.SIZE))
        with runtime.training_autocast(device):
            rows.append(vit_network.tokens(network, images)[:, 0].float().cpu())
    return torch.cat(rows)


def _unseen(test: Path, classes: tuple[str, ...]) -> Pictures:
    """The images of --test, which must be of the same classes."""
    unseen = pictures.read([test], vit_network.SIZE)
    if unseen.classes != classes:
        differing = ", ".join(sorted(set(classes) ^ set(unseen.classes)))
        raise DataError(
            f"'{test}' and the images to learn from differ in their classes: {differing}",
            "Give a test folder with the same class folders, or leave --test out.",
        )
    return unseen


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = command.parser(__doc__, BUDGETS, "the ViT")
    parser.add_argument("--test", type=Path, help="folder of class folders to measure the result on")
    given = parser.parse_args(arguments)
    return command.run(
        given,
        BUDGETS,
        lambda budget, work, deadline: train(
            given.data,
            given.out,
            work,
            budget,
            test=given.test,
            seed=given.seed,
            device=given.device,
            deadline=deadline,
            say=command.say,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
