"""The teacher's tokens are made once, training goes on where it stopped, and heads fit the student's features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional

from models import runtime, teachers
from models.data import augment, images
from models.errors import TrainingError
from models.local import FolderCheckpoints
from models.methods.wecolora import TokenDistillationParams
from models.runtime import generator
from models.students import shortened_vit
from models.students.shortened_vit import Shortening, TokenTap
from models.teachers.protocol import Teacher
from models.training import linear_probe, token_distillation
from models.training.loop import NoCheckpoints
from models.training.token_distillation import TeacherTokens
from tests import tiny_vit

LAST = tiny_vit.DEPTH - 1
PIXELS = torch.randint(
    0, 256, (6, 3, tiny_vit.SIDE, tiny_vit.SIDE), dtype=torch.uint8, generator=generator(0)
)
SHORTENING = Shortening((1, 3, 5), tiny_vit.DEPTH, "last_of_group")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return teachers.load(tiny_vit.write(tmp_path_factory.mktemp("teacher")))


def quiet(step: int, total: int, **metrics: float) -> None:
    return None


def params(**changes: Any) -> TokenDistillationParams:
    return TokenDistillationParams(**{"steps": 12, "batch_size": 4, "views": 2, **changes})


@pytest.mark.parametrize("memory_mib", [64, 0])
def test_a_view_is_shown_to_the_teacher_once_where_its_tokens_fit(teacher: Teacher, memory_mib: int) -> None:
    tokens = TeacherTokens(teacher, [2, LAST], 4, memory_mib)
    seen = images.normalise(PIXELS[:4].float() / 255, teacher.mean, teacher.std)
    with torch.no_grad(), TokenTap(teacher.network, [2, LAST]) as tap:
        expected = torch.stack(tap(seen), 1)
    for rows in ([0, 1], [1, 2, 0], [3, 3], [0, 1, 2, 3]):
        found = tokens(torch.tensor(rows), seen[rows]).float()
        torch.testing.assert_close(found, expected[rows], rtol=2e-3, atol=2e-3)
    assert tokens.asked == (5 if memory_mib else 11)  # row 3 comes twice in the batch in which it is new


@pytest.mark.parametrize("views", [0, 2])
def test_training_in_bfloat16_comes_near_to_that_in_float32(
    teacher: Teacher, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for bfloat16 in (False, True):
        monkeypatch.setattr(runtime, "_bfloat16_on_cpu", bfloat16)
        _, history = token_distillation.train(
            teacher, SHORTENING, PIXELS, params(views=views), 0, quiet, NoCheckpoints()
        )
        losses.append(history[-1]["loss"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_new_crops_are_never_kept(teacher: Teacher) -> None:
    tokens = TeacherTokens(teacher, [LAST], 0, 64)
    seen = images.normalise(PIXELS[:2].float() / 255, teacher.mean, teacher.std)
    for _ in range(2):
        assert tokens(torch.tensor([-1, -1]), seen).shape[:2] == (2, 1)
    assert tokens.asked == 4


def test_fixed_views_are_those_that_the_teacher_was_shown() -> None:
    seen, rows = token_distillation._draw(PIXELS, params(views=3), 8, generator(5))
    image, number = rows // 3, rows % 3
    boxes = augment.view_boxes(image, number, 0.2)
    torch.testing.assert_close(seen, augment.look(PIXELS[image].float() / 255, boxes))
    fresh, none = token_distillation._draw(PIXELS, params(views=0), 8, generator(5))
    assert (none == -1).all()
    assert fresh.shape == seen.shape


@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("adaptation", ["enhanced_lora", "full"])
def test_training_that_was_stopped_goes_on_to_the_same_student(
    teacher: Teacher, tmp_path: Path, adaptation: str, views: int
) -> None:
    wanted = params(adaptation=adaptation, start="refitted", views=views)

    def train(checkpoints: Any, report: Callable[..., None] = quiet) -> dict[str, torch.Tensor]:
        network, _ = token_distillation.train(teacher, SHORTENING, PIXELS, wanted, 3, report, checkpoints)
        return network.state_dict()

    class Stopped(Exception):
        pass

    def stop(step: int, total: int, **metrics: float) -> None:
        if step:
            raise Stopped

    whole = train(NoCheckpoints())
    checkpoints = FolderCheckpoints(tmp_path, every=0)
    with pytest.raises(Stopped):
        train(checkpoints, stop)  # at step 10, after the checkpoint of step 9
    latest = checkpoints.latest()
    assert latest is not None
    kept = load_file(latest / "state.safetensors")
    assert adaptation == "full" or all(".a." in name or ".b." in name for name in kept if "network." in name)
    for name, value in train(checkpoints).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=1e-5)


def test_full_training_changes_what_low_rank_training_leaves(teacher: Teacher) -> None:
    states = {}
    for adaptation in ("none", "enhanced_lora", "full"):
        wanted = params(adaptation=adaptation, start="copied")
        network, _ = token_distillation.train(teacher, SHORTENING, PIXELS, wanted, 3, quiet, NoCheckpoints())
        states[adaptation] = network.state_dict()
    copied = shortened_vit.shorten(teacher.network, SHORTENING.kept).state_dict()
    assert all(torch.equal(value, copied[name]) for name, value in states["none"].items())
    norm = "blocks.0.norm1.weight"
    assert torch.equal(states["enhanced_lora"][norm], copied[norm])
    assert not torch.equal(states["full"][norm], copied[norm])


@pytest.mark.parametrize("match", ["last", "all"])
def test_the_loss_is_the_mean_absolute_error_of_all_tokens_after_the_blocks_that_are_compared(
    teacher: Teacher, match: str
) -> None:
    wanted = params(start="copied", steps=1, match=match)
    _, history = token_distillation.train(teacher, SHORTENING, PIXELS, wanted, 3, quiet, NoCheckpoints())
    seen, _ = token_distillation._draw(PIXELS, wanted, wanted.batch_size, generator(3, "batch", 0))
    ready = images.normalise(seen, teacher.mean, teacher.std)
    student = shortened_vit.shorten(teacher.network, SHORTENING.kept)
    with torch.no_grad():
        with TokenTap(student, range(3)) as tap:
            found = torch.stack(tap(ready))
        with TokenTap(teacher.network, SHORTENING.matches) as tap:
            away = (found - torch.stack(tap(ready))).abs()
    by_hand = away.mean() if match == "all" else away[-1].mean()
    assert history[0]["loss"] == pytest.approx(float(by_hand), rel=1e-3)


def test_too_high_a_rank_is_refused_before_blocks_are_fitted(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[object] = []
    monkeypatch.setattr(token_distillation.block_refit, "refit", lambda *given: fitted.append(given))
    wanted = params(rank=49, start="refitted")
    with pytest.raises(TrainingError, match="rank 49 is more than the teacher's layers have: 48"):
        token_distillation.train(teacher, SHORTENING, PIXELS, wanted, 3, quiet, NoCheckpoints())
    assert not fitted


@pytest.mark.parametrize(("few", "fused"), [(17, False), (16, True)])
def test_attention_that_keeps_all_its_weights_is_for_few_tokens_alone(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, few: int, fused: bool
) -> None:
    """The tiny teacher makes 17 tokens of an image."""
    monkeypatch.setattr(token_distillation, "_FEW_TOKENS", few)
    wanted = params(start="copied", steps=1)
    network, _ = token_distillation.train(teacher, SHORTENING, PIXELS, wanted, 3, quiet, NoCheckpoints())
    assert {bool(block.attn.fused_attn) for block in network.blocks} == {fused}


def test_refitted_blocks_are_nearer_to_the_teacher_than_copied_ones_and_leave_its_weights_alone(
    teacher: Teacher,
) -> None:
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    other = torch.randint(0, 256, PIXELS.shape, dtype=torch.uint8, generator=generator(1))
    shown = images.normalise(other.float() / 255, teacher.mean, teacher.std)
    with torch.no_grad(), TokenTap(teacher.network, SHORTENING.matches) as tap:
        wanted = torch.stack(tap(shown))
    away = {}
    for start in ("copied", "refitted", "refitted again"):
        student, _ = token_distillation.train(
            teacher,
            SHORTENING,
            PIXELS,
            params(adaptation="none", start=start.split()[0]),
            3,
            quiet,
            NoCheckpoints(),
        )
        with torch.no_grad(), TokenTap(student, range(3)) as tap:
            away[start] = (torch.stack(tap(shown)) - wanted).abs().mean((1, 2, 3))
    assert (away["refitted"] < 0.9 * away["copied"]).all()
    torch.testing.assert_close(away["refitted"], away["refitted again"], rtol=0, atol=0)
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("views", [0, 2])
def test_blocks_are_refitted_to_a_single_image_too(teacher: Teacher, views: int) -> None:
    wanted = params(adaptation="none", start="refitted", views=views)
    student, history = token_distillation.train(
        teacher, SHORTENING, PIXELS[:1], wanted, 3, quiet, NoCheckpoints()
    )
    copied = shortened_vit.shorten(teacher.network, SHORTENING.kept).state_dict()
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, copied[name])}
    assert changed == {f"blocks.{block}.mlp.fc2.{kind}" for block in range(3) for kind in ("weight", "bias")}
    assert history == []


def test_the_learning_rate_falls_with_the_teachers_width(teacher: Teacher) -> None:
    for width, low_rank, full in ((48, 1e-2, 1e-3), (192, 1e-2, 1e-3), (768, 2.5e-3, 2.5e-4)):
        wider = replace(teacher, embedding_dim=width)
        assert token_distillation.lr_of(params(), wider) == pytest.approx(low_rank)
        assert token_distillation.lr_of(params(adaptation="full"), wider) == pytest.approx(full)
        assert token_distillation.lr_of(params(lr=0.5), wider) == 0.5


def test_a_student_drawn_at_random_has_none_of_the_teachers_weights_and_learns(teacher: Teacher) -> None:
    wanted = params(adaptation="full", start="random")

    def train(seed: int, steps: int) -> dict[str, torch.Tensor]:
        network, _ = token_distillation.train(
            teacher,
            SHORTENING,
            PIXELS,
            wanted.model_copy(update={"steps": steps}),
            seed,
            quiet,
            NoCheckpoints(),
        )
        return network.state_dict()

    copied = shortened_vit.shorten(teacher.network, SHORTENING.kept).state_dict()
    first, trained, other = train(3, 1), train(3, 12), train(4, 12)
    for name in (
        "patch_embed.proj.weight",
        "pos_embed",
        "blocks.0.attn.qkv.weight",
        "blocks.2.mlp.fc2.weight",
    ):
        assert first[name].shape == copied[name].shape
        for one, another in ((first, copied), (trained, first), (trained, other)):
            assert not torch.allclose(one[name], another[name], atol=1e-5), name
    assert all(torch.equal(value, trained[name]) for name, value in train(3, 12).items())


def test_low_rank_updates_of_random_weights_are_refused() -> None:
    with pytest.raises(
        ValidationError, match="cannot be adapted by 'enhanced_lora': choose adaptation 'full'"
    ):
        params(start="random")


def test_the_change_of_tokens_is_nothing_for_all_blocks_and_grows_without_them(teacher: Teacher) -> None:
    told: list[tuple[int, int]] = []
    change = token_distillation.TokenChange(
        teacher, PIXELS, lambda step, total, **_: told.append((step, total))
    )
    assert change(tuple(range(tiny_vit.DEPTH))) == 0
    assert told == [(1, 21)]
    with torch.no_grad(), TokenTap(teacher.network, [LAST]) as tap:
        seen = images.normalise(PIXELS.float() / 255, teacher.mean, teacher.std)
        (whole,) = tap(seen)
        blocks = teacher.network.blocks  # by hand: all but the third
        tokens = teacher.network.patch_embed(seen)
        tokens = teacher.network._pos_embed(tokens)
        for number in (0, 1, 3, 4, 5):
            tokens = blocks[number](tokens)
    expected = (tokens - whole).abs().mean() / whole.abs().mean()
    assert change((0, 1, 3, 4, 5)) == pytest.approx(float(expected), rel=1e-4)
    assert change((0, 5)) > 0


@pytest.mark.parametrize(("width", "rank"), [(768, 128), (192, 32), (384, 64), (48, 8), (24, 8)])
def test_the_rank_is_a_sixth_of_the_width_unless_it_is_given(teacher: Teacher, width: int, rank: int) -> None:
    of_width = Teacher(teacher.network, 32, teacher.mean, teacher.std, width)
    assert token_distillation.rank_of(params(), of_width) == rank
    assert token_distillation.rank_of(params(rank=5), of_width) == 5


def test_a_linear_probe_is_the_optimum_of_regression_on_standardised_features() -> None:
    random = generator(7)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 5, generator=random) * torch.tensor([1.0, 10, 0.1, 3, 1]) + 4
    features[:, 0] += labels
    centre, weight, bias = linear_probe.fit(features, labels, 3, penalty=0.05)
    deviation = (features.var(0, correction=0) + 1e-6).sqrt()
    standard = ((features - features.mean(0)) / deviation).double()
    own = (weight * deviation[:, None]).double().requires_grad_()
    offset = bias.double().requires_grad_()
    loss = functional.cross_entropy(standard @ own + offset, labels) + 0.05 / 2 * own.square().sum()
    loss.backward()
    assert own.grad is not None
    assert offset.grad is not None
    assert float(own.grad.abs().max()) < 1e-4
    assert float(offset.grad.abs().max()) < 1e-4
    assert loss.item() < math.log(3)
    torch.testing.assert_close(centre, features.mean(0))
