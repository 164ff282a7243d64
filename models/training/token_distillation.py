"""SHORTEN and DISTILL_TOKENS: leave out blocks of a vision transformer, then teach it the tokens of the whole.

Source: Grigore et al. (WeCoLoRA), arXiv:2404.09326, section 3: mean absolute error of all last-block tokens, no labels.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain

import torch
from torch import Tensor, nn

from models import teachers
from models.arrays import Images, Pixels
from models.data import archive, augment, images
from models.errors import TrainingError
from models.evaluation.depth_latency import DepthTimer, Timed
from models.generators import shards
from models.methods.wecolora import BlocksParams, TokenDistillationParams
from models.pipeline import Checkpoints, Report, StageContext
from models.runtime import autocast, generator, resolve_device, seed_weights
from models.students import SHORTENED_VIT, block_selection, shortened_vit, vit_families
from models.students.shortened_vit import Backbone, Shortening, TokenTap
from models.teachers.protocol import Teacher
from models.training import block_refit, distillation, low_rank
from models.training.checkpoint import History
from models.training.loop import Schedule, fit

_AT_ONCE = 64
_FEW_TOKENS = 256  # of an image; with more, plain attention would need too much memory
#: Of low-rank updates, of full training: measured with the embedded ViT, of this width. Of wider teachers it is less.
_LR, _LR_OF_ALL, _WIDTH_OF_LR = 1e-2, 1e-3, 192
_BETAS = (0.9, 0.95)  # as in the paper
_REFIT_TOKENS = 2**17  # of all views together
_REFIT_CROPS = 64  # of each image, at most, where views are not fixed
_RANK_SHARE, _RANK_STEP = 6, 8  # the default rank is a sixth of the width, in steps of 8


def shorten(context: StageContext, params: BlocksParams) -> None:
    """Choose the blocks to keep. Raises `TeacherError` for a teacher that is no vision transformer."""
    teacher = teachers.load(
        teachers.read_spec(context.folder("teacher")), str(resolve_device(context.device))
    )
    blocks = vit_families.blocks_of(teacher.network)
    depth, r = len(blocks), params.r
    if params.most_parameters is not None:
        block = sum(value.numel() for value in blocks[0].parameters())
        whole = sum(
            value.numel() for value in shortened_vit.shorten(teacher.network, range(depth)).parameters()
        )
        r = block_selection.smallest_r(
            params.rule, depth, whole - depth * block, block, params.most_parameters
        )
    timed: list[Timed] = []
    if params.most_latency is not None:
        smallest = r if params.most_parameters is not None else 2
        choices = range(smallest, depth + 1)
        r, timed = _fast_enough(teacher, params.rule, params.most_latency, choices, context.report)
    changes: list[float] = []
    if params.rule == "first_of_group":
        kept = block_selection.first_of_group(depth, r)
    elif params.rule == "last_of_group":
        kept = block_selection.last_of_group(depth, r)
    else:
        shown = _some_images(context, teacher.input_size, params.images)
        change = TokenChange(teacher, shown, context.report)
        kept, changes = block_selection.least_change(depth, r, change)
    measured = tuple(asdict(each) for each in timed)
    Shortening(kept, depth, params.rule, tuple(changes), measured).save(context.output)
    context.report(1, 1, blocks=len(kept))


def _fast_enough(
    teacher: Teacher, rule: str, most: float, choices: range, report: Report
) -> tuple[int, list[Timed]]:
    """The smallest r of `choices` with which the student takes at most the share `most` of the teacher's time, and what
    was measured. Raises `TrainingError` where none does.
    """
    depth = len(vit_families.blocks_of(teacher.network))
    block_selection.checked(depth, 2)
    timer = DepthTimer(teacher)
    for done, r in enumerate(choices):
        report(done, len(choices))
        if timer(block_selection.count(rule, depth, r)).share <= most:
            return r, timer.timed
    least = min(timed.share for timed in timer.timed)
    raise TrainingError(
        f"no student of this teacher takes at most {most:.0%} of its time: with one block it takes {least:.0%}",
        "Allow more time (blocks.most_latency), or choose a smaller teacher.",
    )


class TokenChange:
    """How far the last tokens of some of a teacher's blocks are from those of all: mean |difference| / mean |token|.

    `report` is told of each question, of as many as there are at most.
    """

    def __init__(self, teacher: Teacher, pixels: Pixels, report: Report) -> None:
        self.network = teacher.network
        depth = len(vit_families.blocks_of(teacher.network))
        self.asked, self.most = 0, depth * (depth + 1) // 2
        self.report = report
        device = next(teacher.network.parameters()).device
        self.batches = [
            images.normalise(part.to(device).float() / 255, teacher.mean, teacher.std)
            for part in torch.split(pixels, _AT_ONCE)
        ]
        self.whole = list(self._tokens(self.network))
        self.size = torch.stack([tokens.abs().mean() for tokens in self.whole]).mean()

    def __call__(self, kept: block_selection.Kept) -> float:
        self.asked += 1
        self.report(self.asked, self.most)
        short = shortened_vit.shorten(self.network, kept)
        pairs = zip(self._tokens(short), self.whole, strict=True)
        differences = torch.stack([(tokens - whole).abs().mean() for tokens, whole in pairs])
        return float(differences.mean() / self.size)

    @torch.inference_mode()
    def _tokens(self, network: nn.Module) -> Iterator[Tensor]:
        last = len(vit_families.blocks_of(network)) - 1
        with TokenTap(network, [last]) as tap:
            for batch in self.batches:
                with autocast(batch.device):
                    (tokens,) = tap(batch)
                yield tokens.float()


def distill(context: StageContext, params: TokenDistillationParams) -> None:
    """Train the student without head. Writes what `shortened_vit.load_backbone` reads, and `history.json`."""
    teacher = load_teacher(context, params)
    shortening = Shortening.load(context.folder("shortened"))
    pixels = read_pixels(context, teacher.input_size)
    network, history = train(
        teacher, shortening, pixels, params, context.seed, context.report, context.checkpoints
    )
    chosen = {"rank": rank_of(params, teacher), "lr": lr_of(params, teacher)}
    trained_with = {**params.model_dump(), **chosen, "seed": context.seed}
    Backbone.of(teacher, network, shortening, trained_with).save(context.output)
    (context.output / "history.json").write_text(json.dumps(history))


def load_teacher(context: StageContext, params: TokenDistillationParams) -> Teacher:
    """The teacher at the size of the student's images. Raises `TeacherError` where that does not fit its patches."""
    spec = teachers.read_spec(context.folder("teacher"))
    teacher = teachers.load(spec, str(resolve_device(context.device)), params.input_size)
    shortened_vit.check_size(teacher)
    return teacher


