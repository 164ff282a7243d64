"""Reading folders of class folders, and drawing from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from models.errors import DataError
from models.zoo import pictures


def draw(folder: Path, colour: tuple[int, int, int], count: int, size: int = 32) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.new("RGB", (size, size), colour).save(folder / f"{index}.png")


def test_folders_of_one_name_are_one_class_and_test_images_are_left_out(tmp_path: Path) -> None:
    draw(tmp_path / "one" / "red", (255, 0, 0), 2)
    draw(tmp_path / "one" / "test" / "red", (255, 0, 0), 9)
    draw(tmp_path / "one" / "blue", (0, 0, 255), 1)
    draw(tmp_path / "two" / "red", (250, 0, 0), 3, size=50)
    read = pictures.read([tmp_path / "one", tmp_path / "two"], 32)
    assert read.classes == ("blue", "red")
    assert read.counts.tolist() == [1, 5]
    assert read.pixels.shape == (6, 3, 32, 32)
    assert read.pixels[:, 0, 0, 0].tolist() == [0, 255, 255, 250, 250, 250]


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    draw(tmp_path / "red", (255, 0, 0), 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="class 'empty' has no image"):
        pictures.read([tmp_path], 32)


def test_one_class_is_too_few(tmp_path: Path) -> None:
    draw(tmp_path / "red", (255, 0, 0), 1)
    with pytest.raises(DataError, match="1 class folders; at least 2"):
        pictures.read([tmp_path], 32)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder '.*absent'"):
        pictures.read([tmp_path / "absent"], 32)


def test_a_rare_class_is_drawn_as_often_as_a_frequent_one_and_rows_are_of_their_class() -> None:
    counts = torch.tensor([3, 300, 30])
    classes, rows = pictures.draw(counts, 6000, torch.Generator().manual_seed(0))
    owner = torch.repeat_interleave(torch.arange(3), counts)
    assert torch.equal(owner[rows], classes)
    assert (torch.bincount(classes) - 2000).abs().max() < 200
    assert len(rows[classes == 0].unique()) == 3
    assert len(rows[classes == 2].unique()) == 30
