from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from models.data import images
from models.errors import DataError


def encoded(array: np.ndarray, form: str = "PNG", **options: object) -> bytes:  # type: ignore[type-arg]
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def test_decoding_gives_rgb_planes() -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(images.decode(encoded(array)).numpy(), array.transpose(2, 0, 1))


def test_grey_and_transparent_images_become_rgb() -> None:
    grey = np.full((4, 4), 90, np.uint8)
    assert images.decode(encoded(grey)).unique().tolist() == [90]
    assert images.decode(encoded(np.zeros((4, 4, 4), np.uint8))).shape == (3, 4, 4)


def test_an_image_is_turned_upright() -> None:
    array = np.zeros((2, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert images.decode(encoded(array, "JPEG", exif=exif)).shape == (3, 6, 2)


def test_what_is_no_image_is_named() -> None:
    with pytest.raises(DataError, match=r"cat/1\.png cannot be decoded"):
        images.decode(b"not an image", "cat/1.png")
    with pytest.raises(DataError, match="cannot be decoded"):
        images.decode(encoded(np.zeros((64, 64, 3), np.uint8))[:60])


def test_resizing_agrees_with_pillow_s_antialiased_bilinear_filter() -> None:
    array = np.random.default_rng(1).integers(0, 256, (75, 100, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(array).resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    resized = images.resize(torch.from_numpy(array).permute(2, 0, 1)[None], 32)[0]
    assert np.abs(resized.permute(1, 2, 0).numpy() * 255 - expected).max() < 1.01  # Pillow rounds twice


def test_an_image_of_the_right_size_is_left_alone() -> None:
    array = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(images.to_pixels(images.resize(array, 32)), array)


def test_normalising_uses_each_colour_s_mean_and_deviation() -> None:
    means = torch.tensor(images.MEAN).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    one_off = means + torch.tensor(images.STD).view(1, 3, 1, 1)
    assert torch.allclose(images.normalise(means), torch.zeros(1, 3, 2, 2))
    assert torch.allclose(images.normalise(one_off), torch.ones(1, 3, 2, 2), atol=1e-6)
