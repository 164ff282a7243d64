"""REFIT_HEAD and CROSS_VALIDATE of a shortened vision transformer: its head, fitted to its own features."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.arrays import Features, Labels, Pixels
from models.data import augment, fewshot
from models.methods.wecolora import StudentHeadParams, TokenDistillationParams
from models.pipeline import StageContext
from models.runtime import resolve_device
from models.students import SHORTENED_VIT, shortened_vit
from models.students.shortened_vit import Backbone, Shortening
from models.teachers import few_shot_head, labelling, questions
from models.teachers.few_shot_head import FewShotHead, HeadedNetwork
from models.teachers.protocol import Teacher
from models.training import distillation, linear_probe, token_distillation

_AT_ONCE = 64


def refit(context: StageContext, params: StudentHeadParams) -> None:
    """Fit a head to the student's features of labelled and unlabelled images. Writes a `trained_student`."""
    backbone = shortened_vit.load_backbone(context.folder("backbone"))
    student = backbone.as_teacher(resolve_device(context.device))
    pixels, labels = distillation.read_images(context, student.input_size)
    head = few_shot_head.load(context.folder("soft_labels"))
    network = headed(student, pixels, labels, head, params).cpu()
    shortened_vit.save_weights(network, context.output)
    document = {
        "name": SHORTENED_VIT,
        "input_size": student.input_size,
        "classes": head.classes,
        "mean": student.mean,
        "std": student.std,
        "backbone": backbone.document(),
        "head": {"scale": network.scale, "unit": network.unit},
        "trained_with": {"student_head": params.model_dump()},
    }
    (context.output / "student.json").write_text(json.dumps(document, ensure_ascii=False, indent=1))
    shutil.copyfile(context.folder("backbone") / "history.json", context.output / "history.json")
    context.report(1, 1)


def without_head(context: StageContext) -> None:
    """The student as it is: it gives features. Writes `backbone.json`, `weights.safetensors`, a `student.json` without
    classes, `history.json`."""
    backbone = shortened_vit.load_backbone(context.folder("backbone"))
    backbone.save(context.output)
    document = {
        "name": SHORTENED_VIT,
        "input_size": backbone.input_size,
        "classes": [],
        "mean": backbone.mean,
        "std": backbone.std,
        "backbone": backbone.document(),
        "trained_with": {},
    }
    (context.output / "student.json").write_text(json.dumps(document, indent=1))
    shutil.copyfile(context.folder("backbone") / "history.json", context.output / "history.json")
    context.report(1, 1)


def headed(
    student: Teacher, pixels: Pixels, labels: Labels, teacher_head: FewShotHead, params: StudentHeadParams
) -> HeadedNetwork:
    """The student with a head fitted to images [N, 3, S, S] of its size with labels [N], -1: none."""
    unlabelled = int((labels < 0).sum()) if params.kind == "as_teacher" else 0
    support = int((labels >= 0).sum())
    features, image = features_of(student, pixels[: support + unlabelled], support, params.views)
    truth = labels[image]
    if params.kind == "linear_probe":
        fitted = linear_probe.fit(features, truth, len(teacher_head.classes), params.penalty)
        return HeadedNetwork(student.network, *fitted, scale=1.0, unit=False)
    centre = labelling.centre_of(features, image, support)
    return HeadedNetwork.of(student.network, teacher_head.refit(features, truth, image, centre))


def features_of(student: Teacher, pixels: Pixels, support: int, views: int) -> tuple[Features, Tensor]:
    """Features [n, D] of `views` views of the first `support` images and of one of each other, and the image [n]."""
    counts = torch.ones(len(pixels), dtype=torch.long)
    counts[:support] = views
    image = torch.repeat_interleave(torch.arange(len(pixels)), counts)
    number = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
    rows = []
    for chosen, numbers in zip(torch.split(image, _AT_ONCE), torch.split(number, _AT_ONCE), strict=True):
        seen = augment.look(pixels[chosen].float() / 255, augment.view_boxes(chosen, numbers))
        rows.append(student.embed(seen).cpu())
    return torch.cat(rows), image


def cross_validate(context: StageContext, params: TokenDistillationParams) -> None:
    """One fold: hold a part of the labelled images back, train and fit without them, then answer for them.

    The head is of the kind that the shipped student has. Writes as `models.training.cross_validation` does.
    """
    teacher = token_distillation.load_teacher(context, params)
    document = json.loads((context.folder("trained_student") / "student.json").read_text())
    head_params = StudentHeadParams.model_validate(document["trained_with"]["student_head"])
    pixels, labels = distillation.read_images(context, teacher.input_size)
    support = int((labels >= 0).sum())
    held = fewshot.stratified_folds(labels[:support], context.shards, context.seed) == context.shard
    index = held.nonzero()[:, 0]
    kept = torch.cat([~held, torch.ones(len(labels) - support, dtype=torch.bool)])

    answers, image, view, _ = questions.read_answers(
        context.inputs["teacher_answers"], questions.count_all(context)
    )
    rows = kept[image]
    position = (kept.cumsum(0) - 1)[image[rows]]  # of each kept image among the kept
    centre = labelling.centre_of(answers[rows], position, support - len(index))
    head = few_shot_head.load(context.folder("soft_labels")).refit(
        answers[rows], labels[kept][position], position, centre
    )
    shortening = Shortening.load(context.folder("shortened"))
    learnt = torch.cat([pixels[kept], token_distillation.read_synthetic(context, teacher.input_size)])
    network, _ = token_distillation.train(
        teacher, shortening, learnt, params, context.seed, context.report, context.checkpoints
    )
    student = Backbone.of(teacher, network, shortening).as_teacher(resolve_device(context.device))
    trained = headed(student, pixels[kept], labels[kept], head, head_params)
    features, _ = features_of(student, pixels[index], len(index), 1)
    asked = labelling.own_view(image, view, index)
    with torch.inference_mode():
        predictions = {
            "student": trained.logits(features).softmax(-1),
            "teacher": head.logits(answers[asked]).softmax(-1),
            "labels": labels[index],
            "index": index,
        }
    save_file(predictions, context.output / "predictions.safetensors")