def read_pixels(context: StageContext, size: int) -> Pixels:
    """All images that there are to learn from, [N, 3, size, size]: labelled, unlabelled, synthetic ones."""
    pixels, _ = distillation.read_images(context, size)
    synthetic = read_synthetic(context, size)
    return torch.cat([pixels, synthetic]) if len(synthetic) else pixels


def read_synthetic(context: StageContext, size: int) -> Pixels:
    """Those that DRAW made, [n, 3, size, size]; none where there are none."""
    if "synthetic" not in context.inputs:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    index = torch.arange(shards.count(context.inputs["synthetic"]))
    return distillation.read_synthetic(context, index, size)


def train(
    teacher: Teacher,
    shortening: Shortening,
    pixels: Pixels,
    params: TokenDistillationParams,
    seed: int,
    report: Report,
    checkpoints: Checkpoints,
) -> tuple[nn.Module, History]:
    """The shortened network, its updates folded in, and the training curve. `pixels`: [N, 3, S, S], S the teacher's."""
    device = next(teacher.network.parameters()).device
    student = Steady(_first(teacher, shortening, params, seed))
    pixels = pixels.to(device)
    rank = rank_of(params, teacher)
    low_rank.check_rank(student.network, params.adaptation, rank)
    if params.start == "refitted":
        _refit(student.network, teacher, shortening, pixels, params, seed, report)
    low_rank.attach(student.network, params.adaptation, rank, generator(seed, "updates"))
    if params.adaptation == "none":
        return student.network, []
    if device.type == "cpu" and tokens_of_image(teacher) <= _FEW_TOKENS:
        _without_fused_attention(student.network)
    places = range(len(shortening.kept)) if params.match == "all" else [len(shortening.kept) - 1]
    targets = TeacherTokens(
        teacher,
        [shortening.matches[place] for place in places],
        len(pixels) * params.views,
        params.memory_mib,
    )

    def loss_at(step: int) -> Tensor:
        random = generator(seed, "batch", step)
        seen, rows = _draw(pixels, params, params.batch_size, random)
        ready = images.normalise(seen, teacher.mean, teacher.std)
        wanted = targets(rows, ready)
        with TokenTap(student.network, places) as tap:
            tokens = tap(ready)
        return (torch.stack(tokens, 1).float() - wanted.float()).abs().mean()

    low_rank.check_all_learn(student.network, lambda: loss_at(0))
    schedule = Schedule(
        params.steps, lr_of(params, teacher), params.weight_decay, ema_decay=0.0, betas=_BETAS
    )
    trained, history = fit(student, loss_at, schedule, report, checkpoints)
    network: nn.Module = trained.network  # type: ignore[assignment]
    low_rank.fold(network)
    return network, history


