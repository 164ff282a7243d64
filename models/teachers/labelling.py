"""LABEL: fit the teacher's few-shot head and write its logits for every view of every image.

Synthetic images are centred apart, because a generator's images lie elsewhere in feature space than photographs, all
classes alike; and they were made for a class, which is evidence beside what the teacher sees.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.arrays import Features, Labels, Logits, Views
from models.data import archive, fewshot
from models.generators import shards
from models.pipeline import StageContext
from models.stages import HeadParams
from models.teachers import few_shot_head, questions
from models.teachers.few_shot_head import FewShotHead


@dataclass(frozen=True)
class SoftLabels:
    """The teacher's logits [n, C] for view `view` [n, 5] of image `image` [n] (support, unlabelled, synthetic)."""

    logits: Logits
    image: Tensor
    view: Views

    def save(self, folder: Path) -> None:
        tensors = {"logits": self.logits, "image": self.image, "view": self.view}
        save_file(tensors, folder / "soft_labels.safetensors")


def load(folder: Path) -> SoftLabels:
    return SoftLabels(**load_file(folder / "soft_labels.safetensors"))


def save_classes(folder: Path, classes: tuple[str, ...]) -> None:
    """Write the names of the logits' columns beside `SoftLabels`."""
    document = json.dumps({"classes": list(classes)}, ensure_ascii=False)
    (folder / "soft_labels.json").write_text(document)


def read_classes(folder: Path) -> tuple[str, ...]:
    """The names of the columns of a `soft_labels` artefact: the student's classes."""
    return tuple(json.loads((folder / "soft_labels.json").read_text())["classes"])


def label(context: StageContext, params: HeadParams) -> None:
    """Fit the head to the real images' features and apply it to all. Writes head, `SoftLabels` and classes."""
    support = context.folder("support")
    labels = fewshot.read_labels(support)
    answers = context.inputs["teacher_answers"]
    features, image, view, size = questions.read_answers(answers, questions.count_all(context))
    classes = archive.read_index(support / archive.FILE_NAME).classes
    known = torch.cat([labels, torch.full((context.shape.unlabelled,), -1)])
    real = image < len(known)
    seen, shown = features[real], image[real]
    centre = centre_of(seen, shown, len(labels))
    head = few_shot_head.fit(seen, known[shown], shown, centre, params, classes, size)
    head.save(context.output)
    logits = head.logits(features)
    if not bool(real.all()):
        intended = shards.column(context.inputs["synthetic"], "label")[image[~real] - len(known)]
        logits[~real] = made_for(head, features[~real], intended)
    SoftLabels(logits, image, view).save(context.output)
    save_classes(context.output, classes)
    context.report(1, 1)


def made_for(head: FewShotHead, features: Features, intended: Labels) -> Logits:
    """Logits [n, C] of synthetic images by their features [n, D], centred at their own mean.

    `head.intended` is added to the logit of the class that an image was made for, `intended` [n]; -1: for none.
    """
    logits = replace(head, centre=features.mean(0)).logits(features)
    classes = torch.arange(logits.shape[1])
    return logits + head.intended * (intended[:, None] == classes)


def centre_of(features: Features, image: Tensor, support: int) -> Tensor:
    """Where features are centred [D]: the mean of the unlabelled images, of the support where there are none."""
    unlabelled = image >= support
    chosen = unlabelled if bool(unlabelled.any()) else torch.ones_like(unlabelled)
    return features[chosen].mean(0)


def own_view(image: Tensor, view: Views, images: Tensor) -> Tensor:
    """Rows [k] of `image` [n] that show each of `images` [k] whole and unmirrored."""
    whole = (view == torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])).all(1)
    rows = {int(image[row]): int(row) for row in whole.nonzero()[:, 0]}
    return torch.tensor([rows[int(position)] for position in images], dtype=torch.long)
