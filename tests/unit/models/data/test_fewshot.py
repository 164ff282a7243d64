from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from models.data import archive, fewshot
from models.errors import DataError


def paint(path: Path, colour: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path)


def test_a_folder_of_class_folders_becomes_splits_with_one_list_of_classes(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for colour, file in enumerate(
        ["b/1.png", "a/1.png", "a/2.png", "test/a/9.png", "unlabelled/x.png", "a/notes.txt.png"]
    ):
        paint(root / file, colour)
    splits = fewshot.pack_folder(root, tmp_path / "packed")
    support, test = fewshot.load(splits["support"], 8), fewshot.load(splits["test"], 8)
    assert support.classes == test.classes == ("a", "b")
    assert support.labels.tolist() == [0, 0, 0, 1]
    assert support.pixels[:, 0, 0, 0].tolist() == [1, 2, 5, 0]
    assert test.labels.tolist() == [0]
    assert fewshot.load(splits["unlabelled"], 8).labels.tolist() == [-1]
    shape = fewshot.shape_of(splits["support"], splits["unlabelled"], splits["test"])
    assert (shape.classes, shape.support, shape.smallest_class) == (2, 4, 1)
    assert (shape.unlabelled, shape.test) == (1, 1)


def test_packing_the_same_images_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        paint(tmp_path / "set" / name / "1.png", 3)
    first = fewshot.pack_folder(tmp_path / "set", tmp_path / "one")["support"] / archive.FILE_NAME
    second = fewshot.pack_folder(tmp_path / "set", tmp_path / "two")["support"] / archive.FILE_NAME
    assert first.read_bytes() == second.read_bytes()


def test_one_class_folder_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "set" / "only" / "1.png", 3)
    with pytest.raises(DataError, match="at least 2"):
        fewshot.pack_folder(tmp_path / "set", tmp_path / "out")


def test_unlabelled_images_alone_are_a_folder_to_pack(tmp_path: Path) -> None:
    for colour in range(3):
        paint(tmp_path / "set" / "unlabelled" / f"{colour}.png", colour)
    splits = fewshot.pack_folder(tmp_path / "set", tmp_path / "packed")
    assert set(splits) == {"unlabelled"}
    assert fewshot.load(splits["unlabelled"], 8).classes == ()
    shape = fewshot.shape_of(None, splits["unlabelled"])
    assert (shape.classes, shape.support, shape.smallest_class, shape.unlabelled) == (0, 0, 0, 3)

    for name in ("b", "a"):
        paint(tmp_path / "set" / "test" / name / "1.png", 9)
    splits = fewshot.pack_folder(tmp_path / "set", tmp_path / "with test")
    assert set(splits) == {"unlabelled", "test"}
    assert fewshot.load(splits["test"], 8).classes == ("a", "b")


def test_a_folder_with_nothing_to_learn_from_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set" / "unlabelled").mkdir(parents=True)
    paint(tmp_path / "set" / "test" / "a" / "1.png", 3)
    with pytest.raises(DataError, match="at least 2") as refused:
        fewshot.pack_folder(tmp_path / "set", tmp_path / "out")
    assert "unlabelled/" in refused.value.hint


def test_a_draw_has_the_shots_of_every_class_and_follows_its_seed() -> None:
    labels = torch.arange(60) % 3
    drawn = fewshot.draw_support(labels, 5, seed=1)
    assert labels[drawn].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert len(set(drawn.tolist())) == 15
    assert torch.equal(drawn, fewshot.draw_support(labels, 5, seed=1))
    assert not torch.equal(drawn, fewshot.draw_support(labels, 5, seed=2))
    with pytest.raises(DataError, match="has 20 images; 21"):
        fewshot.draw_support(labels, 21, seed=1)


def test_folds_spread_every_class_evenly() -> None:
    labels = torch.tensor([0] * 7 + [1] * 5 + [2] * 6)
    assigned = fewshot.stratified_folds(labels, 5, seed=0)
    sizes = torch.bincount(assigned, minlength=5)
    assert int(sizes.max() - sizes.min()) <= 1
    for label in range(3):
        counts = torch.bincount(assigned[labels == label], minlength=5)
        assert int(counts.max() - counts.min()) <= 1


def test_a_class_of_one_image_cannot_be_cross_validated() -> None:
    with pytest.raises(DataError, match="class 1 has 1 labelled image"):
        fewshot.stratified_folds(torch.tensor([0, 0, 1]), 2, seed=0)