class Steady(nn.Module):
    """A network that stays in evaluation mode while it is trained: dropout would only blur what it is to imitate."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train(False)

    def train(self, mode: bool = True) -> Steady:
        return super().train(False)


class TeacherTokens:
    """The teacher's tokens after some of its blocks for each of `count` fixed views, made once and kept.

    What does not fit into `memory_mib` is made anew each time. `asked` counts the views that the teacher has seen.
    """

    def __init__(self, teacher: Teacher, blocks: list[int], count: int, memory_mib: int) -> None:
        self.teacher = teacher
        self.blocks = blocks
        self.asked = 0
        self._known = torch.zeros(count, dtype=torch.bool)
        self._most_bytes = memory_mib * 2**20
        self._store: Tensor | None = None

    def __call__(self, rows: Tensor, seen: Images) -> Tensor:
        """float16 [B, blocks, T, D] of the normalised images `seen` [B, 3, S, S], which are the views `rows` [B].

        A row of -1 is no fixed view: it is never kept.
        """
        known = (rows >= 0) & self._known[rows.clamp(min=0)] if len(self._known) else rows != rows
        new = (~known).nonzero()[:, 0]
        if len(new) == 0 and self._store is not None:
            return self._store[rows.to(self._store.device)]
        fresh = self._ask(seen[new.to(seen.device)])
        store = self._keep(rows[new], fresh)
        tokens = fresh.new_empty(len(rows), *fresh.shape[1:])
        tokens[new.to(fresh.device)] = fresh
        old = known.nonzero()[:, 0].to(fresh.device)
        tokens[old] = store[rows.to(fresh.device)[old]]
        return tokens

    @torch.no_grad()
    def _ask(self, seen: Images) -> Tensor:
        self.asked += len(seen)
        with TokenTap(self.teacher.network, self.blocks) as tap, autocast(seen.device):
            parts = [torch.stack(tap(part), 1) for part in torch.split(seen, _AT_ONCE)]
            return torch.cat(parts).half()

    def _keep(self, rows: Tensor, fresh: Tensor) -> Tensor:
        """Keep what there is room for; returns all that is kept."""
        if self._store is None:
            room = min(len(self._known), self._most_bytes // max(1, fresh[0].numel() * fresh.element_size()))
            self._store = fresh.new_empty(room, *fresh.shape[1:])
        chosen = ((rows >= 0) & (rows < len(self._store))).nonzero()[:, 0]
        kept = rows[chosen]
        self._store[kept.to(fresh.device)] = fresh[chosen.to(fresh.device)]
        self._known[kept] = True
        return self._store


@torch.no_grad()
def tokens_of_image(teacher: Teacher) -> int:
    """How many tokens the teacher makes of an image."""
    blank = torch.zeros(1, 3, teacher.input_size, teacher.input_size)
    with TokenTap(teacher.network, [0]) as tap:
        return tap(blank.to(next(teacher.network.parameters()).device))[0].shape[1]


def rank_of(params: TokenDistillationParams, teacher: Teacher) -> int:
    """The rank that is asked for, else about a sixth of the teacher's width: 128 of 768, 32 of 192."""
    if params.rank is not None:
        return params.rank
    return max(_RANK_STEP, round(teacher.embedding_dim / _RANK_SHARE / _RANK_STEP) * _RANK_STEP)


