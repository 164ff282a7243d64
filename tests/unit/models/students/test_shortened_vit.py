"""Shorter vision transformers: which blocks, in which families, with which tokens."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from models import teachers
from models.errors import TeacherError, TrainingError
from models.runtime import generator
from models.students import block_selection, shortened_vit, vit_families
from models.students.shortened_vit import Backbone, Shortening, TokenTap
from models.teachers.protocol import Teacher
from models.training import low_rank
from tests import tiny_vit
from tests.vit_networks import DEPTH, NETWORKS, SIDE, a_network, of_transformers

IMAGES = torch.randn(2, 3, SIDE, SIDE, generator=generator(0))


@torch.no_grad()
def tokens(network: nn.Module, *blocks: int) -> list[torch.Tensor]:
    with TokenTap(network, blocks) as tap:
        return tap(IMAGES)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_is_known_with_its_blocks_layers_and_tokens(name: str) -> None:
    network = a_network(name)
    assert len(vit_families.blocks_of(network)) == DEPTH
    roles = [role for _, roles in vit_families.linears_of(network) for role in roles]
    assert {role: roles.count(role) for role in set(roles) - {"fc1"}} == dict.fromkeys(
        ("q", "k", "v", "proj", "fc2"), DEPTH
    )
    (last,) = tokens(network, DEPTH - 1)
    assert last.shape[:2] == (2, NETWORKS[name][1] + (SIDE // 8) ** 2)
    assert vit_families.prefix_tokens(network) == NETWORKS[name][1]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_shortened_network_runs_the_kept_blocks_with_the_teachers_weights(name: str) -> None:
    network = a_network(name)
    short = shortened_vit.shorten(network, (0, 1))
    before, after = tokens(network, 0, 1), tokens(short, 0, 1)
    assert len(vit_families.blocks_of(short)) == 2
    assert len(vit_families.blocks_of(network)) == DEPTH
    for expected, found in zip(before, after, strict=True):
        torch.testing.assert_close(found, expected)
    skipping = tokens(shortened_vit.shorten(network, (0, 3)), 1)[0]
    assert not torch.allclose(skipping, before[1], atol=1e-4)
    assert not torch.allclose(skipping, tokens(network, 3)[0], atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_of_all_blocks_gives_the_teachers_features_and_has_no_idle_weights(name: str) -> None:
    network = a_network(name)
    whole = copy.deepcopy(shortened_vit.shorten(network, range(DEPTH))).requires_grad_(True)
    features = whole(IMAGES)
    torch.testing.assert_close(features.detach(), network(IMAGES))
    features.square().sum().backward()
    idle = {path for path, value in whole.named_parameters() if value.grad is None}
    assert not idle - {"backbone.embeddings.mask_token"}


@pytest.mark.parametrize(
    ("name", "adaptation"),
    [*((name, "enhanced_lora") for name in NETWORKS), ("timm EVA", "dora"), ("transformers ViT", "dora")],
)
def test_low_rank_updates_train_in_every_family_and_fold_exactly(
    name: str, adaptation: low_rank.Adaptation
) -> None:
    plain = copy.deepcopy(shortened_vit.shorten(a_network(name), (1, 3)))
    student = copy.deepcopy(plain)
    low_rank.attach(student, adaptation, 2, generator(1))
    rounding = 1e-3 if adaptation == "dora" else 0.0  # a length and back; nothing is added to a copied weight
    torch.testing.assert_close(tokens(student, 1)[0], tokens(plain, 1)[0], rtol=rounding, atol=rounding)
    target = torch.randn_like(tokens(plain, 1)[0])

    def loss() -> torch.Tensor:
        with TokenTap(student, [1]) as tap:
            return (tap(IMAGES)[0] - target).abs().mean()

    low_rank.check_all_learn(student, loss)
    start = loss().item()
    optimiser = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert loss().item() < start
    trained = tokens(student, 1)[0]
    low_rank.fold(student)
    assert (tokens(student, 1)[0] - trained).abs().max() < 1e-5
    state, copied = student.state_dict(), plain.state_dict()
    assert state.keys() == copied.keys()
    changed = {key for key in state if not torch.equal(state[key], copied[key])}
    layers = {
        f"{path}.weight"
        for path, module in student.named_modules()
        if any(module is layer for layer, _ in vit_families.linears_of(student))
    }
    assert changed == layers


def test_plain_lora_changes_queries_and_values_only() -> None:
    for name in ("timm ViT", "transformers ViT"):
        plain = copy.deepcopy(shortened_vit.shorten(a_network(name), (0, 2)))
        student = copy.deepcopy(plain)
        low_rank.attach(student, "lora", 3, generator(1))
        assert low_rank.learning(student) == 2 * 2 * 3 * (24 + 24)  # blocks, q and v, rank, A and B
        for module in student.modules():
            if isinstance(module, low_rank.LowRankUpdate):
                for matrix in module.b.values():
                    nn.init.normal_(matrix)
        low_rank.fold(student)
        for (layer, roles), (original, _) in zip(
            vit_families.linears_of(student), vit_families.linears_of(plain), strict=True
        ):
            parts = (layer.weight - original.weight).split(layer.out_features // len(roles))
            for role, part in zip(roles, parts, strict=True):
                assert bool(part.any()) == (role in ("q", "v"))


def test_enhanced_updates_have_the_papers_number_of_parameters() -> None:
    student = copy.deepcopy(shortened_vit.shorten(a_network("timm ViT"), (0, 2)))
    low_rank.attach(student, "enhanced_lora", 4, generator(1))
    assert low_rank.learning(student) == 2 * 18 * 24 * 4  # 18 D R a block
    update = next(module for module in student.modules() if isinstance(module, low_rank.LowRankUpdate))
    bound = 24**-0.5
    a = torch.cat([matrix.detach().flatten() for matrix in update.a.values()])
    assert 0.9 * bound < float(a.abs().max()) <= bound
    assert not any(bool(matrix.any()) for matrix in update.b.values())


def test_an_update_without_gradient_is_refused_by_name() -> None:
    student = copy.deepcopy(shortened_vit.shorten(a_network("timm ViT"), (0, 2)))
    low_rank.attach(student, "enhanced_lora", 4, generator(1))

    def first_block_only() -> torch.Tensor:
        with TokenTap(student, [0]) as tap:
            return tap(IMAGES)[0].abs().mean()

    with pytest.raises(
        TrainingError, match=r"6 of 12 low-rank updates get no gradient, such as blocks\.1\.attn"
    ):
        low_rank.check_all_learn(student, first_block_only)


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(TrainingError, match="rank 25 is more than the teacher's layers have: 24"):
        low_rank.attach(a_network("timm ViT"), "enhanced_lora", 25, generator(1))


def test_what_is_no_vision_transformer_is_refused_with_those_that_are() -> None:
    with pytest.raises(TeacherError, match="EfficientNet") as caught:
        vit_families.blocks_of(timm.create_model("tf_efficientnet_lite0", num_classes=0))
    for family in vit_families.FAMILIES:
        assert family.title in caught.value.hint


def test_blocks_that_are_not_all_alike_are_refused() -> None:
    network = a_network("timm ViT")
    vit_families.blocks_of(network)[2].mlp.fc1 = nn.Linear(24, 30)
    with pytest.raises(TeacherError, match="block 2 of the teacher's network is built otherwise"):
        vit_families.blocks_of(network)


@pytest.mark.parametrize(
    ("depth", "r", "first", "last"),
    [
        (12, 2, (0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11)),
        (12, 3, (0, 3, 6, 9), (2, 5, 8, 11)),
        (24, 4, (0, 4, 8, 12, 16, 20), (3, 7, 11, 15, 19, 23)),
        (12, 5, (0, 5, 10), (5, 11)),
        (4, 4, (0,), (3,)),
    ],
)
def test_blocks_are_kept_as_in_the_papers_code_or_its_figure(
    depth: int, r: int, first: tuple[int, ...], last: tuple[int, ...]
) -> None:
    assert block_selection.first_of_group(depth, r) == first
    assert block_selection.last_of_group(depth, r) == last


@pytest.mark.parametrize("r", [1, 13])
def test_an_r_that_leaves_no_block_or_all_is_refused(r: int) -> None:
    with pytest.raises(TrainingError, match="12 blocks") as caught:
        block_selection.first_of_group(12, r)
    assert "2 to 12" in caught.value.hint


def test_the_blocks_that_change_least_are_left_out_first() -> None:
    weight = [5.0, 0.1, 3.0, 0.2, 4.0, 9.0]

    def change(kept: tuple[int, ...]) -> float:
        return sum(value for block, value in enumerate(weight) if block not in kept)

    kept, changes = block_selection.least_change(6, 2, change)
    assert kept == (0, 4, 5)
    assert changes == pytest.approx([0.1, 0.3, 3.3])


def test_a_budget_gives_the_smallest_r_that_fits() -> None:
    def smallest(budget: int, depth: int = 12, rule: str = "last_of_group") -> int:
        return block_selection.smallest_r(rule, depth, stem=100, block=50, budget=budget)

    assert (smallest(400), smallest(399), smallest(150)) == (2, 3, 7)
    with pytest.raises(TrainingError, match="at most 149 parameters: with one block it has 150"):
        smallest(149)
    # of 32 blocks, one of every three: 10, or 11 where the first of each group is kept
    assert (smallest(600, 32), smallest(600, 32, "influence"), smallest(600, 32, "first_of_group")) == (
        3,
        3,
        4,
    )
    for rule, choose in (
        ("first_of_group", block_selection.first_of_group),
        ("last_of_group", block_selection.last_of_group),
    ):
        for depth in range(2, 40):
            for r in range(2, depth + 1):
                assert block_selection.count(rule, depth, r) == len(choose(depth, r))
    with pytest.raises(TrainingError, match="the teacher has 1 block: none can be left out"):
        smallest(1000, depth=1)


def test_each_kept_block_is_to_get_what_it_got_in_the_teacher() -> None:
    shortening = Shortening(kept=(1, 3, 5), depth=6, rule="last_of_group")
    assert shortening.matches == (2, 4, 5)


def shortened(teacher: Teacher, kept: tuple[int, ...], depth: int) -> Backbone:
    network = copy.deepcopy(shortened_vit.shorten(teacher.network, kept))
    return Backbone.of(teacher, network, Shortening(kept, depth, "last_of_group"))


def assert_the_same_after_saving(backbone: Backbone, folder: Path, size: int) -> None:
    backbone.save(folder)
    again = shortened_vit.load_backbone(folder)
    assert json.loads(json.dumps(again.document())) == json.loads(json.dumps(backbone.document()))
    images = torch.rand(2, 3, size, size, generator=generator(2))
    cpu = torch.device("cpu")
    torch.testing.assert_close(again.as_teacher(cpu).embed(images), backbone.as_teacher(cpu).embed(images))


@pytest.mark.parametrize("size", [tiny_vit.SIDE, 48])
def test_a_saved_backbone_is_built_again_with_the_same_answers(tmp_path: Path, size: int) -> None:
    teacher = teachers.load(tiny_vit.write(tmp_path / "teacher"), input_size=size)
    backbone = shortened(teacher, (1, 3, 5), tiny_vit.DEPTH)
    assert backbone.interpolated_from == (None if size == tiny_vit.SIDE else tiny_vit.SIDE)
    assert_the_same_after_saving(backbone, tmp_path, size)


@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2", "CLIPVision", "SiglipVision"])
def test_a_transformers_checkpoint_is_shortened_and_built_again(tmp_path: Path, name: str) -> None:
    of_transformers(name, **({"mlp_ratio": 2} if name == "Dinov2" else {})).backbone.save_pretrained(tmp_path)
    spec = tiny_vit.write(tmp_path / "timm").model_copy(
        update={"kind": "transformers", "source": str(tmp_path), "embedding_dim": 24}
    )
    teacher = teachers.load(spec, input_size=48)
    shortened_vit.check_size(teacher)
    backbone = shortened(teacher, (1, 3), DEPTH)
    assert backbone.interpolated_from == SIDE
    assert_the_same_after_saving(backbone, tmp_path, 48)


def test_a_size_that_does_not_divide_into_patches_is_refused_with_those_that_do(tmp_path: Path) -> None:
    teacher = teachers.load(tiny_vit.write(tmp_path), input_size=44)
    with pytest.raises(
        TeacherError, match="44 pixels do not divide into the teacher's patches of 8"
    ) as caught:
        shortened_vit.check_size(teacher)
    assert "40 or 48" in caught.value.hint


def test_the_size_that_a_teacher_was_trained_on_need_not_divide_into_its_patches(tmp_path: Path) -> None:
    spec = tiny_vit.write(tmp_path, img_size=36)  # as SigLIP's images of 384 pixels and patches of 14
    teacher = teachers.load(spec, input_size=36)
    shortened_vit.check_size(teacher)
    assert teacher.embed(torch.rand(2, 3, 36, 36, generator=generator(2))).shape == (2, tiny_vit.WIDTH)
    with pytest.raises(TeacherError, match="44 pixels do not divide"):
        shortened_vit.check_size(teachers.load(spec, input_size=44))


@pytest.mark.parametrize(
    ("name", "interpolates"),
    [("timm ViT", True), ("timm BEiT", True), ("transformers SigLIP", True), ("timm DINOv3", False)],
)
def test_positions_that_were_learnt_are_interpolated_and_rotations_are_not(
    name: str, interpolates: bool
) -> None:
    network = a_network(name)
    for size in (SIDE, 48):
        teacher = Teacher(network, size, tiny_vit.MEAN, tiny_vit.STD, 24, {"own_size": SIDE})
        expected = SIDE if interpolates and size != SIDE else None
        assert shortened_vit.interpolated_from(teacher) == expected


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    teacher = teachers.load(tiny_vit.write(tmp_path / "teacher"))
    whole = Backbone.of(teacher, teacher.network, Shortening((0, 2), tiny_vit.DEPTH, "first_of_group"))
    whole.save(tmp_path)
    with pytest.raises(TrainingError, match="weights do not fit"):
        shortened_vit.load_backbone(tmp_path)
