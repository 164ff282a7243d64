"""CHOOSE: which synthetic images to ask the teacher about, where more were made than may be asked about.

A student of the answers so far is asked first; the images of which it is least sure, by the entropy of its
probabilities, are chosen: uncertainty sampling (Lewis & Gale, "A sequential algorithm for training text classifiers",
SIGIR 1994; entropy: Settles, "Active learning literature survey", 2009, equation 3). So that they are not all of one
kind, each class that the student names gets an equal share as far as it has images.
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor

from models import students
from models.arrays import Labels, Probabilities
from models.generators import shards
from models.methods.fsbbt import StudentParams, SynthesisParams
from models.pipeline import StageContext
from models.runtime import resolve_device
from models.teachers import black_box_questions
from models.training import cross_validation, distillation

#: Optimiser steps of the student that is asked.
STEPS = 500
_BATCH = 1024


def run(context: StageContext, params: SynthesisParams) -> None:
    """Choose `params.images` of the synthetic images; writes `chosen.safetensors` "index" [m], ascending."""
    name = students.read_name(context.folder("student"))
    size = students.spec_of(name).input_size
    device = resolve_device(context.device)
    introduction = black_box_questions.read(context.folder("black_box"))
    labels = black_box_questions.real_labels(context)
    kept = introduction.kept(len(labels))
    answers = black_box_questions.read_real(context.inputs["real_answers"])[kept]
    soft = black_box_questions.soft_labels(introduction, answers, torch.arange(len(kept)))
    pixels = black_box_questions.real_pixels(context, size)[kept]
    data = distillation.training_set(pixels, labels[kept], soft, device)
    network = distillation.new_student(name, len(introduction.classes), size, context.seed, device)
    quick = StudentParams(steps=STEPS)
    trained, _ = distillation.train(network, data, quick, context.seed, context.report, context.checkpoints)
    folders = context.inputs["synthetic"]
    rows = []
    for index in torch.split(torch.arange(shards.count(folders)), _BATCH):
        seen = distillation.squeezed(shards.pixels_at(folders, index), size)
        rows.append(cross_validation.predict(trained, seen))
        context.report(STEPS, STEPS)
    index = least_sure(torch.cat(rows), params.images)
    save_file({"index": index}, context.output / "chosen.safetensors")


def least_sure(probabilities: Probabilities, count: int) -> Tensor:
    """Positions int64 [count], ascending, of the most uncertain of `probabilities` [N, C], spread over classes.

    Each class takes its `count // C` of highest entropy, or all it has; the highest of the others fill up.
    """
    entropy = -torch.special.xlogy(probabilities, probabilities).sum(1)
    order = entropy.argsort(descending=True, stable=True)
    rank = _rank_within(probabilities.argmax(1)[order])
    within_quota = rank < count // probabilities.shape[1]
    return torch.cat([order[within_quota], order[~within_quota]])[:count].sort().values


def _rank_within(classes: Labels) -> Tensor:
    """How many of the same class stand before each of `classes` [N]."""
    rank = torch.empty_like(classes)
    for label in torch.unique(classes):
        members = classes == label
        rank[members] = torch.arange(int(members.sum()))
    return rank
