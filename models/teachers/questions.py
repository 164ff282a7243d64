"""Show images to the teacher: ASK (support, unlabelled and synthetic, its features), EXAMINE (test, its answers)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import teachers
from models.arrays import Features, Views
from models.data import archive, fewshot, images
from models.data.augment import view_boxes
from models.errors import TeacherError
from models.generators import shards
from models.pipeline import StageContext
from models.runtime import resolve_device
from models.stages import CHUNK, TeacherParams
from models.teachers import few_shot_head
from models.teachers.protocol import Teacher

_BATCH = 64


def ask(context: StageContext, params: TeacherParams) -> None:
    """Features of this shard's images: support, then unlabelled, then synthetic; each image seen in its views.

    Writes `answers.safetensors`: "features" [n, D], "image" int64 [n] (position in that order), "view" [n, 5].
    """
    spec = teachers.read_spec(context.folder("teacher"))
    teacher = teachers.load(spec, str(resolve_device(context.device)), params.input_size)
    positions = range(context.shard * CHUNK, (context.shard + 1) * CHUNK)
    questions = _questions(context, params, positions)
    done = _resume(context)
    answered = 0 if done is None else len(done["image"])
    total = _count(context, params, positions)
    parts = [] if done is None else [done]
    for batch in _batches(islice(questions, answered, None)):
        seen, at, view = batch
        parts.append({"features": _embed(teacher, seen), "image": at, "view": view})
        answered += len(at)
        context.report(answered, total)
        if context.checkpoints.due():
            context.checkpoints.save(answered, partial(_write, _joined(parts)))
    _write(_joined(parts), context.output)
    (context.output / "answers.json").write_text(json.dumps({"input_size": teacher.input_size}))


def examine(context: StageContext) -> None:
    """The teacher's probabilities [n, C] for this shard's test images, each seen once as it is."""
    spec = teachers.read_spec(context.folder("teacher"))
    head = few_shot_head.load(context.folder("soft_labels"))
    teacher = teachers.load(spec, str(resolve_device(context.device)), head.input_size)
    folder = context.folder("test")
    labels = fewshot.read_labels(folder)[context.shard * CHUNK : (context.shard + 1) * CHUNK]
    chunk = islice(archive.contents(folder / archive.FILE_NAME), context.shard * CHUNK, None)
    decoded = (images.decode(content, image.name) for image, content in islice(chunk, len(labels)))
    rows: list[Tensor] = []
    while batch := list(islice(decoded, _BATCH)):
        features = _embed(teacher, [_squeeze(image, teacher.input_size) for image in batch])
        rows.append(head.logits(features).softmax(-1))
        context.report(sum(map(len, rows)), len(labels))
    document = {"probabilities": torch.cat(rows), "labels": labels}
    save_file(document, context.output / "probabilities.safetensors")


def features_of_support(
    context: StageContext, teacher: Teacher, params: TeacherParams
) -> tuple[Features, Tensor]:
    """Features [n, D] of all views of the labelled images, and the image [n] that each row shows."""
    positions = range(context.shape.support)
    features, image = [], []
    for seen, at, _ in _batches(_questions(context, params, positions)):
        features.append(_embed(teacher, seen))
        image.append(at)
        context.report(sum(map(len, image)), _count(context, params, positions))
    return torch.cat(features), torch.cat(image)


def read_answers(folders: tuple[Path, ...], images: int) -> tuple[Features, Tensor, Views, int]:
    """All shards' features [n, D], image positions [n], views [n, 5], and the size the teacher saw."""
    shards = [load_file(folder / "answers.safetensors") for folder in folders]
    answers = _joined(shards)
    answered = torch.unique(answers["image"])
    if not torch.equal(answered, torch.arange(images)):
        raise TeacherError(f"the teacher answered {len(answered)} of {images} images")
    size = json.loads((folders[0] / "answers.json").read_text())["input_size"]
    return answers["features"], answers["image"], answers["view"], int(size)


def _questions(
    context: StageContext, params: TeacherParams, positions: range
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(position, view [5], image [3, H, W] cut to the view) for the images at `positions`."""
    for position, pixels in _shown(context, positions):
        views = params.views if position < context.shape.support else params.unlabelled_views
        for box in view_boxes(torch.full((views,), position), torch.arange(views)):
            cut, exact = _cut(pixels, box)
            yield position, exact, cut


def _shown(context: StageContext, positions: range) -> Iterator[tuple[int, Tensor]]:
    """(position, image [3, H, W]) for the images at `positions`: support, unlabelled, synthetic."""
    offset = 0
    for name, count in (("support", context.shape.support), ("unlabelled", context.shape.unlabelled)):
        if name not in context.inputs:
            continue
        wanted = range(max(0, positions.start - offset), max(0, min(count, positions.stop - offset)))
        contents = archive.contents(context.folder(name) / archive.FILE_NAME)
        for index, (image, content) in enumerate(islice(contents, wanted.stop)):
            if index >= wanted.start:
                yield offset + index, images.decode(content, image.name)
        offset += count
    if "synthetic" in context.inputs:
        wanted = range(max(0, positions.start - offset), max(0, positions.stop - offset))
        made = chain.from_iterable(shards.pieces(context.inputs["synthetic"], wanted, _BATCH))
        yield from enumerate(made, offset + wanted.start)


def _cut(pixels: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
    """The part of an image [3, H, W] that a view shows, in whole pixels, and the view so rounded."""
    height, width = pixels.shape[-2:]
    left, top = round(float(view[0]) * width), round(float(view[1]) * height)
    right = max(left + 1, round(float(view[0] + view[2]) * width))
    bottom = max(top + 1, round(float(view[1] + view[3]) * height))
    part = pixels[:, top:bottom, left:right]
    mirrored = bool(view[4])
    sides = [left / width, top / height, (right - left) / width, (bottom - top) / height, float(mirrored)]
    return part.flip(-1) if mirrored else part, torch.tensor(sides)


def _batches(
    questions: Iterator[tuple[int, Tensor, Tensor]],
) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    while batch := list(islice(questions, _BATCH)):
        yield (
            [cut for _, _, cut in batch],
            torch.tensor([at for at, _, _ in batch]),
            torch.stack([v for _, v, _ in batch]),
        )


def _embed(teacher: Teacher, cuts: list[Tensor]) -> Features:
    """Features [N, D] of images of any size, on the CPU."""
    return teacher.embed(torch.stack([_squeeze(cut, teacher.input_size) for cut in cuts])).cpu()


def _squeeze(image: Tensor, size: int) -> Tensor:
    return images.resize(image[None], size)[0]


def count_all(context: StageContext) -> int:
    """How many images there are to show: support, unlabelled and synthetic."""
    made = shards.count(context.inputs["synthetic"]) if "synthetic" in context.inputs else 0
    return context.shape.support + context.shape.unlabelled + made


def _count(context: StageContext, params: TeacherParams, positions: range) -> int:
    support = len(range(positions.start, min(positions.stop, context.shape.support)))
    images = len(range(positions.start, min(positions.stop, count_all(context))))
    return support * params.views + (images - support) * params.unlabelled_views


def _resume(context: StageContext) -> dict[str, Tensor] | None:
    folder = context.checkpoints.latest()
    return load_file(folder / "answers.safetensors") if folder else None


def _write(answers: dict[str, Tensor], folder: Path) -> None:
    save_file(answers, folder / "answers.safetensors")


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
