"""From encoded masks to class indices, and to what the cells of a grid show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.data import archive, fewshot, masked_folder, masks
from models.data.archive import IGNORED
from models.errors import DataError
from tests import rendered_masks


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_values_are_those_of_the_file_however_many_bits_they_have(bits: int) -> None:
    rows = [[(row + column) % min(4, 2**bits) for column in range(8)] for row in range(3)]
    assert masks.decode(rendered_masks.grey_png(rows, bits)).tolist() == rows


def test_the_colours_of_a_palette_mean_nothing() -> None:
    values = np.array([[0, 2], [255, 1]], np.uint8)
    assert masks.decode(rendered_masks.mask_png(values, palette=True)).tolist() == values.tolist()


def test_what_is_encoded_is_decoded_again() -> None:
    values = torch.randint(0, 256, (7, 9), dtype=torch.uint8)
    assert torch.equal(masks.decode(masks.encode(values)), values)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (rendered_masks.png(Image.new("RGB", (4, 4))), "of the kind RGB, not of one channel"),
        (rendered_masks.png(Image.fromarray(np.zeros((4, 4), np.uint16))), "of the kind I;16"),
        (b"no image", "cannot be decoded"),
    ],
    ids=["colours", "16 bits", "no image"],
)
def test_what_is_no_mask_is_refused_with_its_name(content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=f"masks/a.png.*{words}"):
        masks.decode(content, "masks/a.png")


def test_a_cell_has_the_shares_of_its_pixels_classes_without_those_not_known() -> None:
    mask = torch.tensor(
        [
            [0, 0, 1, IGNORED],
            [0, 2, 1, IGNORED],
            [2, 2, IGNORED, IGNORED],
            [2, 2, IGNORED, IGNORED],
        ],
        dtype=torch.uint8,
    )
    assert masks.cell_shares(mask, 2, 3).tolist() == [[0.75, 0, 0.25], [0, 0.5, 0], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (13, 29), (5, 40)])
def test_cells_cover_every_pixel_once_whatever_the_image_s_shape(height: int, width: int) -> None:
    mask = torch.randint(0, 3, (height, width), dtype=torch.uint8)
    shares = masks.cell_shares(mask, 4, 3)
    assert shares.sum(1).tolist() == pytest.approx([1.0] * 16)
    single = masks.cell_shares(mask, 1, 3)[0]
    assert single.tolist() == pytest.approx([float((mask == label).float().mean()) for label in range(3)])


def test_a_folder_becomes_splits_whose_masks_are_as_drawn(tmp_path: Path) -> None:
    root = rendered_masks.write(tmp_path / "set", support=3, test=2, unlabelled=1)
    assert masked_folder.is_one(root)
    splits = masked_folder.pack(root, tmp_path / "splits")
    assert set(splits) == {"support", "test", "unlabelled"}
    index = archive.read_index(splits["support"] / archive.FILE_NAME)
    assert (index.masked, index.classes) == (True, rendered_masks.CLASSES)
    assert [image.name for image in index.images] == ["images/0.png", "images/1.png", "images/2.png"]
    for number, mask in enumerate(masks.stream(splits["support"])):
        drawn = np.array(Image.open(root / "masks" / f"{number}.png"))
        np.testing.assert_array_equal(mask.numpy(), drawn)
    shape = fewshot.shape_of(splits["support"], splits["unlabelled"], splits["test"])
    assert (shape.classes, shape.support, shape.smallest_class, shape.unlabelled, shape.test) == (
        3,
        3,
        3,
        1,
        2,
    )
    again = masked_folder.pack(root, tmp_path / "again")
    for name, folder in splits.items():
        assert (folder / archive.FILE_NAME).read_bytes() == (again[name] / archive.FILE_NAME).read_bytes()


def test_without_names_classes_are_numbered(tmp_path: Path) -> None:
    root = rendered_masks.write(tmp_path / "set")
    (root / "classes.txt").unlink()
    index = archive.read_index(masked_folder.pack(root, tmp_path / "splits")["test"] / archive.FILE_NAME)
    assert index.classes == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("masks/1.png", None, r"images/1.png has no counterpart in masks/"),
        ("images/1.png", None, r"masks/1.png has no counterpart in images/"),
        ("masks/0.png", rendered_masks.mask_png(np.zeros((9, 8), np.uint8)), "has 8 x 9 pixels, its image 64 x 64"),
        ("masks/0.png", rendered_masks.mask_png(np.full((64, 64), 3, np.uint8)), "value 3, which is none of the 3 cla"),
        ("classes.txt", b"ground\ndisc\nsquare\nsky\n", "no mask shows 'sky'"),
        ("classes.txt", b"ground\nDisc\ndisc\n", "names 'disc' 2 times"),
    ],
    ids=["no mask", "no image", "size", "value", "class never shown", "class twice"],
)  # fmt: skip
def test_a_folder_with_a_mistake_is_refused_with_the_file(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    root = rendered_masks.write(tmp_path / "set")
    (root / name).unlink()
    if content is not None:
        (root / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        masked_folder.pack(root, tmp_path / "out")
    assert caught.value.hint


def test_two_images_of_one_name_are_refused_and_capital_suffixes_taken(tmp_path: Path) -> None:
    root = rendered_masks.write(tmp_path / "set", support=3, test=0)
    (root / "masks" / "0.png").rename(root / "masks" / "0.PNG")
    index = archive.read_index(masked_folder.pack(root, tmp_path / "splits")["support"] / archive.FILE_NAME)
    assert len(index.images) == 3
    (root / "images" / "1.jpg").write_bytes((root / "images" / "1.png").read_bytes())
    with pytest.raises(DataError, match=r"images/1\.jpg and images/1\.png have the same name but for"):
        masked_folder.pack(root, tmp_path / "out")


def test_an_archive_without_masks_has_the_bytes_that_it_always_had(tmp_path: Path) -> None:
    image = archive.ArchivedImage("0.png", 1, "b/0.png")
    archive.write(tmp_path / "a.zip", archive.ArchiveIndex(("a", "b"), (image,)), [b"content"])
    assert b'{"file": "0.png", "label": 1, "name": "b/0.png"}' in (tmp_path / "a.zip").read_bytes()
    assert not archive.read_index(tmp_path / "a.zip").masked
