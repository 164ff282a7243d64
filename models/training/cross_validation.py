"""CROSS_VALIDATE: how well head and student do on labelled images that neither has seen."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import students
from models.arrays import Pixels, Probabilities
from models.data import fewshot, images
from models.generators import shards
from models.pipeline import StageContext
from models.runtime import resolve_device
from models.stages import DistillationParams
from models.teachers import few_shot_head, labelling, questions
from models.training import distillation, selection

_BATCH = 256


def cross_validate(context: StageContext, params: DistillationParams) -> None:
    """One fold: hold a part of the support back, do everything else without it, then answer for it.

    The unlabelled images stay with the training part; no label of the held-back images, and without
    unlabelled images no held-back image either, reaches the head, its centre or the student. Synthetic images that
    come from a held-back image are left out; but the class tokens of the others were learnt from all images, and all
    of them took part in the selection, so that with synthetic images the estimate may be a little too high.
    Writes `predictions.safetensors`: "student", "teacher" [n, C], "labels", "index" int64 [n].
    """
    name = students.read_name(context.folder("student"))
    size = params.input_size or students.spec_of(name).input_size
    device = resolve_device(context.device)
    pixels, labels = distillation.read_images(context, size)
    classes = labelling.read_classes(context.folder("soft_labels"))
    answers = context.inputs["teacher_answers"]
    features, image, view, _ = questions.read_answers(answers, questions.count_all(context))
    support = int((labels >= 0).sum())
    held = fewshot.stratified_folds(labels[:support], context.shards, context.seed) == context.shard
    index = held.nonzero()[:, 0]

    kept_real = torch.cat([~held, torch.ones(len(labels) - support, dtype=torch.bool)])
    made = selection.kept(context)
    if len(made):
        made &= ~torch.isin(shards.column(context.inputs["synthetic"], "first"), index)
    kept = torch.cat([kept_real, made])
    kept_rows = kept[image]
    position = kept.cumsum(0) - 1  # of each kept image among the kept
    learnt, learnt_image = features[kept_rows], position[image[kept_rows]]
    learnt_labels = torch.cat([labels[kept_real], torch.full((int(made.sum()),), -1)])
    real = learnt_image < int(kept_real.sum())
    seen, shown = learnt[real], learnt_image[real]
    centre = labelling.centre_of(seen, shown, int((learnt_labels >= 0).sum()))
    head = few_shot_head.load(context.folder("soft_labels")).refit(seen, learnt_labels[shown], shown, centre)
    logits = head.logits(learnt)
    shown_pixels = pixels[kept_real]
    if bool(made.any()):
        intended = shards.column(context.inputs["synthetic"], "label")[made]
        intended = intended[learnt_image[~real] - len(shown_pixels)]
        logits[~real] = labelling.made_for(head, learnt[~real], intended)
        synthetic = distillation.read_synthetic(context, made.nonzero()[:, 0], size)
        shown_pixels = torch.cat([shown_pixels, synthetic])
    soft = labelling.SoftLabels(logits, learnt_image, view[kept_rows])
    data = distillation.training_set(shown_pixels, learnt_labels, soft, device)
    network = distillation.new_student(name, len(classes), size, context.seed, device)
    trained, _ = distillation.train(network, data, params, context.seed, context.report, context.checkpoints)
    asked = labelling.own_view(image, view, index)
    predictions = {
        "student": predict(trained, pixels[index]),
        "teacher": head.logits(features[asked]).softmax(-1),
        "labels": labels[index],
        "index": index,
    }
    save_file(predictions, context.output / "predictions.safetensors")


@torch.inference_mode()
def predict(
    network: nn.Module,
    pixels: Pixels,
    mean: tuple[float, float, float] = images.MEAN,
    std: tuple[float, float, float] = images.STD,
) -> Probabilities:
    """Probabilities float32 [N, C], on the CPU, of a trained student for images of its own size."""
    device = next(network.parameters()).device
    rows: list[Tensor] = [
        network(images.normalise(part.to(device).float() / 255, mean, std)).float().softmax(-1).cpu()
        for part in torch.split(pixels, _BATCH)
    ]
    return torch.cat(rows)
