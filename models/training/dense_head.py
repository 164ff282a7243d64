"""FIT_HEADS and CROSS_VALIDATE of segmentation: a linear layer on the tokens of patches, fitted to a few masks.

The layer is a multinomial logistic regression whose target is the share of each class in the patch; answers are its
logits, interpolated to the pixels. Evaluating frozen vision transformers by such a layer is Oquab et al. (DINOv2),
arXiv:2304.07193, section 7.4, who train it by gradient descent on many masks. Of a few it is fitted to its optimum.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress, islice

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from models import teachers
from models.arrays import Mask, Pixels
from models.data import fewshot, images, masks
from models.data.archive import IGNORED
from models.errors import DataError
from models.evaluation import segmentation
from models.methods.wecolora import TokenDistillationParams
from models.methods.wecolora_segmentation import DenseHeadParams
from models.pipeline import StageContext
from models.runtime import autocast, generator, resolve_device
from models.students import SHORTENED_VIT, dense_vit, shortened_vit
from models.students.dense_vit import DenseHead, DenseStudent
from models.students.shortened_vit import Backbone, Shortening
from models.teachers.protocol import Teacher
from models.training import linear_probe, token_distillation

_AT_ONCE = 16


def fit_heads(context: StageContext, params: DenseHeadParams) -> None:
    """Fit the same kind of head to the student's tokens and to the teacher's. Writes what `dense_vit.load` reads."""
    backbone = shortened_vit.load_backbone(context.folder("backbone"))
    device = resolve_device(context.device)
    teacher = teachers.load(teachers.read_spec(context.folder("teacher")), str(device), backbone.input_size)
    shots = Shots.read(context, backbone.input_size)
    head = fit(backbone.as_teacher(device), shots, params, context.seed)
    context.report(1, 2)
    teacher_head = fit(teacher, shots, params, context.seed)
    context.report(2, 2)
    trained_with = {"dense_head": params.model_dump()}
    student = DenseStudent(backbone, head, teacher_head, SHORTENED_VIT, shots.classes, trained_with)
    student.save(context.output)
    shutil.copyfile(context.folder("backbone") / "history.json", context.output / "history.json")


@dataclass(frozen=True)
class Shots:
    """Images to learn from: `pixels` uint8 [N, 3, S, S], names of C classes, and N masks of the images' own sizes.

    The masks are gone through one by one, more than once: those of many large images need not be in memory together.
    """

    pixels: Pixels
    masks: Iterable[Mask]
    classes: tuple[str, ...]

    @classmethod
    def read(cls, context: StageContext, size: int) -> Shots:
        folder = context.folder("support")
        split = fewshot.load(folder, size)
        return cls(split.pixels, masks.Stored(folder), split.classes)

    def where(self, chosen: Tensor) -> Shots:
        """Those of which `chosen` bool [N] says so."""
        return Shots(self.pixels[chosen], _Chosen(self.masks, chosen), self.classes)

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class _Chosen:
    """Those of N `masks` of which `chosen` bool [N] says so, anew each time they are gone through."""

    masks: Iterable[Mask]
    chosen: Tensor

    def __iter__(self) -> Iterator[Mask]:
        return compress(self.masks, self.chosen.tolist())


def fit(network: Teacher, shots: Shots, params: DenseHeadParams, seed: int) -> DenseHead:
    """The head for a network's tokens of these images, and of their mirror images where `params.mirror`.

    It learns from all patches that show a known class or, where these are more than `params.most_patches`, from so
    many, drawn. Raises `DataError` where no patch shows one.
    """
    random = generator(seed, "patches")
    views = (False, True) if params.mirror else (False,)
    source = iter(shots.masks)
    learnt: tuple[Tensor, ...] = ()  # lot [n], tokens [n, D] and shares of the classes [n, C] of n patches
    for seen in torch.split(shots.pixels, _AT_ONCE):
        of_seen = list(islice(source, len(seen)))
        for mirrored in views:
            tokens = _tokens(network, seen.flip(-1) if mirrored else seen)
            shown = [mask.flip(-1) for mask in of_seen] if mirrored else of_seen
            side = dense_vit.grid_side(tokens.shape[1])
            shares = torch.cat([masks.cell_shares(mask, side, len(shots.classes)) for mask in shown])
            known = shares.any(1)
            lots = torch.rand(int(known.sum()), generator=random)
            found = (lots, tokens.flatten(0, 1)[known], shares[known])
            learnt = _smallest_lots(learnt, found, params.most_patches)
    _, tokens, shares = learnt
    if len(shares) == 0:
        raise DataError(
            f"no pixel of the {len(shots)} masks that are learnt from has a class",
            f"Give some of their pixels another value than {IGNORED}.",
        )
    return DenseHead(*linear_probe.fit_shares(tokens, shares, params.penalty)).eval()


def _smallest_lots(kept: tuple[Tensor, ...], more: tuple[Tensor, ...], most: int) -> tuple[Tensor, ...]:
    """Of both, the `most` rows with the smallest lots, or all: of all that were offered, each is as likely."""
    rows = tuple(torch.cat(pair) for pair in zip(kept, more, strict=True)) if kept else more
    if len(rows[0]) <= most:
        return rows
    smallest = rows[0].argsort()[:most]
    return tuple(column[smallest] for column in rows)


@torch.inference_mode()
def _tokens(network: Teacher, pixels: Pixels) -> Tensor:
    """float32 [N, h * w, D] on the CPU, of images uint8 [N, 3, S, S]."""
    device = next(network.network.parameters()).device
    ready = images.normalise(pixels.to(device).float() / 255, network.mean, network.std)
    with autocast(device):
        tokens = dense_vit.patch_tokens(network.network, ready)
    return tokens.float().cpu()


@torch.inference_mode()
def confusions(network: Teacher, head: DenseHead, shots: Shots) -> Tensor:
    """int64 [N, C, C]: for each image how many pixels of a class (row) were answered as which (column)."""
    counts = []
    for pixels, mask in zip(shots.pixels, shots.masks, strict=True):
        logits = head(_tokens(network, pixels[None]))
        of_pixels = dense_vit.upsampled(dense_vit.as_grid(logits), *mask.shape)
        answer = of_pixels[0].argmax(0).to(torch.uint8)
        counts.append(segmentation.confusion(mask.numpy(), answer.numpy(), len(shots.classes)))
    return torch.from_numpy(np.stack(counts))


def cross_validate(context: StageContext, params: TokenDistillationParams) -> None:
    """One fold: hold a part of the labelled images back, distil and fit without them, then answer for them.

    Writes `confusions.safetensors`: "student" and "teacher" int64 [n, C, C], "index" [n].
    """
    teacher = token_distillation.load_teacher(context, params)
    document = json.loads((context.folder("trained_student") / "student.json").read_text())
    head_params = DenseHeadParams.model_validate(document["trained_with"]["dense_head"])
    shots = Shots.read(context, teacher.input_size)
    if context.shards < 2:
        raise DataError(
            "cross-validation needs 2 images with masks, and there is one",
            "Add images with masks, or a test split.",
        )
    held = folds(len(shots), context.shards, context.seed) == context.shard
    learnt, judged = shots.where(~held), shots.where(held)
    given = [learnt.pixels]
    if "unlabelled" in context.inputs:
        given.append(fewshot.load(context.folder("unlabelled"), teacher.input_size).pixels)
    given.append(token_distillation.read_synthetic(context, teacher.input_size))
    shortening = Shortening.load(context.folder("shortened"))
    network, _ = token_distillation.train(
        teacher, shortening, torch.cat(given), params, context.seed, context.report, context.checkpoints
    )
    student = Backbone.of(teacher, network, shortening).as_teacher(resolve_device(context.device))
    found = {
        name: confusions(each, fit(each, learnt, head_params, context.seed), judged)
        for name, each in (("student", student), ("teacher", teacher))
    }
    save_file({**found, "index": held.nonzero()[:, 0]}, context.output / "confusions.safetensors")


def folds(count: int, shards: int, seed: int) -> Tensor:
    """The fold int64 [count] of each image; folds are of equal size to within one."""
    fold = torch.empty(count, dtype=torch.long)
    fold[torch.randperm(count, generator=generator(seed, "folds"))] = torch.arange(count) % shards
    return fold
