"""Images with masks over HTTP: what is kept, and what is said of those that cannot be used."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests import rendered_masks
from tests.rendered_masks import IGNORED, mask_png, png, zipped

if TYPE_CHECKING:
    from tests.conftest import Gateway

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

Files = dict[str, bytes]


def good(**counts: int) -> Files:
    return dict(rendered_masks.files(**{"support": 3, "test": 2, "unlabelled": 1, **counts}))


def send(client: httpx.Client, files: Files) -> httpx.Response:
    return client.post("/v1/datasets", files={"archive": ("scenes.zip", zipped(files))})


def created(client: httpx.Client, files: Files) -> dict[str, Any]:
    answer = send(client, files)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def refused(client: httpx.Client, files: Files) -> dict[str, str]:
    """What is found first, by pointer."""
    answer = send(client, files)
    assert answer.status_code == 422, answer.text
    return {finding["pointer"]: finding["detail"] for finding in reversed(answer.json()["errors"])}


def values_of(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)))


def listed(client: httpx.Client, dataset: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    page = client.get(f"/v1/datasets/{dataset['id']}/images", params={"limit": 100}).json()
    return {(image["split"], image["name"]): image for image in page["data"]}


def flat(value: int, side: int = 40) -> np.ndarray:
    return np.full((side, side), value, np.uint8)


def noise(seed: int, side: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    return png(Image.fromarray(pixels))


def halves(low: int, high: int, side: int = 40) -> np.ndarray:
    mask = flat(low, side)
    mask[side // 2 :] = high
    return mask


def pairs(*masks: bytes) -> Files:
    """An image of noise for each mask."""
    files = {f"images/{number}.png": noise(number) for number in range(len(masks))}
    return files | {f"masks/{number}.png": content for number, content in enumerate(masks)}


def test_images_with_masks_become_a_data_set_of_their_own_kind(client: httpx.Client) -> None:
    files = good()
    dataset = created(client, files)
    assert dataset["task"] == "segmentation"
    assert dataset["classes"] == list(rendered_masks.CLASSES)
    assert {name: split["images"] for name, split in dataset["splits"].items()} == {
        "support": 3, "test": 2, "unlabelled": 1,
    }  # fmt: skip
    assert dataset["smallest_class"] == 3
    assert [(row["name"], row["shots"], row["test_images"]) for row in dataset["report"]["classes"]] == [
        ("ground", 3, 2), ("disc", 3, 2), ("square", 3, 2),
    ]  # fmt: skip
    found = listed(client, dataset)
    assert found["unlabelled", "0.png"]["mask_url"] is None
    for number in range(3):
        kept = client.get(found["support", f"images/{number}.png"]["mask_url"])
        assert kept.headers["content-type"] == "image/png"
        image = Image.open(io.BytesIO(kept.content))
        assert image.mode == "L"
        np.testing.assert_array_equal(np.array(image), values_of(files[f"masks/{number}.png"]))
    assert send(client, files).status_code == 200  # the same content is the same data set


def test_an_image_without_a_mask_says_so(client: httpx.Client) -> None:
    dataset = created(client, good())
    url = listed(client, dataset)["unlabelled", "0.png"]["url"]
    answer = client.get(f"{url}/mask")
    assert (answer.status_code, answer.json()["code"]) == (404, "mask_not_found")


def test_a_folder_around_all_and_a_train_folder_are_fine(client: httpx.Client) -> None:
    plain = created(client, good(unlabelled=0))
    for below in ("set/", "set/train/", "train/"):
        moved = {
            (below if not name.startswith("test/") else below.removesuffix("train/")) + name: content
            for name, content in good(unlabelled=0).items()
        }
        answer = send(client, moved)
        assert answer.status_code == 200, (below, answer.text)
        assert answer.json()["id"] == plain["id"]


def test_a_large_image_and_its_mask_are_scaled_down_alike(client: httpx.Client) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (700, 2101, 3), np.uint8)
    mask = np.zeros((700, 2101), np.uint8)
    mask[:, 1000:] = 1
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG")
    files = pairs(mask_png(halves(0, 1))) | {
        "images/wide.jpg": encoded.getvalue(),
        "masks/wide.png": mask_png(mask),
    }
    image = listed(client, created(client, files))["support", "images/wide.jpg"]
    kept = values_of(client.get(image["mask_url"]).content)
    assert kept.shape == (image["height"], image["width"])
    assert image["width"] == 1024
    assert set(np.unique(kept)) == {0, 1}
    assert abs(int((kept[0] == 0).sum()) - 1000 * 1024 / 2101) <= 1


@pytest.mark.parametrize("bits", [1, 2, 4], ids=["1 bit", "2 bits", "4 bits"])
def test_values_are_those_of_the_file_however_many_bits_they_have(client: httpx.Client, bits: int) -> None:
    values = halves(0, 1)
    made = rendered_masks.grey_png(values.tolist(), bits)
    dataset = created(client, pairs(made, mask_png(halves(1, 0))))
    image = listed(client, dataset)["support", "images/0.png"]
    np.testing.assert_array_equal(values_of(client.get(image["mask_url"]).content), values)
    assert dataset["classes"] == ["class 0", "class 1"]


def changed(client: httpx.Client, **files: bytes | None) -> dict[str, str]:
    """What is found where these files of a good data set are others, or not there; '__' stands for '/'."""
    kept = {
        **good(),
        **{name.replace("__", "/").replace("_", "."): content for name, content in files.items()},
    }
    return refused(client, {name: content for name, content in kept.items() if content is not None})


def test_a_missing_mask_or_image_is_named(client: httpx.Client) -> None:
    found = changed(client, masks__1_png=None, test__images__0_png=None)
    assert found == {
        "/files/images~11.png": "images/1.png has no mask. Add masks/1.png, or move the image to unlabelled/.",
        "/files/test~1masks~10.png": "test/masks/0.png is the mask of no image. Add test/images/0.jpg (or .png, "
        ".webp), or remove it.",
    }


def test_two_images_of_one_mask_are_refused(client: httpx.Client) -> None:
    found = changed(client, images__1_jpg=noise(9))
    assert "the same name but for the suffix" in found["/files/images~11.jpg"]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (mask_png(flat(0, 30)), "it has 30 x 30 pixels, and its image 64 x 64. Make the mask of the image as it is"),
        (png(Image.new("RGB", (64, 64))), "its pixels have colours (RGB), and a mask has one channel"),
        (png(Image.new("RGBA", (64, 64))), "its pixels have colours (RGBA)"),
        (png(Image.fromarray(np.zeros((64, 64), np.uint16))), "its pixels have 16 bits"),
        (mask_png(halves(0, 7, 64)), "it has the value 7, and classes.txt names 3 classes, which are 0 to 2; 255"),
        (b"\x89PNG\r\n\x1a\nbroken", "it cannot be decoded"),
        (b"\xff\xd8\xff no png", "it is a JPEG file. Save masks as PNG"),
        (b"", "it is empty"),
    ],
    ids=["size", "colours", "transparent", "16 bits", "value", "broken", "no png", "empty"],
)  # fmt: skip
def test_a_mask_that_cannot_be_used_refuses_the_upload(client: httpx.Client, mask: bytes, words: str) -> None:
    found = changed(client, masks__0_png=mask)
    assert list(found) == ["/files/masks~10.png"]
    assert found["/files/masks~10.png"].startswith(f"masks/0.png: {words}")


def test_one_image_with_a_mask_is_enough_where_others_test(client: httpx.Client) -> None:
    test = {"test/images/0.png": noise(9), "test/masks/0.png": mask_png(halves(1, 0))}
    dataset = created(client, pairs(mask_png(halves(0, 1))) | test)
    assert {name: split["images"] for name, split in dataset["splits"].items()} == {"support": 1, "test": 1}


def test_a_mask_of_the_image_before_it_was_turned_is_told_so(client: httpx.Client) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = io.BytesIO()
    Image.new("RGB", (60, 40), "teal").save(encoded, "JPEG", exif=exif)
    files = {
        **good(),
        "images/turned.jpg": encoded.getvalue(),
        "masks/turned.png": mask_png(np.zeros((40, 60), np.uint8)),
    }
    assert "turn the mask alike" in refused(client, files)["/files/masks~1turned.png"]


@pytest.mark.parametrize(
    ("files", "pointer", "words"),
    [
        (pairs(mask_png(flat(IGNORED)), mask_png(flat(IGNORED))), "/classes", "The masks show no class"),
        (pairs(mask_png(halves(0, IGNORED)), mask_png(flat(0))), "/classes", "where it means an object, write 1"),
        (pairs(mask_png(halves(0, 1))), "/files", "The upload has 1 usable image with a mask; at least 2"),
        (pairs(mask_png(halves(0, 38)), mask_png(halves(0, 75))), "/files", "the values 0, 38, 75. Without"),
        ({f"images/{number}.png": noise(number) for number in range(3)}, "/files", "Nothing lies in masks/."),
        ({f"masks/{number}.png": mask_png(halves(0, 1)) for number in range(3)}, "/files", "Nothing lies in images/."),
        ({**good(test=0), "test/images/0.png": noise(99), "test/masks/0.png": mask_png(flat(IGNORED))}, "/files",
         "The masks in test/masks/ show no class"),
        ({**good(), "classes.txt": b"a\nb\nc\nsky\n"}, "/classes/sky", "Class 'sky' (value 3) is in no mask"),
        ({**good(), "classes.txt": b"a\nb\na\n"}, "/files/classes.txt", "classes.txt names 'a' 2 times"),
        ({**good(), "classes.txt": b"a\n\nc\n"}, "/files/classes.txt", "line 2 of classes.txt is no name"),
        ({**good(), "classes.txt": b"\n"}, "/files/classes.txt", "classes.txt has 0 names"),
        ({**good(), "classes.txt": b"a\xff\nb\nc"}, "/files/classes.txt", "classes.txt is not UTF-8"),
        ({**good(), "classes.txt": b"a\n" * 60_000}, "/files/classes.txt", "classes.txt: it has 120,000 bytes, and"),
    ],
    ids=["no class", "one class", "one image", "gaps", "no masks", "no images", "empty test",
         "class never shown", "class twice", "empty line", "no names", "not utf-8", "long list"],
)  # fmt: skip
def test_what_cannot_be_learnt_is_said_with_the_way_out(
    client: httpx.Client, files: Files, pointer: str, words: str
) -> None:
    assert words in refused(client, files)[pointer]


def test_limits_count_images_and_not_their_masks(
    gateway_with: Callable[..., AbstractContextManager[Gateway]],
) -> None:
    """6 images, and 1 to learn from for each of 3 classes."""
    with gateway_with(max_images=6, max_shots=1) as gateway, gateway.client(gateway.key) as client:
        created(client, good(support=3, test=2, unlabelled=1))
        too_many = refused(client, good(support=3, test=3, unlabelled=1))["/files"]
        assert "more than 6 images" in too_many
        misnamed = {name.replace("masks/", "masks/of_"): content for name, content in good(support=4).items()}
        assert "/files/images~10.png" in refused(client, misnamed)
        detail = refused(client, good(support=4, test=1, unlabelled=0))["/files"]
    assert (
        "4 usable images with masks to learn from; at most 3 are possible, 1 for each of 3 classes" in detail
    )
    assert "unlabelled/" in detail


def test_of_values_with_gaps_it_is_said_once(client: httpx.Client) -> None:
    found = refused(client, pairs(mask_png(halves(0, 38)), mask_png(halves(0, 75))))
    assert list(found) == ["/files"]


def test_a_mask_that_cannot_be_read_makes_no_gap(client: httpx.Client) -> None:
    found = refused(client, pairs(mask_png(halves(0, 2)), png(Image.new("RGB", (40, 40)))))
    assert list(found) == ["/files/masks~11.png"]


def test_accents_match_however_they_are_encoded(client: httpx.Client) -> None:
    files = pairs(mask_png(halves(0, 1)), mask_png(halves(1, 0)))
    files["images/caf\u00e9.png"] = noise(9)
    files["masks/cafe\u0301.png"] = mask_png(halves(0, 1))
    assert ("support", "images/caf\u00e9.png") in listed(client, created(client, files))


def test_nobody_elses_mask_is_shown(client: httpx.Client, gateway: Gateway) -> None:
    url = listed(client, created(client, good()))["support", "images/0.png"]["mask_url"]
    with gateway.client(gateway.key_of("other", "datasets:read")) as stranger:
        assert stranger.get(url).status_code == 404
    with gateway.client(gateway.key_of("default", "students:read")) as other_scope:
        assert other_scope.get(url).status_code == 403
    with gateway.client(None) as nobody:
        assert nobody.get(url).status_code == 401
    assert client.get(url).status_code == 200


def test_one_image_with_two_masks_that_differ_is_a_contradiction(client: httpx.Client) -> None:
    files = pairs(mask_png(halves(0, 1)), mask_png(halves(1, 0)), mask_png(halves(0, 1)))
    same = {**files, "images/2.png": files["images/0.png"]}
    dataset = created(client, same)
    assert dataset["splits"]["support"]["images"] == 2
    files["images/1.png"] = files["images/0.png"]
    assert "the same image with two masks that differ" in refused(client, files)["/files/images~11.png"]


def test_a_broken_image_is_left_out_with_its_mask_and_so_is_what_lies_elsewhere(client: httpx.Client) -> None:
    files = {
        **good(),
        "images/0.png": b"\x89PNG\r\n\x1a\nbroken",
        "notes.txt": b"by hand",
        "masks/0.png": b"?",
    }
    dataset = created(client, files)
    assert dataset["splits"]["support"]["images"] == 2
    assert {warning["code"] for warning in dataset["report"]["warnings"]} == {
        "image_corrupt",
        "file_beside_masks",
    }


def test_a_class_that_no_test_mask_shows_is_told(client: httpx.Client) -> None:
    files = {**good(test=0), "test/images/0.png": noise(99), "test/masks/0.png": mask_png(halves(0, 1))}
    warnings = created(client, files)["report"]["warnings"]
    assert [(warning["code"], warning["pointer"]) for warning in warnings] == [
        ("class_without_test_images", "/classes/square")
    ]
