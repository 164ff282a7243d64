"""Data sets over HTTP: what comes in, what is reported, what can be read again."""

from __future__ import annotations

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image

from app.datasets import service
from app.datasets.tables import Dataset, DatasetImage
from app.errors import NotFound
from app.security.principal import Principal
from app.wiring import Wiring
from models.data import archive

if TYPE_CHECKING:
    from tests.conftest import Gateway

Files = dict[str, bytes]
RED, GREEN, BLUE = (250, 10, 10), (10, 250, 10), (10, 10, 250)
#: What becomes of files and images is the same with either database.
ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def pixels(seed: int, size: tuple[int, int] = (40, 32)) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)


def picture(seed: int, size: tuple[int, int] = (40, 32), form: str = "JPEG", **options: Any) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels(seed, size)).save(encoded, form, **options)
    return encoded.getvalue()


def good(classes: int = 2, shots: int = 2) -> Files:
    return {
        f"class{label}/{shot}.jpg": picture(label * 50 + shot)
        for label in range(classes)
        for shot in range(shots)
    }


def zipped(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as target:
        for name, content in files.items():
            target.writestr(name, content)
    return packed.getvalue()


def send(client: httpx.Client, files: Files, **more: Any) -> httpx.Response:
    return client.post("/v1/datasets", files={"archive": ("pets.zip", zipped(files))}, **more)


def created(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def images(client: httpx.Client, dataset: dict[str, Any], **query: Any) -> list[dict[str, Any]]:
    page = client.get(f"/v1/datasets/{dataset['id']}/images", params={"limit": 100, **query}).json()
    assert page["has_more"] is False
    found: list[dict[str, Any]] = page["data"]
    return found


def decoded(client: httpx.Client, image: dict[str, Any]) -> Image.Image:
    answer = client.get(image["url"])
    assert answer.status_code == 200
    assert answer.headers["x-content-type-options"] == "nosniff"
    return Image.open(io.BytesIO(answer.content))


class TestAZip:
    def test_becomes_a_data_set(self, client: httpx.Client) -> None:
        answer = send(client, good(3, 4))
        dataset = created(answer)
        assert answer.headers["location"] == f"/v1/datasets/{dataset['id']}"
        assert dataset["id"].startswith("ds_")
        assert (dataset["object"], dataset["name"]) == ("dataset", "pets")
        assert dataset["classes"] == ["class0", "class1", "class2"]
        assert dataset["smallest_class"] == 4
        assert dataset["splits"]["support"]["images"] == 12
        assert set(dataset["splits"]) == {"support"}
        assert dataset["report"]["verdict"] == "ok"
        assert dataset["report"]["classes"][1] == {
            "name": "class1", "shots": 4, "test_images": 0,
            "corrupt": 0, "refused": 0, "duplicates": 0, "tiny": 0, "rotated": 0,
        }  # fmt: skip
        assert client.get(answer.headers["location"]).json() == dataset

    def test_may_come_as_the_whole_body(self, client: httpx.Client) -> None:
        answer = client.post(
            "/v1/datasets",
            params={"name": "raw"},
            content=zipped(good()),
            headers={"Content-Type": "application/zip"},
        )
        assert created(answer)["name"] == "raw"

    def test_has_test_and_unlabelled_splits(self, client: httpx.Client) -> None:
        test = {f"test/class{label}/9.jpg": picture(900 + label) for label in range(2)}
        unlabelled = {f"unlabelled/some/{number}.jpg": picture(800 + number) for number in range(3)}
        dataset = created(send(client, {**good(), **test, **unlabelled}))
        assert {name: split["images"] for name, split in dataset["splits"].items()} == {
            "support": 4, "test": 2, "unlabelled": 3,
        }  # fmt: skip
        assert [entry["test_images"] for entry in dataset["report"]["classes"]] == [1, 1]
        assert dataset["report"]["unlabelled"]["images"] == 3
        assert [(image["label"], image["name"]) for image in images(client, dataset, split="test")] == [
            ("class0", "class0/9.jpg"),
            ("class1", "class1/9.jpg"),
        ]
        assert {image["label"] for image in images(client, dataset, split="unlabelled")} == {None}

    @ONCE
    @pytest.mark.parametrize("prefix", ["pets/", "train/", "Pets/Train/", "a/b/"])
    def test_may_be_wrapped_in_folders(self, prefix: str, client: httpx.Client) -> None:
        plain = created(send(client, good()))
        wrapped = send(client, {prefix + name: content for name, content in good().items()})
        assert wrapped.status_code == 200, "the same content is the same data set"
        assert wrapped.json()["id"] == plain["id"]

    @ONCE
    def test_a_wrapper_may_hold_splits_and_a_readme(self, client: httpx.Client) -> None:
        files = {f"pets/{name}": content for name, content in good().items()}
        dataset = created(
            send(client, {**files, "pets/test/class0/9.jpg": picture(9), "pets/README.txt": b"hello"})
        )
        assert dataset["classes"] == ["class0", "class1"]
        assert dataset["splits"]["test"]["images"] == 1
        codes = {entry["code"] for entry in dataset["report"]["warnings"]}
        assert codes == {"file_without_class", "class_without_test_images"}

    @ONCE
    def test_litter_is_skipped_and_listed(self, client: httpx.Client) -> None:
        litter = [
            ".DS_Store",
            "__MACOSX/class0/._0.jpg",
            "class0/Thumbs.db",
            "class0/.ipynb_checkpoints/0.jpg",
        ]
        report = created(send(client, {**good(), **dict.fromkeys(litter, b"x")}))["report"]
        assert report["skipped"] == litter
        assert (report["skipped_count"], report["verdict"]) == (4, "ok")

    @ONCE
    def test_only_a_folder_named_like_a_class_with_images_of_its_own_is_a_class(
        self, client: httpx.Client
    ) -> None:
        answer = send(
            client,
            {f"washer/{shot}.jpg": picture(shot) for shot in range(2)} | {"washer/old/3.jpg": picture(3)},
        )
        assert (answer.status_code, answer.json()["code"]) == (422, "too_few_classes")
        assert "only the class 'washer'" in answer.json()["detail"]


class TestImagesWithoutLabels:
    def unlabelled(self, count: int) -> Files:
        return {f"unlabelled/{number:02}.jpg": picture(800 + number) for number in range(count)}

    def test_are_a_data_set_of_their_own(self, client: httpx.Client, wiring: Wiring, tmp_path: Path) -> None:
        dataset = created(send(client, self.unlabelled(10)))
        assert (dataset["classes"], dataset["smallest_class"]) == ([], 0)
        assert {name: split["images"] for name, split in dataset["splits"].items()} == {"unlabelled": 10}
        assert dataset["report"]["classes"] == []
        assert dataset["report"]["unlabelled"]["images"] == 10
        (warning,) = dataset["report"]["warnings"]
        assert warning["code"] == "no_labelled_images"
        assert "'fsbbt'" in warning["detail"]
        wiring.blobs.fetch(dataset["splits"]["unlabelled"]["digest"], tmp_path / "unlabelled")
        index = archive.read_index(tmp_path / "unlabelled")
        assert index.classes == ()
        assert {image.label for image in index.images} == {None}
        assert len(images(client, dataset)) == 10
        assert client.get("/v1/datasets").json()["data"][0]["smallest_class"] == 0

    def test_may_have_a_test_split_which_names_the_classes(
        self, client: httpx.Client, wiring: Wiring, tmp_path: Path
    ) -> None:
        test = {f"test/{name}/{number}.jpg": picture(seed * 9 + number)
                for seed, name in enumerate(["b", "a"]) for number in range(seed + 1)}  # fmt: skip
        leak = {"unlabelled/leak.jpg": test["test/a/0.jpg"]}
        dataset = created(send(client, {**self.unlabelled(12), **test, **leak}))
        assert (dataset["classes"], dataset["smallest_class"]) == (["a", "b"], 0)
        assert {name: split["images"] for name, split in dataset["splits"].items()} == {
            "unlabelled": 12, "test": 3,
        }  # fmt: skip
        counts = [(row["name"], row["shots"], row["test_images"]) for row in dataset["report"]["classes"]]
        assert counts == [("a", 0, 2), ("b", 0, 1)]
        codes = {entry["code"] for entry in dataset["report"]["warnings"]}
        assert codes == {"no_labelled_images", "duplicate_across_splits"}
        index = {}
        for split, entry in dataset["splits"].items():
            wiring.blobs.fetch(entry["digest"], tmp_path / split)
            index[split] = archive.read_index(tmp_path / split)
        assert (index["unlabelled"].classes, index["test"].classes) == ((), ("a", "b"))
        assert [image.label for image in index["test"].images] == [0, 0, 1]

    @ONCE
    def test_must_be_ten_that_can_be_used(self, client: httpx.Client) -> None:
        answer = send(client, {**self.unlabelled(9), "unlabelled/broken.jpg": b"\xff\xd8\xff no image"})
        assert (answer.status_code, answer.json()["code"]) == (422, "too_few_unlabelled")
        assert "unlabelled/ has 9 usable images; at least 10 are needed" in answer.json()["detail"]
        assert {entry["code"] for entry in answer.json()["errors"]} >= {"too_few_unlabelled", "image_corrupt"}

    @ONCE
    def test_beside_one_class_are_no_way_round_two_classes(self, client: httpx.Client) -> None:
        answer = send(client, {**self.unlabelled(12), "only/1.jpg": picture(1), "only/2.jpg": picture(2)})
        assert (answer.status_code, answer.json()["code"]) == (422, "too_few_classes")

    @ONCE
    def test_at_the_top_are_refused_with_a_word_on_where_they_belong(self, client: httpx.Client) -> None:
        answer = send(client, {f"{number}.jpg": picture(number) for number in range(12)})
        assert (answer.status_code, answer.json()["code"]) == (422, "too_few_classes")
        assert "Images without labels go to unlabelled/" in answer.json()["detail"]
        loose = [entry for entry in answer.json()["errors"] if entry["code"] == "file_without_class"]
        assert len(loose) == 12
        assert "Move it to CLASS/, or to unlabelled/ if it has no label." in loose[0]["detail"]

    @ONCE
    def test_of_a_test_split_alone_are_refused(self, client: httpx.Client) -> None:
        answer = send(client, {f"test/{name}/1.jpg": picture(seed) for seed, name in enumerate("ab")})
        assert answer.status_code == 422
        codes = {entry["code"] for entry in answer.json()["errors"]}
        assert codes == {"too_few_classes", "unknown_test_class"}

    @ONCE
    def test_may_be_wrapped_in_a_folder(self, client: httpx.Client) -> None:
        plain = created(send(client, self.unlabelled(10)))
        wrapped = send(client, {"set/" + name: content for name, content in self.unlabelled(10).items()})
        assert (wrapped.status_code, wrapped.json()["id"]) == (200, plain["id"])


class TestManyFiles:
    @ONCE
    def test_named_class_and_file_are_the_same_data_set_as_a_zip(self, client: httpx.Client) -> None:
        parts = [("files", item) for item in good().items()]
        by_files = created(client.post("/v1/datasets", files=parts, data={"name": "by hand"}))
        assert by_files["name"] == "by hand"
        assert send(client, good()).json()["id"] == by_files["id"]

    def test_may_carry_names_of_any_script(self, client: httpx.Client) -> None:
        parts = [
            (f"{name}/{shot}.jpg", picture(seed * 9 + shot))
            for seed, name in enumerate(["Ärzte", "猫"])
            for shot in (1, 2)
        ]
        dataset = created(client.post("/v1/datasets", files=[("files", part) for part in parts]))
        assert dataset["classes"] == ["Ärzte", "猫"]


@ONCE
class TestImages:
    def test_a_small_one_is_kept_to_the_pixel(self, client: httpx.Client) -> None:
        dataset = created(send(client, {**good(), "class0/exact.png": picture(77, form="PNG")}))
        (image,) = [image for image in images(client, dataset) if image["name"] == "class0/exact.png"]
        assert np.array_equal(np.asarray(decoded(client, image)), pixels(77))
        assert (image["width"], image["height"]) == (40, 32)

    def test_a_jpeg_is_what_pillow_decodes(self, client: httpx.Client) -> None:
        dataset = created(send(client, good()))
        first = images(client, dataset)[0]
        expected = Image.open(io.BytesIO(good()["class0/0.jpg"]))
        assert np.array_equal(np.asarray(decoded(client, first)), np.asarray(expected))

    @pytest.mark.parametrize("lossless", [True, False])
    def test_webp_is_accepted(self, lossless: bool, client: httpx.Client) -> None:
        content = picture(77, (300, 200), "WEBP", lossless=lossless)
        dataset = created(send(client, {**good(), "class0/w.webp": content}))
        (image,) = [image for image in images(client, dataset) if image["name"] == "class0/w.webp"]
        kept = decoded(client, image)
        assert kept.format == ("PNG" if lossless else "JPEG")
        if lossless:
            assert np.array_equal(np.asarray(kept), pixels(77, (300, 200)))

    def test_a_wrong_extension_is_reported_and_accepted(self, client: httpx.Client) -> None:
        report = created(send(client, {**good(), "class0/really.png": picture(77)}))["report"]
        assert report["classes"][0]["shots"] == 3
        assert [(entry["code"], entry["pointer"]) for entry in report["warnings"]] == [
            ("image_extension", "/files/class0~1really.png")
        ]

    def test_exif_rotation_is_applied_and_metadata_dropped(self, client: httpx.Client) -> None:
        upright = Image.new("RGB", (80, 40), RED)
        upright.paste(GREEN, (40, 0, 80, 40))
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held on its side: turn by 90 degrees clockwise to see it upright
        exif[0x010E] = "a secret place"
        encoded = io.BytesIO()
        upright.transpose(Image.Transpose.ROTATE_90).save(encoded, "JPEG", exif=exif, quality=95)
        assert b"a secret place" in encoded.getvalue()
        dataset = created(send(client, {**good(), "class0/turned.jpg": encoded.getvalue()}))
        assert dataset["report"]["classes"][0]["rotated"] == 1
        (image,) = [image for image in images(client, dataset) if image["name"] == "class0/turned.jpg"]
        content = client.get(image["url"]).content
        assert b"secret" not in content
        kept = Image.open(io.BytesIO(content))
        assert kept.size == (80, 40)
        assert not kept.getexif()
        assert np.abs(np.array(kept.getpixel((10, 20))) - RED).max() < 20
        assert np.abs(np.array(kept.getpixel((70, 20))) - GREEN).max() < 20

    def test_large_ones_are_scaled_down(self, client: httpx.Client) -> None:
        large = Image.new("RGB", (3000, 1500), BLUE)
        encoded = io.BytesIO()
        large.save(encoded, "JPEG")
        dataset = created(send(client, {**good(), "class0/large.jpg": encoded.getvalue()}))
        (image,) = [image for image in images(client, dataset) if image["name"] == "class0/large.jpg"]
        kept = decoded(client, image)
        assert (kept.size, kept.format) == ((1024, 512), "JPEG")
        assert np.abs(np.array(kept.getpixel((500, 200))) - BLUE).max() < 10

    def test_tiny_ones_are_reported_and_kept(self, client: httpx.Client) -> None:
        report = created(send(client, {**good(), "class0/tiny.png": picture(77, (31, 40), "PNG")}))["report"]
        assert (report["classes"][0]["tiny"], report["classes"][0]["shots"]) == (1, 3)
        assert [entry["code"] for entry in report["warnings"]] == ["image_tiny"]

    def test_transparency_lies_over_white_and_deep_grey_is_scaled(self, client: httpx.Client) -> None:
        clear, deep = io.BytesIO(), io.BytesIO()
        Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(clear, "PNG")
        Image.fromarray(np.full((40, 40), 0x8000, np.uint16)).save(deep, "PNG")
        dataset = created(
            send(client, {**good(), "class0/clear.png": clear.getvalue(), "class0/deep.png": deep.getvalue()})
        )
        found = {image["name"]: image for image in images(client, dataset)}
        assert decoded(client, found["class0/clear.png"]).getpixel((5, 5)) == (255, 255, 255)
        assert decoded(client, found["class0/deep.png"]).getpixel((5, 5)) == (128, 128, 128)


@ONCE
class TestDuplicates:
    def test_within_a_class_one_is_dropped(self, client: httpx.Client) -> None:
        dataset = created(send(client, {**good(), "class0/again.jpg": good()["class0/0.jpg"]}))
        assert dataset["splits"]["support"]["images"] == 4
        assert dataset["report"]["classes"][0]["duplicates"] == 1
        (warning,) = dataset["report"]["warnings"]
        assert (warning["code"], warning["pointer"]) == ("duplicate_image", "/files/class0~1again.jpg")
        assert "class0/0.jpg" in warning["detail"]

    def test_across_train_and_test_the_test_image_is_dropped_and_named(self, client: httpx.Client) -> None:
        leak = {
            "test/class0/leak.jpg": good()["class0/0.jpg"],
            "test/class0/1.jpg": picture(700),
            "test/class1/1.jpg": picture(701),
        }
        dataset = created(send(client, {**good(), **leak}))
        assert dataset["splits"]["test"]["images"] == 2
        (warning,) = dataset["report"]["warnings"]
        assert (warning["code"], warning["pointer"]) == (
            "duplicate_across_splits",
            "/files/test~1class0~1leak.jpg",
        )
        assert "class0/0.jpg" in warning["detail"]
        assert "left out of the test split" in warning["detail"]

    def test_of_a_test_image_among_the_unlabelled_ones_is_dropped_there(self, client: httpx.Client) -> None:
        more = {
            "test/class0/1.jpg": picture(700),
            "test/class1/1.jpg": picture(701),
            "unlabelled/u.jpg": picture(700),
        }
        dataset = created(send(client, {**good(), **more, "unlabelled/v.jpg": picture(702)}))
        assert {name: split["images"] for name, split in dataset["splits"].items()} == {
            "support": 4, "test": 2, "unlabelled": 1,
        }  # fmt: skip
        assert dataset["report"]["warnings"][0]["code"] == "duplicate_across_splits"


class TestTheSameContent:
    def test_is_the_same_data_set(self, client: httpx.Client, wiring: Wiring) -> None:
        first = created(send(client, good()))
        again = send(client, good(), params={"name": "another name"})
        assert again.status_code == 200
        assert again.json() == first
        assert again.headers["location"] == f"/v1/datasets/{first['id']}"
        with wiring.database.reading() as session:
            assert session.scalar(sa.select(sa.func.count()).select_from(Dataset)) == 1
            assert session.scalar(sa.select(sa.func.count()).select_from(DatasetImage)) == 4

    def test_sent_eight_times_at_once_is_one_data_set(self, gateway: Gateway, wiring: Wiring) -> None:
        def post(_: int) -> httpx.Response:
            with gateway.client(gateway.key) as client:
                return send(client, good())

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(post, range(8)))
        assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
        assert len({answer.json()["id"] for answer in answers}) == 1
        with wiring.database.reading() as session:
            assert session.scalar(sa.select(sa.func.count()).select_from(DatasetImage)) == 4

    def test_of_another_tenant_is_another_data_set(self, gateway: Gateway, client: httpx.Client) -> None:
        mine = created(send(client, good()))
        with gateway.client(gateway.key_of("other", "datasets:read", "datasets:write")) as other:
            theirs = created(send(other, good()))
            assert theirs["id"] != mine["id"]
            assert [dataset["id"] for dataset in other.get("/v1/datasets").json()["data"]] == [theirs["id"]]
            for path in (f"/v1/datasets/{mine['id']}", images(client, mine)[0]["url"]):
                assert other.get(path).status_code == 404
            assert other.delete(f"/v1/datasets/{mine['id']}").status_code == 404
        assert client.get(f"/v1/datasets/{mine['id']}").status_code == 200

    def test_after_deletion_is_a_new_one(self, client: httpx.Client) -> None:
        first = created(send(client, good()))
        assert client.delete(f"/v1/datasets/{first['id']}").status_code == 204
        gone = client.get(f"/v1/datasets/{first['id']}")
        assert (gone.status_code, gone.json()["code"]) == (404, "dataset_not_found")
        assert client.get("/v1/datasets").json()["data"] == []
        assert created(send(client, good()))["id"] != first["id"]


def test_lists_are_paged(client: httpx.Client) -> None:
    ids = [created(send(client, good(2, 2 + extra)))["id"] for extra in range(3)]
    first = client.get("/v1/datasets", params={"limit": 2}).json()
    assert ([entry["id"] for entry in first["data"]], first["has_more"]) == ([ids[2], ids[1]], True)
    rest = client.get("/v1/datasets", params={"limit": 2, "after": ids[1]}).json()
    assert ([entry["id"] for entry in rest["data"]], rest["has_more"]) == ([ids[0]], False)
    url = f"/v1/datasets/{ids[2]}/images"
    names: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = client.get(url, params={"limit": 3, **after}).json()
        names += [image["name"] for image in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["data"][-1]["id"]}
    assert names == [f"class{label}/{shot}.jpg" for label in range(2) for shot in range(4)]


def test_unknown_ids_are_told_apart(client: httpx.Client) -> None:
    dataset = created(send(client, good()))
    answer = client.get(f"/v1/datasets/{dataset['id']}/images/img_none")
    assert (answer.status_code, answer.json()["code"]) == (404, "image_not_found")
    assert client.get("/v1/datasets/ds_none/images").json()["code"] == "dataset_not_found"
    other = created(send(client, good(2, 3)))
    foreign = images(client, other)[0]["id"]
    assert client.get(f"/v1/datasets/{dataset['id']}/images/{foreign}").status_code == 404


def test_scopes_are_asked_for(gateway: Gateway, client: httpx.Client) -> None:
    created(send(client, good()))
    with gateway.client(gateway.key_of("default", "datasets:read")) as reader:
        assert len(reader.get("/v1/datasets").json()["data"]) == 1
        assert send(reader, good()).status_code == 403
    with gateway.client(gateway.key_of("default", "jobs:read")) as stranger:
        assert stranger.get("/v1/datasets").status_code == 403


def test_the_stored_archives_are_what_stages_read(
    client: httpx.Client, wiring: Wiring, tmp_path: Path
) -> None:
    dataset = created(send(client, {**good(), "unlabelled/1.jpg": picture(800)}))
    index = {}
    for split, entry in dataset["splits"].items():
        wiring.blobs.fetch(entry["digest"], tmp_path / split)
        index[split] = archive.read_index(tmp_path / split)
        assert (tmp_path / split).stat().st_size == entry["bytes"]
    assert index["support"].classes == index["unlabelled"].classes == ("class0", "class1")
    assert [(image.label, image.name) for image in index["support"].images] == [
        (0, "class0/0.jpg"), (0, "class0/1.jpg"), (1, "class1/0.jpg"), (1, "class1/1.jpg"),
    ]  # fmt: skip
    assert [image.label for image in index["unlabelled"].images] == [None]


def test_the_service_gives_jobs_a_data_set_of_their_tenant_only(client: httpx.Client, wiring: Wiring) -> None:
    dataset = created(send(client, good()))
    with wiring.database.reading() as session:
        found = service.get(session, Principal("default", frozenset()), dataset["id"])
        assert found.smallest_class == 2
        with pytest.raises(NotFound) as refused:
            service.get(session, Principal("other", frozenset()), dataset["id"])
    assert refused.value.code == "dataset_not_found"
