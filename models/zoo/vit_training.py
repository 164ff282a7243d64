"""The embedded ViT's training: from labels, and from what a convolutional teacher sees in every image and place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.data import augment
from models.data import images as image_tensors
from models.pipeline import Checkpoints, Report
from models.runtime import generator
from models.training.checkpoint import History
from models.training.loop import Schedule, fit
from models.training.losses import cross_entropy
from models.zoo import vit_network
from models.zoo.pictures import Pictures
from models.zoo.vit_network import GRID, SIZE, Budget
from models.zoo.vit_targets import Targets

#: The teacher's share in the answers that the head learns; the rest are the labels.
_TEACHER_SHARE = 0.5
#: Weights of the unexplained shares of the teacher's features and maps, beside the cross-entropy.
_FEATURES, _MAPS = 1.0, 2.0
_CUTMIX_ALPHA = 1.0


class Pupil(nn.Module):
    """The ViT, and the linear maps from its tokens to what the teacher sees, which are dropped in the end."""

    def __init__(self, network: Any, features: int, channels: int) -> None:
        super().__init__()
        self.vit = network
        self.to_features = nn.Linear(network.embed_dim, features)
        self.to_maps = nn.Linear(network.embed_dim, channels)
        for layer in (
            self.to_features,
            self.to_maps,
        ):  # so that nothing is explained at first, and nothing spoilt
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, K], features [N, D] and places [N, k, P] of normalised images. `kept`: see `vit_network`."""
        tokens = vit_network.tokens(self.vit, images, kept)
        first = tokens[:, 0]
        return self.vit.head(first), self.to_features(first), self.to_maps(tokens[:, 1:])


def train(
    budget: Budget,
    shown: Pictures,
    targets: Targets,
    *,
    seed: int,
    device: torch.device,
    report: Report,
    checkpoints: Checkpoints,
) -> tuple[Any, History]:
    """The averaged network (timm's `VisionTransformer`, with its head) and its training curve."""
    network = vit_network.build(budget, len(shown.classes), seed)
    pupil = Pupil(network, targets.features.shape[1], targets.maps.shape[1]).to(device)
    if device.type == "cpu":  # fused attention's backward pass is slower there on so few tokens
        for block in network.blocks:
            block.attn.fused_attn = False
    forward = torch.compile(pupil) if device.type == "cuda" else pupil
    pixels = shown.pixels.to(device)
    truth = functional.one_hot(shown.labels, len(shown.classes)).float()
    answers = torch.lerp(truth, targets.answers, _TEACHER_SHARE).to(device)
    features, maps = targets.features.to(device), targets.maps.to(device)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]).expand(budget.batch_size, -1)

    def loss_at(step: int) -> Tensor:
        random = generator(seed, "vit", step)
        rows = rows_at(step, budget.batch_size, len(pixels), seed).to(device)
        moves = budget.augmentation.transforms(whole, SIZE, random)
        images = augment.resample(image_tensors.resize(pixels[rows], SIZE), moves)
        images = budget.augmentation.recolour(images, random)
        wanted = answers[rows], features[rows].float()
        mixed = float(torch.rand(1, generator=random)) < budget.cutmix
        if mixed:
            images, wanted = augment.cutmix(images, wanted, _CUTMIX_ALPHA, random)  # type: ignore[assignment]
        kept = choose_patches(budget, step, random)
        logits, seen, places = forward(
            image_tensors.normalise(images), None if kept is None else kept.to(device)
        )
        loss = cross_entropy(logits.float(), wanted[0]) + _FEATURES * unexplained(seen, wanted[1])
        if mixed:  # a place of such an image is of one image or the other
            return loss
        there = augment.resample(maps[rows].float(), moves).flatten(2).transpose(1, 2)
        if kept is not None:
            there = there.gather(1, kept.to(device)[..., None].expand(-1, -1, there.shape[2]))
        return loss + _MAPS * unexplained(places, there)

    schedule = Schedule(budget.steps, budget.lr, budget.weight_decay, budget.ema_decay)
    averaged, history = fit(pupil, loss_at, schedule, report, checkpoints)
    return averaged.vit, history


def unexplained(seen: Tensor, wanted: Tensor) -> Tensor:
    """Share of the variance of `wanted` [..., D] that `seen` [..., D] leaves; its mean square is 1."""
    return (seen.float() - wanted).square().mean()


def choose_patches(budget: Budget, step: int, random: torch.Generator) -> Tensor | None:
    """int64 [N, k]: the patches of each image of the batch that are shown; None in the last part: all."""
    if step >= budget.whole_from * budget.steps:
        return None
    chances = torch.rand(budget.batch_size, GRID * GRID, generator=random)
    return chances.argsort(1)[:, : round(budget.kept * GRID * GRID)]


def rows_at(step: int, size: int, count: int, seed: int) -> Tensor:
    """int64 [size]: the images of a step's batch; every one comes once before any comes again."""
    places = step * size + torch.arange(size)
    epochs = places // count
    orders = {
        epoch: torch.randperm(count, generator=generator(seed, "epoch", epoch))
        for epoch in sorted(set(epochs.tolist()))
    }
    return torch.cat([orders[epoch][places[epochs == epoch] % count] for epoch in orders])
