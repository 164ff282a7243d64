"""Every bad upload is answered with what is wrong, where, and how to mend it, and leaves nothing behind."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from PIL import Image

from app.datasets.tables import Dataset, DatasetImage
from app.wiring import Wiring

Files = dict[str, bytes]


@pytest.fixture(params=["sqlite"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path, sqlite_template: Path) -> str:
    """One database is enough here: nothing is ever written to it."""
    (tmp_path / "dram.db").write_bytes(sqlite_template.read_bytes())
    return f"sqlite:///{tmp_path / 'dram.db'}"


def picture(seed: int, size: tuple[int, int] = (40, 32), form: str = "JPEG", **options: Any) -> bytes:
    """A small image that differs for each seed."""
    image = Image.new("RGB", size, (seed * 37 % 256, seed * 91 % 256, seed * 153 % 256))
    image.putpixel((seed % size[0], 3), (255, 255, 255))
    encoded = io.BytesIO()
    image.save(encoded, form, **options)
    return encoded.getvalue()


def good(classes: int = 2, shots: int = 2) -> Files:
    return {
        f"class{label}/{shot}.jpg": picture(label * shots + shot)
        for label in range(classes)
        for shot in range(shots)
    }


def zipped(files: Files, method: int = zipfile.ZIP_STORED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


@dataclass
class Entry:
    """A zip entry that may lie: what is None is told truthfully."""

    name: bytes
    content: bytes = field(default_factory=lambda: picture(50))
    flags: int = 0x800
    mode: int = 0o100644
    size: int | None = None
    packed: int | None = None
    offset: int | None = None


def lying_zip(*entries: Entry) -> bytes:
    body, directory = b"", b""
    honest = [Entry(name.encode(), content) for name, content in good().items()]
    for entry in [*honest, *entries]:
        checksum, length = zlib.crc32(entry.content), len(entry.content)
        packed = length if entry.packed is None else entry.packed
        size = length if entry.size is None else entry.size
        offset = len(body) if entry.offset is None else entry.offset
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", 20, 20, entry.flags, 0, 0, 0, checksum, packed, size,
            len(entry.name), 0, 0, 0, 0, entry.mode << 16, offset,
        ) + entry.name  # fmt: skip
        if entry.offset is None:
            body += struct.pack(
                "<4s5H3L2H",
                b"PK\x03\x04",
                20,
                entry.flags,
                0,
                0,
                0,
                checksum,
                packed,
                size,
                len(entry.name),
                0,
            )
            body += entry.name + entry.content
    count = directory.count(b"PK\x01\x02")
    return (
        body
        + directory
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), len(body), 0)
    )


def quoted_overlap() -> bytes:
    """Two entries that unpack the same bytes: the second lies inside the first one's data."""
    inner_name = b"class1/inner.png"
    kernel = picture(9, form="PNG")
    header = struct.pack(
        "<4s5H3L2H", b"PK\x03\x04", 20, 0x800, 0, 0, 0, zlib.crc32(kernel), len(kernel), len(kernel), 16, 0
    )
    outer = Entry(b"class1/outer.png", header + inner_name + kernel)
    start = lying_zip(outer).index(outer.content)
    return lying_zip(outer, Entry(inner_name, kernel, offset=start))


