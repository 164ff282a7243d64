"""Files of a student: whole, in parts, not twice, and never silently damaged."""

from __future__ import annotations

import base64
import hashlib

import httpx
import pytest

from app.wiring import Wiring

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def bundle(client: httpx.Client, student: str, **headers: str) -> httpx.Response:
    return client.get(f"/v1/students/{student}/bundle.zip", headers=headers)


def test_a_download_names_its_digest_and_its_file(
    client: httpx.Client, student: str, student_files: dict[str, bytes]
) -> None:
    answer = bundle(client, student)
    digest = hashlib.sha256(student_files["bundle.zip"])
    encoded = base64.b64encode(digest.digest()).decode()
    assert answer.content == student_files["bundle.zip"]
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["etag"] == f'"{digest.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{encoded}:"
    assert answer.headers["digest"] == f"sha-256={encoded}"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-length"] == str(len(student_files["bundle.zip"]))
    assert answer.headers["content-disposition"] == f'attachment; filename="{student}.bundle.zip"'
    assert answer.headers["cache-control"] == "private, no-cache"


def test_head_tells_the_same_without_the_content(client: httpx.Client, student: str) -> None:
    whole = bundle(client, student)
    head = client.head(f"/v1/students/{student}/bundle.zip")
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "content-length", "repr-digest", "content-disposition", "content-type"):
        assert head.headers[name] == whole.headers[name]


@pytest.mark.parametrize("form", ['"{0}"', 'W/"{0}"', '"other", "{0}"', "*"])
def test_what_the_client_has_is_not_sent_again(
    client: httpx.Client, student: str, form: str, student_files: dict[str, bytes]
) -> None:
    digest = hashlib.sha256(student_files["bundle.zip"]).hexdigest()
    answer = bundle(client, student, **{"If-None-Match": form.format(digest)})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == f'"{digest}"'
    assert bundle(client, student, **{"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=1000-1999", 1000, 2000),
        ("bytes=1023990-", 1_023_990, 1_024_000),
        ("bytes=-10", 1_023_990, 1_024_000),
        ("bytes=5-99999999", 5, 1_024_000),
        ("bytes=-99999999", 0, 1_024_000),
    ],
)
def test_a_part_is_sent_when_asked_for(
    client: httpx.Client, student: str, asked: str, start: int, end: int, student_files: dict[str, bytes]
) -> None:
    content = student_files["bundle.zip"]
    answer = bundle(client, student, Range=asked)
    assert answer.status_code == 206
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(content)}"
    assert answer.content == content[start:end]
    assert answer.headers["repr-digest"] == bundle(client, student).headers["repr-digest"]


@pytest.mark.parametrize("asked", ["bytes=1024000-", "bytes=9999999-99999999", "bytes=-0"])
def test_a_part_that_is_not_there_is_416(client: httpx.Client, student: str, asked: str) -> None:
    answer = bundle(client, student, Range=asked)
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == "bytes */1024000"


@pytest.mark.parametrize(
    "asked",
    ["bytes=0-1,5-6", "lines=1-2", "bytes=5-2", "bytes=-", "bytes=a-b", "bytes=" + ",".join(["0-"] * 5000)],
)
def test_a_range_that_is_not_understood_gives_the_whole(
    client: httpx.Client, student: str, asked: str, student_files: dict[str, bytes]
) -> None:
    answer = bundle(client, student, Range=asked)
    assert (answer.status_code, answer.content) == (200, student_files["bundle.zip"])


def test_a_download_goes_on_only_if_the_file_is_still_the_same(client: httpx.Client, student: str) -> None:
    tag = bundle(client, student).headers["etag"]
    assert bundle(client, student, **{"Range": "bytes=5-", "If-Range": tag}).status_code == 206
    assert bundle(client, student, **{"Range": "bytes=5-", "If-Range": '"old"'}).status_code == 200


def test_a_precision_that_was_not_made_says_how_to_get_it(client: httpx.Client, student: str) -> None:
    answer = client.get(f"/v1/students/{student}/model.onnx?precision=int8")
    assert (answer.status_code, answer.json()["code"]) == (404, "precision_not_available")
    assert "Order one with precision 'int8'" in answer.json()["detail"]


def test_a_file_that_the_store_has_lost_is_no_empty_download(
    client: httpx.Client, student: str, wiring: Wiring, student_files: dict[str, bytes]
) -> None:
    wiring.blobs.delete(hashlib.sha256(student_files["bundle.zip"]).hexdigest())
    answer = bundle(client, student)
    assert (answer.status_code, answer.json()["code"]) == (500, "blob_missing")
