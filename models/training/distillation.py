"""DISTILL: train a student on the teacher's labels of support, unlabelled and synthetic images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from models import students
from models.arrays import Labels, Logits, Pixels, Views
from models.data import augment, fewshot, images
from models.errors import TrainingError
from models.generators import shards
from models.pipeline import Checkpoints, Report, StageContext
from models.runtime import generator, resolve_device, seed_weights
from models.stages import DistillationParams
from models.teachers import labelling
from models.training import losses, selection
from models.training.checkpoint import History
from models.training.loop import Schedule, fit

_RESIZED_AT_ONCE = 1024


@dataclass(frozen=True)
class TrainingSet:
    """What a student learns from, on its device.

    `pixels` uint8 [N, 3, S, S] and `labels` [N] (-1: none), support images first. `views` [n, 5] and the
    teacher's `logits` [n, C] stand image by image: those of image i are the rows from `first[i]` on,
    `counts[i]` of them.
    """

    pixels: Pixels
    labels: Labels
    logits: Logits
    views: Views
    first: Tensor
    counts: Tensor

    @property
    def support(self) -> int:
        return int((self.labels >= 0).sum())

    def pick(
        self, batch_size: int, support_share: float, views: int, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Image indices [B] and rows [B] of one of their first `views` views.

        A share of the batch comes from the support, where there is one, the rest from all images.
        """
        count = round(batch_size * support_share) if 0 < self.support < len(self.labels) else 0
        labelled = torch.randint(max(1, self.support), (count,), generator=random)
        rest = torch.randint(len(self.labels), (batch_size - count,), generator=random)
        chosen = torch.cat([labelled, rest])
        numbers = torch.rand(batch_size, generator=random, dtype=torch.float64)
        return chosen, self.first[chosen] + (numbers * self.counts[chosen].clamp(max=views)).long()


def training_set(
    pixels: Pixels, labels: Labels, soft: labelling.SoftLabels, device: torch.device
) -> TrainingSet:
    """Bring images and the teacher's labels of their views together. Every image needs at least one view."""
    order = soft.image.argsort(stable=True)
    counts = torch.bincount(soft.image, minlength=len(labels))
    if len(counts) != len(labels) or int(counts.min()) == 0:
        raise TrainingError("the teacher's labels and the images do not belong together")
    return TrainingSet(
        pixels.to(device),
        labels,
        soft.logits[order].to(device),
        soft.view[order],
        counts.cumsum(0) - counts,
        counts,
    )


def train(
    network: nn.Module,
    data: TrainingSet,
    params: DistillationParams,
    seed: int,
    report: Report,
    checkpoints: Checkpoints,
) -> tuple[nn.Module, History]:
    """Train `network` (on its device already); returns the averaged network and the training curve."""
    transform = augment.Augmentation(
        shift=params.shift, crop=params.crop, flip=params.flip, colour=params.colour, erase=params.erase
    )
    classes = data.logits.shape[1]
    device = data.pixels.device

    def loss_at(step: int) -> Tensor:
        random = generator(seed, "batch", step)
        chosen, rows = data.pick(params.batch_size, params.support_share, params.views, random)
        seen = transform(data.pixels[chosen.to(device)].float() / 255, data.views[rows], random)
        teacher = losses.softened(data.logits[rows.to(device)], params.temperature)
        truth = one_hot(data.labels[chosen], classes).to(device)
        seen, (teacher, truth) = _mix(seen, (teacher, truth), params, random)
        ready = images.normalise(seen).contiguous(memory_format=torch.channels_last)
        logits: Tensor = network(ready)
        divergence = losses.distillation(logits.float(), teacher, params.temperature)
        return params.kd_weight * divergence + params.support_weight * losses.cross_entropy(
            logits.float(), truth
        )

    schedule = Schedule(params.steps, params.lr, params.weight_decay, params.ema_decay)
    return fit(network, loss_at, schedule, report, checkpoints)


def new_student(name: str, classes: int, size: int, seed: int, device: torch.device) -> nn.Module:
    """A student with weights drawn from `seed`, in the memory layout that convolutions like."""
    seed_weights(seed, "weights", name)
    network = students.build(name, classes, size)
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def one_hot(labels: Labels, classes: int) -> Tensor:
    """float [N, C]; a row of zeros where the label is -1."""
    return functional.one_hot(labels.clamp(min=0), classes).float() * (labels >= 0).float()[:, None]


