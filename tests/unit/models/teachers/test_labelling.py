"""What the teacher's head says of synthetic images."""

from __future__ import annotations

import torch

from models.stages import HeadParams
from models.teachers import few_shot_head, labelling
from models.teachers.few_shot_head import FewShotHead

WIDTH, CLASSES = 16, 3


def head(intended: float) -> FewShotHead:
    features = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % CLASSES
    names = ("a", "b", "c")
    return few_shot_head.fit(
        features,
        labels,
        torch.arange(12),
        features.mean(0),
        HeadParams(rounds=0, intended=intended),
        names,
        32,
    )


def synthetic() -> torch.Tensor:
    return torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1))


def test_what_all_synthetic_images_have_in_common_tells_nothing() -> None:
    intended = torch.arange(9) % CLASSES
    features = synthetic()
    moved = labelling.made_for(head(3.0), features + 5 * torch.ones(WIDTH), intended)
    assert torch.allclose(moved, labelling.made_for(head(3.0), features, intended), atol=1e-4)


def test_evidence_is_added_to_the_class_that_an_image_was_made_for_and_to_no_other() -> None:
    intended = torch.tensor([0, 1, 2, 0, 1, 2, -1, -1, 0])
    with_it, without = (labelling.made_for(head(each), synthetic(), intended) for each in (3.0, 0.0))
    expected = torch.zeros(9, CLASSES)
    expected[torch.arange(9)[intended >= 0], intended[intended >= 0]] = 3.0
    assert torch.allclose(with_it - without, expected, atol=1e-5)
