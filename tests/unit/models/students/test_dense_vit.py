"""The tokens of patches, where they are in every family, and what becomes of a head's logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import teachers
from models.errors import TeacherError
from models.runtime import generator
from models.students import dense_vit, shortened_vit
from models.students.dense_vit import DenseHead, DenseNetwork, DenseStudent
from models.students.shortened_vit import Backbone, Shortening
from tests import tiny_vit
from tests.vit_networks import NETWORKS, SIDE, a_network

GRID = SIDE // 8


@pytest.mark.parametrize("name", NETWORKS)
def test_the_token_of_a_patch_changes_most_with_that_patch(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name][0]().eval()  # its blocks hardly change the tokens
    image = torch.randn(1, 3, SIDE, SIDE, generator=generator(0))
    row, column = 1, 2
    other = image.clone()
    other[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] *= -1
    before, after = (dense_vit.patch_tokens(network, each) for each in (image, other))
    assert before.shape[:2] == (1, GRID**2)
    assert int((after - before).norm(dim=2).argmax()) == GRID * row + column


def test_logits_lie_where_their_patches_lie() -> None:
    head = DenseHead(
        torch.ones(24), torch.randn(24, 3, generator=generator(1)), torch.tensor([0.0, 1.0, -1.0])
    )
    network = a_network("timm ViT")
    images = torch.randn(2, 3, SIDE, SIDE, generator=generator(2))
    logits = DenseNetwork(network, head)(images)
    assert logits.shape == (2, 3, GRID, GRID)
    token = dense_vit.patch_tokens(network, images)[1, GRID * 3 + 1]
    torch.testing.assert_close(logits[1, :, 3, 1], (token - 1) @ head.weight + head.bias)


def test_pixels_between_the_centres_of_two_patches_get_a_mixture() -> None:
    logits = torch.tensor([[[[0.0, 1.0]]]])
    found = dense_vit.upsampled(logits, 1, 8)[0, 0, 0]
    assert found.tolist() == pytest.approx([0, 0, 1 / 8, 3 / 8, 5 / 8, 7 / 8, 1, 1])


def test_patches_that_are_no_square_are_refused() -> None:
    with pytest.raises(TeacherError, match="12 patches, which are no square grid"):
        dense_vit.grid_side(12)


def test_a_saved_student_gives_the_same_logits(tmp_path: Path) -> None:
    teacher = teachers.load(tiny_vit.write(tmp_path / "teacher"))
    short = shortened_vit.shorten(teacher.network, (1, 3))
    random = generator(3)
    heads = [
        DenseHead(
            torch.randn(tiny_vit.WIDTH, generator=random),
            torch.randn(tiny_vit.WIDTH, 2, generator=random),
            torch.zeros(2),
        )
        for _ in range(2)
    ]
    backbone = Backbone.of(teacher, short, Shortening((1, 3), tiny_vit.DEPTH, "last_of_group"))
    student = DenseStudent(backbone, heads[0], heads[1], "shortened_vit", ("sky", "käse"), {"dense_head": {}})
    (tmp_path / "student").mkdir()
    student.save(tmp_path / "student")
    again = dense_vit.load(tmp_path / "student")
    images = torch.randn(2, 3, tiny_vit.SIDE, tiny_vit.SIDE, generator=random)
    torch.testing.assert_close(again.network(images), student.network(images))
    assert (again.classes, again.name) == (("sky", "käse"), "shortened_vit")
    for found, saved in ((again.head, heads[0]), (again.teacher_head, heads[1])):
        assert torch.equal(found.centre, saved.centre)
        assert torch.equal(found.weight, saved.weight)