def read_images(context: StageContext, size: int) -> tuple[Pixels, Labels]:
    """Support images, then unlabelled ones: pixels [N, 3, size, size], labels [N] with -1."""
    names = [name for name in ("support", "unlabelled") if name in context.inputs]
    splits = [fewshot.load(context.folder(name), size) for name in names]
    return torch.cat([split.pixels for split in splits]), torch.cat([split.labels for split in splits])


def read_training_set(context: StageContext, size: int, device: torch.device) -> TrainingSet:
    """Support, unlabelled and selected synthetic images with the teacher's labels; those without any are left out."""
    pixels, labels = read_images(context, size)
    soft = labelling.load(context.folder("soft_labels"))
    if "selection" in context.inputs:
        rows = torch.cat([torch.ones(len(labels), dtype=torch.bool), selection.kept(context)])[soft.image]
        soft = labelling.SoftLabels(soft.logits[rows], soft.image[rows], soft.view[rows])
    learnt, image = torch.unique(soft.image, return_inverse=True)
    real = learnt[learnt < len(labels)]
    if len(real) < len(learnt):
        synthetic = read_synthetic(context, learnt[len(real) :] - len(labels), size)
        pixels = torch.cat([pixels[real], synthetic])
        labels = torch.cat([labels[real], torch.full((len(synthetic),), -1)])
    elif len(real) < len(labels):
        pixels, labels = pixels[real], labels[real]
    return training_set(pixels, labels, replace(soft, image=image), device)


def read_synthetic(context: StageContext, index: Tensor, size: int) -> Pixels:
    """The synthetic images [m, 3, size, size] at ascending positions `index` [m]."""
    parts = [squeezed(part, size) for part in shards.parts_at(context.inputs["synthetic"], index)]
    return torch.cat([torch.empty(0, 3, size, size, dtype=torch.uint8), *parts])


def distill(context: StageContext, params: DistillationParams) -> None:
    """Train the student and write `student.json`, `weights.safetensors`, `history.json`."""
    name = students.read_name(context.folder("student"))
    size = params.input_size or students.spec_of(name).input_size
    device = resolve_device(context.device)
    classes = labelling.read_classes(context.folder("soft_labels"))
    data = read_training_set(context, size, device)
    network = new_student(name, len(classes), size, context.seed, device)
    trained, history = train(network, data, params, context.seed, context.report, context.checkpoints)
    save_student(context.output, trained, name, size, classes, {**params.model_dump(), "seed": context.seed})
    (context.output / "history.json").write_text(json.dumps(history))


def save_student(
    folder: Path,
    network: nn.Module,
    name: str,
    size: int,
    classes: tuple[str, ...],
    trained_with: Mapping[str, object],
) -> None:
    """Write a student so that `students.load` reads it. `trained_with`: for the manifest of its bundle."""
    weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    document = {"name": name, "input_size": size, "classes": classes, "mean": images.MEAN, "std": images.STD}
    document["trained_with"] = dict(trained_with)
    (folder / "student.json").write_text(json.dumps(document, ensure_ascii=False, indent=1))


def squeezed(pixels: Pixels, size: int) -> Pixels:
    """uint8 [N, 3, size, size], a part at a time: as floats all images would take four times the memory."""
    if pixels.shape[-1] == size:
        return pixels
    return torch.cat(
        [images.to_pixels(images.resize(part, size)) for part in torch.split(pixels, _RESIZED_AT_ONCE)]
    )


def _mix(
    seen: Tensor, targets: tuple[Tensor, Tensor], params: DistillationParams, random: torch.Generator
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """MixUp or CutMix on a share of the batches; one of the two at random when both are on."""
    mixed, choice = torch.rand(2, generator=random).tolist()
    if mixed >= params.mix_share or not (params.mixup or params.cutmix):
        return seen, targets
    both = params.mixup and params.cutmix
    if params.mixup and (not both or choice < 0.5):
        return augment.mixup(seen, targets, params.mixup, random)
    return augment.cutmix(seen, targets, params.cutmix, random)
