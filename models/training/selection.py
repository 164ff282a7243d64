"""SELECT: which synthetic images the student learns from, by what the teacher says of them."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.arrays import Labels
from models.generators import shards
from models.methods.tint import SelectionParams, Verdict
from models.pipeline import StageContext
from models.teachers import labelling

_FILE = "selection.safetensors"


def run(context: StageContext, params: SelectionParams) -> None:
    """Judge every synthetic image. Writes "verdict" int64 [n] and "probability" float32 [n] of its intended class."""
    soft = labelling.load(context.folder("soft_labels"))
    intended = shards.column(context.inputs["synthetic"], "label")
    real = context.shape.support + context.shape.unlabelled
    rows = labelling.own_view(soft.image, soft.view, torch.arange(real, real + len(intended)))
    probability = soft.logits[rows].softmax(-1).gather(1, intended[:, None])[:, 0]
    verdict = judge(probability, intended, params)
    save_file({"verdict": verdict, "probability": probability}, context.output / _FILE)
    context.report(1, 1, kept=float((verdict == Verdict.KEPT).float().mean()))


def judge(probability: Tensor, intended: Labels, params: SelectionParams) -> Tensor:
    """The `Verdict` int64 [n] on images with the teacher's probability [n] of their intended class [n]."""
    verdict = torch.full_like(intended, Verdict.UNSURE)
    sure = probability >= params.least_probability
    counts = torch.bincount(intended[sure])
    fewest = int(counts[counts > 0].min()) if bool(sure.any()) else 0
    most = int(fewest * params.most_to_least)
    for label in torch.unique(intended[sure]):
        members = (sure & (intended == label)).nonzero()[:, 0]
        surest_first = members[probability[members].argsort(descending=True, stable=True)]
        verdict[surest_first[:most]] = Verdict.KEPT
        verdict[surest_first[most:]] = Verdict.SURPLUS
    return verdict


def kept(context: StageContext) -> Tensor:
    """bool [n]: the synthetic images that are learnt from; all where nothing selects, empty where there are none."""
    if "selection" in context.inputs:
        verdict = load_file(context.folder("selection") / _FILE)["verdict"]
        return torch.eq(verdict, Verdict.KEPT)
    return torch.ones(shards.count(context.inputs.get("synthetic", ())), dtype=torch.bool)