def lr_of(params: TokenDistillationParams, teacher: Teacher) -> float:
    """The learning rate that is asked for, else one that falls with the teacher's width, as Adam's should.

    Source of the latter: Yang et al., "Tensor Programs V" (muTransfer), arXiv:2203.03466, table 3.
    """
    if params.lr is not None:
        return params.lr
    own = _LR_OF_ALL if params.adaptation == "full" else _LR
    return own * min(1.0, _WIDTH_OF_LR / teacher.embedding_dim)


def _first(teacher: Teacher, shortening: Shortening, params: TokenDistillationParams, seed: int) -> nn.Module:
    """The student before it sees an image."""
    if params.start == "random":
        seed_weights(seed, "weights", SHORTENED_VIT)
        return shortened_vit.drawn_anew(teacher, shortening)
    return copy.deepcopy(shortened_vit.shorten(teacher.network, shortening.kept))


def _refit(
    student: nn.Module,
    teacher: Teacher,
    shortening: Shortening,
    pixels: Pixels,
    params: TokenDistillationParams,
    seed: int,
    report: Report,
) -> None:
    """Bring the tokens after each copied block near to those that it should give (`Shortening.matches`)."""
    of_each = params.views or _REFIT_CROPS
    views = min(max(1, _REFIT_TOKENS // tokens_of_image(teacher)), len(pixels) * of_each)
    targets = TeacherTokens(teacher, list(shortening.matches), views, params.memory_mib)

    def batches() -> Iterator[tuple[Images, Tensor]]:
        for rows in torch.split(torch.arange(views), _AT_ONCE):
            report(0, params.steps)
            seen, _ = _draw(pixels, params, len(rows), generator(seed, "refit", int(rows[0])))
            ready = images.normalise(seen, teacher.mean, teacher.std)
            yield ready, targets(rows, ready)

    block_refit.refit(student, batches)


def _draw(
    pixels: Pixels, params: TokenDistillationParams, count: int, random: torch.Generator
) -> tuple[Images, Tensor]:
    """`count` views [B, 3, S, S] in 0..1, and the row [B] of each among the fixed views; -1 where none are fixed."""
    chosen = torch.randint(len(pixels), (count,), generator=random)
    shown = pixels[chosen.to(pixels.device)].float() / 255
    if params.views == 0:
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]).expand(len(chosen), -1)
        crops = augment.Augmentation(shift=0.0, crop=1 - params.smallest_crop, flip=True)
        return crops(shown, whole, random), torch.full_like(chosen, -1)
    number = torch.randint(params.views, (count,), generator=random)
    views = augment.view_boxes(chosen, number, params.smallest_crop)
    return augment.look(shown, views), chosen * params.views + number


def _some_images(context: StageContext, size: int, count: int) -> Pixels:
    """Up to `count` images, evenly from the labelled and then the unlabelled ones; only those are decoded."""
    paths = [
        context.folder(name) / archive.FILE_NAME
        for name in ("support", "unlabelled")
        if name in context.inputs
    ]
    total = sum(len(archive.read_index(path).images) for path in paths)
    chosen = set(torch.linspace(0, total - 1, min(count, total)).long().tolist())
    contents = chain.from_iterable(archive.contents(path) for path in paths)
    return images.squares(
        ((image.name, content) for at, (image, content) in enumerate(contents) if at in chosen), size
    )


def _without_fused_attention(network: nn.Module) -> None:
    """On a CPU its backward pass takes longer than the plain one where tokens are few; that keeps T x T numbers."""
    for module in network.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = False  # type: ignore[assignment]