def pixel_bomb() -> bytes:
    """A valid PNG header of 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">2I5B", 60_000, 60_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(2**20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animation(form: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green")]
    encoded = io.BytesIO()
    frames[0].save(encoded, form, save_all=True, append_images=frames[1:], duration=100)
    return encoded.getvalue()


def left_behind(wiring: Wiring) -> list[str]:
    """Rows of data sets, files of the blob store and temporary files."""
    with wiring.database.reading() as session:
        rows = [
            f"row {row}" for table in (Dataset, DatasetImage) for row in session.scalars(sa.select(table.id))
        ]
    return rows + [str(path) for path in sorted(wiring.settings.home.rglob("*")) if path.is_file()]


def folders_left(wiring: Wiring) -> list[Path]:
    root = wiring.settings.home / "tmp"
    return list(root.iterdir()) if root.exists() else []


def send(client: httpx.Client, archive: bytes) -> httpx.Response:
    return client.post("/v1/datasets", files={"archive": ("pets.zip", archive)})


def send_files(client: httpx.Client, files: Files) -> httpx.Response:
    return client.post("/v1/datasets", files=[("files", item) for item in files.items()])


def assert_problem(
    response: httpx.Response, status: int, code: str, pointer: str | None, mend: str, finding_code: str = ""
) -> None:
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["request_id"]
    told = problem["detail"]
    if pointer is not None:
        (finding,) = [
            entry
            for entry in problem["errors"]
            if (entry["pointer"], entry["code"]) == (pointer, finding_code or code)
        ]
        told = finding["detail"]
    assert mend in told


ARCHIVES: dict[str, tuple[Callable[[], bytes], int, str, str | None, str]] = {
    "a zip bomb": (
        lambda: zipped({**good(), "class0/bomb.jpg": bytes(20 * 2**20)}, zipfile.ZIP_DEFLATED),
        422, "zip_bomb", "/files/class0~1bomb.jpg", "Remove it.",
    ),
    "a bomb of many entries": (
        lambda: lying_zip(*(Entry(b"class0/%d.jpg" % number, b"x" * 30 * 2**20 if number < 0 else b"x",
                                  size=2**31 - 1, packed=2**25) for number in range(2))),
        422, "zip_bomb", "/archive", "Scale the images down",
    ),
    "entries that overlap by quoting": (
        quoted_overlap, 422, "zip_bomb", "/files/class1~1outer.png", "Zip the folder again",
    ),
    "two entries on the same bytes": (
        lambda: lying_zip(Entry(b"class0/0.jpg", picture(0), offset=0)),
        422, "zip_bomb", "/files/class0~10.jpg", "Zip the folder again",
    ),
    "a path that climbs out": (
        lambda: lying_zip(Entry(b"class0/../../evil.jpg")),
        422, "zip_path", "/files/class0~1..~1..~1evil.jpg", "Use plain paths",
    ),
    "a folder that climbs out": (
        lambda: lying_zip(Entry(b"../", b"")), 422, "zip_path", "/files/..~1", "Use plain paths",
    ),
    "an absolute path": (
        lambda: lying_zip(Entry(b"/etc/evil.jpg")), 422, "zip_path", "/files/~1etc~1evil.jpg", "relative to",
    ),
    "a drive": (
        lambda: lying_zip(Entry(b"C:/evil.jpg")), 422, "zip_path", "/files/C:~1evil.jpg", "relative to the data set",
    ),
    "backslashes": (
        lambda: lying_zip(Entry(b"class0\\evil.jpg")),
        422, "zip_path", "/files/class0\\evil.jpg", "Write folders with '/'",
    ),
    "a NUL in a name": (
        lambda: lying_zip(Entry(b"class0/a.jpg\0.png")),
        422, "zip_path", "/files/class0~1a.jpg?.png", "Rename it.",
    ),
    "control characters in a name": (
        lambda: lying_zip(Entry(b"class0/\x1b[31m.png")),
        422, "name_characters", "/files/class0~1?[31m.png", "Rename it.",
    ),
    "a name that is not UTF-8": (
        lambda: lying_zip(Entry(b"class0/\xff\xfe.jpg", flags=0)),
        422, "name_encoding", "/files/class0~1\ufffd\ufffd.jpg", "UTF-8 names",
    ),
    "a very long name": (
        lambda: lying_zip(Entry(b"class0/" + b"n" * 300 + b".jpg")),
        422, "name_too_long", "/files/class0~1" + "n" * 300 + ".jpg", "Rename it.",
    ),
    "the same path twice": (
        lambda: lying_zip(Entry(b"class0/0.jpg")), 422, "duplicate_name", "/files/class0~10.jpg", "Rename one",
    ),
    "a symbolic link": (
        lambda: lying_zip(Entry(b"class0/link.jpg", b"/etc/passwd", mode=0o120777)),
        422, "zip_link", "/files/class0~1link.jpg", "Put the image itself into the zip",
    ),
    "an encrypted entry": (
        lambda: lying_zip(Entry(b"class0/secret.jpg", flags=0x801)),
        422, "zip_encrypted", "/files/class0~1secret.jpg", "without a password",
    ),
    "a rare packing": (
        lambda: zipped({**good(), "class0/lzma.jpg": picture(60)}, zipfile.ZIP_LZMA),
        422, "zip_method", "/files/class0~1lzma.jpg", "deflate",
    ),
    "a zip inside": (
        lambda: zipped({**good(), "class0/more.zip": zipped(good())}),
        422, "zip_nested", "/files/class0~1more.zip", "Unpack it",
    ),
    "a zip inside under an image's name": (
        lambda: zipped({**good(), "class0/more.jpg": zipped(good())}),
        422, "zip_nested", "/files/class0~1more.jpg", "Unpack it",
    ),
    "10,001 members": (
        lambda: zipped({f"class{number % 2}/{number}.jpg": b"x" for number in range(10_001)}),
        422, "too_many_files", "/files", "Split it",
    ),
    "a directory of 40,000 entries": (
        lambda: zipped({f"class0/.{number}": b"" for number in range(40_000)}),
        422, "too_many_files", "/files", "Split it",
    ),
    "a zip cut off": (
        lambda: zipped(good())[:-100], 422, "zip_corrupt", "/archive", "send it whole",
    ),
    "a zip with a damaged directory": (
        lambda: zipped(good()).replace(b"PK\x01\x02", b"PK\x01\x00"),
        422, "zip_corrupt", "/archive", "Zip the folder again",
    ),
    "a directory that points nowhere": (
        lambda: lying_zip(Entry(b"class0/x.jpg", offset=10**6)),
        422, "zip_corrupt", "/files/class0~1x.jpg", "Zip the folder again",
    ),
    "no zip at all": (
        lambda: b"\x1f\x8b" + bytes(100), 415, "archive_format", None, "Only zip is accepted",
    ),
    "zero bytes": (lambda: b"", 422, "zip_corrupt", None, "Send a zip of class folders"),
    "an empty zip": (lambda: zipped({}), 422, "no_files", "/files", "Send one zip"),
    "one class": (
        lambda: zipped({f"washer/{shot}.jpg": picture(shot) for shot in range(3)}),
        422, "too_few_classes", "/classes", "in a folder of its own",
    ),
    "no class folders": (
        lambda: zipped({f"{shot}.jpg": picture(shot) for shot in range(3)}),
        422, "too_few_classes", "/classes", "in a folder of its own",
    ),
    "a class with one image": (
        lambda: zipped({**good(), "washer/1.jpg": picture(40)}),
        422, "too_few_shots", "/classes/washer", "Add some, or remove washer/",
    ),
    "1,000 classes": (
        lambda: zipped({f"class{label}/{shot}.jpg": b"x" for label in range(1000) for shot in range(2)}),
        422, "too_many_classes", "/classes", "Merge classes",
    ),
    "51 images in a class": (
        lambda: zipped({**good(), **{f"washer/{shot}.jpg": picture(10 + shot) for shot in range(51)}}),
        422, "too_many_shots", "/classes/washer", "move the rest to unlabelled/",
    ),
    "class names that differ in case": (
        lambda: zipped({**good(), "Class0/7.jpg": picture(40), "Class0/8.jpg": picture(41)}),
        422, "class_name_collision", "/classes/class0", "Give them one spelling",
    ),
    "class names that differ in spaces": (
        lambda: zipped({**good(), "class0 /7.jpg": picture(40)}),
        422, "class_name_collision", "/classes/class0 ", "Give them one spelling",
    ),
    "class names that differ in the encoding of accents": (
        lambda: zipped({**good(), "caf\u00e9/1.jpg": picture(40), "cafe\u0301/1.jpg": picture(41)}),
        422, "class_name_collision", "/classes/caf\u00e9", "Give them one spelling",
    ),
    "a class name of 101 characters": (
        lambda: zipped({**good(), **{"n" * 101 + f"/{shot}.jpg": picture(40 + shot) for shot in range(2)}}),
        422, "class_name", "/classes/" + "n" * 101, "Rename the folder",
    ),
    "a test class without images to learn from": (
        lambda: zipped({**good(), "test/washer/1.jpg": picture(40)}),
        422, "unknown_test_class", "/classes/washer", "remove test/washer/",
    ),
    "a folder beside train": (
        lambda: zipped({**{f"train/{name}": content for name, content in good().items()}, "val/a/9.jpg": picture(40)}),
        422, "unknown_split", "/files/val~1a~19.jpg", "Move it into one of the three",
    ),
    "the same image in two classes": (
        lambda: zipped({**good(), "class1/copy.jpg": picture(0)}),
        422, "duplicate_across_classes", "/files/class1~1copy.jpg", "Remove it from one of them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_is_refused_and_leaves_nothing(case: str, client: httpx.Client, wiring: Wiring) -> None:
    make, status, code, pointer, mend = ARCHIVES[case]
    before = left_behind(wiring)
    assert_problem(send(client, make()), status, code, pointer, mend)
    assert left_behind(wiring) == before
    assert folders_left(wiring) == []


IMAGES: dict[str, tuple[str, Callable[[], bytes], str, str]] = {
    "a truncated JPEG": ("bad.jpg", lambda: picture(70, (600, 400))[:-900], "image_corrupt", "Export it again"),
    "a truncated PNG": ("bad.png", lambda: picture(70, form="PNG")[:-60], "image_corrupt", "Export it again"),
    "noise behind a JPEG's first bytes": (
        "bad.jpg", lambda: b"\xff\xd8\xff\xe0" + os.urandom(500), "image_corrupt", "Export it again",
    ),
    "a pixel bomb": ("bad.png", pixel_bomb, "image_too_large", "it has 60000 x 60000 pixels; at most 40,000,000"),
    "zero bytes": ("bad.jpg", lambda: b"", "image_empty", "Export it again"),
    "a GIF named .jpg": ("bad.jpg", lambda: picture(70, form="GIF"), "image_format", "it is a GIF file"),
    "a TIFF named .jpg": ("bad.jpg", lambda: picture(70, form="TIFF"), "image_format", "it is a TIFF file"),
    "PostScript named .jpg": ("bad.jpg", lambda: b"%!PS-Adobe-3.0\n", "image_format", "Only JPEG, PNG and WebP"),
    "an SVG": ("bad.svg", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image_format", "convert it or"),
    "a text file": ("labels.csv", lambda: b"name,label\n", "image_format", "convert it or remove it"),
    "an animated WebP": ("bad.webp", lambda: animation("WEBP"), "image_animated", "Export one frame"),
    "an animated PNG": ("bad.png", lambda: animation("PNG"), "image_animated", "Export one frame"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMAGES)
def test_one_bad_image_is_reported_and_left_out(case: str, client: httpx.Client) -> None:
    name, make, code, mend = IMAGES[case]
    answer = send(client, zipped({**good(), f"class0/{name}": make()}))
    assert answer.status_code == 201, answer.text
    dataset = answer.json()
    assert dataset["splits"]["support"]["images"] == 4
    (warning,) = dataset["report"]["warnings"]
    assert (warning["code"], warning["pointer"]) == (code, f"/files/class0~1{name}")
    assert mend in warning["detail"]
    reported = dataset["report"]["classes"][0]
    assert reported["corrupt"] + reported["refused"] == 1


@pytest.mark.parametrize("case", IMAGES)
def test_a_class_left_with_too_few_is_named_together_with_the_bad_image(
    case: str, client: httpx.Client, wiring: Wiring
) -> None:
    name, make, code, mend = IMAGES[case]
    before = left_behind(wiring)
    answer = send(client, zipped({**good(), "washer/1.jpg": picture(40), f"washer/{name}": make()}))
    assert_problem(
        answer, 422, "too_few_shots", "/classes/washer",
        "has 1 usable image; at least 2 are needed without test images. Add some, or remove washer/.",
    )  # fmt: skip
    assert_problem(answer, 422, "too_few_shots", f"/files/washer~1{name}", mend, finding_code=code)
    assert left_behind(wiring) == before


def test_one_image_of_a_class_is_enough_where_there_are_test_images(client: httpx.Client) -> None:
    tests = {f"test/class{label}/0.jpg": picture(40 + label) for label in range(2)}
    answer = send(client, zipped({**good(shots=1), **tests}))
    assert answer.status_code == 201, answer.text
    assert (answer.json()["smallest_class"], answer.json()["report"]["verdict"]) == (1, "ok")
    unknown = send(client, zipped({**good(shots=1), "test/unknown/0.jpg": picture(40)})).json()["errors"]
    assert {finding["code"] for finding in unknown} >= {"too_few_shots", "unknown_test_class"}


def test_a_damaged_entry_costs_that_image_only(client: httpx.Client) -> None:
    content = picture(70, form="PNG")
    archive = zipped({**good(), "class0/damaged.png": content}).replace(content, content[:-1] + b"!")
    report = send(client, archive).json()["report"]
    assert [(entry["code"], entry["pointer"]) for entry in report["warnings"]] == [
        ("image_corrupt", "/files/class0~1damaged.png")
    ]


def test_everything_wrong_is_told_at_once(client: httpx.Client) -> None:
    answer = send(
        client,
        zipped(
            {
                "a/1.jpg": picture(1), "b/1.jpg": picture(2), "b/2.jpg": b"", "c/1.jpg": picture(3),
                "c/2.jpg": picture(4), "test/d/1.jpg": picture(5), "c/3.gif": picture(6, form="GIF"),
                "loose.jpg": picture(7),
            }
        ),
    )  # fmt: skip
    assert answer.status_code == 422
    assert answer.json()["code"] == "dataset_invalid"
    assert {(entry["code"], entry["pointer"]) for entry in answer.json()["errors"]} == {
        ("too_few_shots", "/classes/a"),
        ("too_few_shots", "/classes/b"),
        ("unknown_test_class", "/classes/d"),
        ("image_empty", "/files/b~12.jpg"),
        ("image_format", "/files/c~13.gif"),
        ("file_without_class", "/files/loose.jpg"),
        ("class_without_test_images", "/classes/a"),
        ("class_without_test_images", "/classes/b"),
        ("class_without_test_images", "/classes/c"),
    }


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "/etc/evil.jpg", "class0/../../evil.jpg", "class0//evil.jpg"]
)
def test_many_files_are_held_to_the_same_paths(name: str, client: httpx.Client, wiring: Wiring) -> None:
    before = left_behind(wiring)
    answer = send_files(client, {**good(), name: picture(9)})
    assert_problem(answer, 422, "zip_path", "/files/" + name.replace("/", "~1"), "path")
    assert left_behind(wiring) == before


def test_more_files_than_allowed_are_refused_one_by_one_too(
    client: httpx.Client, wiring: Wiring, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = send_files(client, {f"class{number % 2}/{number}.jpg": b"x" for number in range(10_001)})
    assert_problem(answer, 422, "too_many_files", "/files", "Split it")


def form(*parts: tuple[bytes, bytes], end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + head + b"\r\n\r\n" + body + b"\r\n" for head, body in parts) + end


FILE = b'Content-Disposition: form-data; name="files"; filename="%s"'
FORMS: dict[str, tuple[bytes, str, int, str, str | None, str]] = {
    "a form cut off": (form((FILE % b"a/1.jpg", b"x"), end=b""), "multipart/form-data; boundary=b",
                       400, "upload_incomplete", None, "send it again"),
    "a form without a boundary": (b"x", "multipart/form-data", 400, "multipart_malformed", None, "HTTP library"),
    "no form at all": (b"hello", "multipart/form-data; boundary=b", 400, "multipart_malformed", None, "HTTP library"),
    "a part without a name": (form((b"Content-Type: image/png", b"x")), "multipart/form-data; boundary=b",
                              400, "multipart_malformed", None, "HTTP library"),
    "a form without files": (form(), "multipart/form-data; boundary=b", 422, "no_files", "/files", "Send one zip"),
    "a file name that is not UTF-8": (
        form((FILE % b"a/\xff.jpg", b"x"), (FILE % b"a/1.jpg", b"x")), "multipart/form-data; boundary=b",
        422, "name_encoding", "/files/a~1\ufffd.jpg", "Rename it"),
    "an unknown field": (
        form((b'Content-Disposition: form-data; name="shots"', b"5"), (FILE % b"a/1.jpg", b"x")),
        "multipart/form-data; boundary=b", 422, "unknown_field", "/", "text fields are: name"),
    "an empty name": (
        form((b'Content-Disposition: form-data; name="name"', b" "), (FILE % b"a/1.jpg", b"x")),
        "multipart/form-data; boundary=b", 422, "name_invalid", "/name", "Give another"),
    "a text field of 1 MB": (
        form((b'Content-Disposition: form-data; name="name"', b"n" * 2**20)),
        "multipart/form-data; boundary=b", 400, "multipart_malformed", None, "text field"),
    "JSON": (b"{}", "application/json", 415, "unsupported_media_type", None, "Send multipart/form-data"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMS)
def test_a_malformed_body_is_refused_and_leaves_nothing(
    case: str, client: httpx.Client, wiring: Wiring
) -> None:
    body, content_type, status, code, pointer, mend = FORMS[case]
    before = left_behind(wiring)
    answer = client.post("/v1/datasets", content=body, headers={"Content-Type": content_type})
    assert_problem(answer, status, code, pointer, mend)
    assert left_behind(wiring) == before
    assert folders_left(wiring) == []
