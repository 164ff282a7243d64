"""What a student learns from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.data import fewshot
from models.errors import TrainingError
from models.generators import shards
from models.pipeline import StageContext
from models.runtime import generator
from models.teachers.labelling import SoftLabels
from models.training import distillation
from models.training.loop import NoCheckpoints

WHOLE = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])


def soft_labels(image: list[int]) -> SoftLabels:
    """The logits of image i are (i, 0)."""
    index = torch.tensor(image)
    logits = torch.stack([index.float(), torch.zeros(len(index))], 1)
    return SoftLabels(logits, index, WHOLE.repeat(len(index), 1))


def grey(folder: Path, values: range) -> list[Path]:
    """Images [6, 6], each of one brightness."""
    folder.mkdir(parents=True)
    for value in values:
        Image.fromarray(np.full((6, 6, 3), value, np.uint8)).save(folder / f"{value:03d}.png")
    return sorted(folder.iterdir())


def test_images_without_a_soft_label_are_left_out_and_synthetic_ones_come_last(tmp_path: Path) -> None:
    labelled, plain = grey(tmp_path / "a", range(4)), grey(tmp_path / "b", range(4, 9))
    synthetic = shards.Synthetic(
        torch.arange(9, 14, dtype=torch.uint8).view(5, 1, 1, 1).repeat(1, 3, 12, 12),
        *(torch.zeros(5, dtype=torch.long) for _ in range(3)),
        torch.zeros(5),
    )
    for name in ("synthetic", "soft"):
        (tmp_path / name).mkdir()
    synthetic.save(tmp_path / "synthetic")
    soft_labels([0, 2, 3, 5, 8, 10, 13]).save(tmp_path / "soft")
    support = fewshot.pack(tmp_path / "support", ("a", "b"), labelled, [0, 0, 1, 1])
    unlabelled = fewshot.pack(tmp_path / "unlabelled", ("a", "b"), plain, [None] * 5)
    context = StageContext(
        inputs={
            "support": (support,),
            "unlabelled": (unlabelled,),
            "synthetic": (tmp_path / "synthetic",),
            "soft_labels": (tmp_path / "soft",),
        },
        output=tmp_path / "out",
        shape=fewshot.shape_of(support, unlabelled),
        seed=0,
        device="cpu",
        report=lambda step, total, **metrics: None,
        checkpoints=NoCheckpoints(),
    )
    data = distillation.read_training_set(context, 8, torch.device("cpu"))
    assert data.pixels.shape == (7, 3, 8, 8)
    assert data.pixels[:, 0, 0, 0].tolist() == [0, 2, 3, 5, 8, 10, 13]
    assert data.logits[:, 0].tolist() == [0, 2, 3, 5, 8, 10, 13]
    assert data.labels.tolist() == [0, 1, 1, -1, -1, -1, -1]


def training_set(labels: list[int]) -> distillation.TrainingSet:
    count = len(labels)
    pixels = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    soft = soft_labels(list(range(count)))
    return distillation.training_set(pixels, torch.tensor(labels), soft, torch.device("cpu"))


@pytest.mark.parametrize("labels", [[-1] * 10, [0] * 2 + [-1] * 8, [0] * 10])
def test_without_a_share_for_labelled_images_all_are_drawn_alike(labels: list[int]) -> None:
    chosen, _ = training_set(labels).pick(20_000, 0.0, 1, generator(0, "test"))
    counts = torch.bincount(chosen, minlength=10)
    assert int(counts.min()) > 1800
    assert int(counts.max()) < 2200


def test_labelled_images_get_their_share_of_a_batch() -> None:
    chosen, _ = training_set([0] * 2 + [-1] * 98).pick(1000, 0.5, 1, generator(0, "test"))
    assert 500 <= int((chosen < 2).sum()) < 540


def test_a_share_for_labelled_images_does_no_harm_where_there_are_none() -> None:
    chosen, rows = training_set([-1] * 10).pick(64, 0.5, 1, generator(0, "test"))
    assert torch.equal(chosen, rows)
    assert len(chosen) == 64


def test_an_image_that_is_to_be_learnt_needs_a_soft_label() -> None:
    with pytest.raises(TrainingError, match="do not belong together"):
        distillation.training_set(
            torch.zeros(3, 3, 8, 8, dtype=torch.uint8),
            torch.tensor([0, 1, -1]),
            soft_labels([0, 2]),
            torch.device("cpu"),
        )
