"""One image through a student over HTTP, friendly and hostile ones."""

from __future__ import annotations

import io
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from app.students import predict
from app.wiring import Wiring

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

LABELS = ["red", "green", "blue"]


def picture(colour: str, size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("colour", LABELS)
def test_an_image_gets_its_label(client: httpx.Client, student: str, colour: str, kind: str) -> None:
    pure = {"red": "#ff0000", "green": "#00ff00", "blue": "#0000ff"}[colour]
    answer = client.post(f"/v1/students/{student}/predict?top=2", content=picture(pure, kind=kind))
    assert answer.status_code == 200, answer.text
    assert (answer.json()["object"], answer.json()["student_id"]) == ("prediction", student)
    first, second = answer.json()["predictions"]
    assert first["label"] == colour
    assert 0.9 < first["score"] <= 1
    assert second["score"] <= first["score"]


def test_the_scores_are_those_of_the_graph(client: httpx.Client, student: str) -> None:
    answer = client.post(f"/v1/students/{student}/predict", content=picture("#5a3c1e", size=(64, 48)))
    scores = {item["label"]: item["score"] for item in answer.json()["predictions"]}
    logits = np.asarray([90, 60, 30]) / 25
    expected = np.exp(logits) / np.exp(logits).sum()
    assert scores == pytest.approx(dict(zip(LABELS, expected, strict=True)), abs=1e-5)


def test_a_photograph_may_be_large_and_turned(client: httpx.Client, student: str) -> None:
    image = Image.new("RGB", (3000, 2000), "#00ff00")
    exif = Image.Exif()
    exif[0x0112] = 6
    content = io.BytesIO()
    image.save(content, "JPEG", exif=exif)
    answer = client.post(f"/v1/students/{student}/predict", content=content.getvalue())
    assert answer.json()["predictions"][0]["label"] == "green"


def test_an_image_may_come_in_a_form(client: httpx.Client, student: str) -> None:
    url = f"/v1/students/{student}/predict"
    answer = client.post(url, files={"image": ("../x.png", picture("#0000ff"), "text/html")})
    assert answer.json()["predictions"][0]["label"] == "blue"
    wrong = client.post(url, files={"picture": picture("#0000ff")})
    assert (wrong.status_code, wrong.json()["code"]) == (400, "image_missing")
    torn = client.post(
        url, content=b"--x\r\nnot a form", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert torn.status_code == 400
    assert torn.headers["content-type"] == "application/problem+json"


def _bomb() -> bytes:
    image = Image.new("1", (20_000, 20_000))
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _animation() -> bytes:
    frames = [Image.new("RGB", (8, 8)) for _ in range(3)]
    for number, frame in enumerate(frames):
        ImageDraw.Draw(frame).point((number, 0), "white")
    content = io.BytesIO()
    frames[0].save(content, "WEBP", save_all=True, append_images=frames[1:])
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 422, "image_empty"),
        (b"hello", 415, "image_format"),
        (b"GIF89a" + b"0" * 100, 415, "image_format"),
        (b"%!PS-Adobe", 415, "image_format"),
        (picture("red")[:60], 422, "image_corrupt"),
        (picture("red", kind="JPEG")[:200], 422, "image_corrupt"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 500, 422, "image_corrupt"),
        (_bomb(), 422, "image_too_large"),
        (_animation(), 422, "image_animated"),
    ],
    ids=["empty", "text", "gif", "postscript", "cut-png", "cut-jpeg", "false-png", "bomb", "animation"],
)
def test_a_bad_image_is_refused_in_words(
    client: httpx.Client, student: str, content: bytes, status: int, code: str
) -> None:
    url = f"/v1/students/{student}/predict"
    answer = client.post(url, content=content)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    good = client.post(url, content=picture("#ff0000"))
    assert good.json()["predictions"][0]["label"] == "red"


def test_an_image_over_the_cap_is_refused_however_it_is_sent(
    client: httpx.Client, student: str, wiring: Wiring
) -> None:
    most = wiring.settings.max_image_bytes
    url = f"/v1/students/{student}/predict"
    pieces = (b"\0" * 2**20 for _ in range(most // 2**20 + 2))
    for body in ({"content": b"\0" * (most + 1)}, {"content": pieces}):
        answer = client.post(url, **body)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


def test_only_so_many_students_are_kept_ready(
    wiring: Wiring, store_graph: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "READY_STUDENTS", 2)
    predictor = predict.Predictor(wiring.settings, wiring.blobs)
    digests = [store_graph([f"{number}r", "g", "b"]) for number in range(3)]
    for number, digest in enumerate(digests):
        assert predictor.predict(digest, picture("#ff0000"))[0].label == f"{number}r"
    assert list(predictor._ready) == digests[1:]
    predictor.predict(digests[1], picture("#ff0000"))
    predictor.predict(digests[0], picture("#ff0000"))
    assert list(predictor._ready) == [digests[1], digests[0]]
    predictor.close()
    predictor.predict(digests[0], picture("#ff0000"))
    predictor.close()


def test_students_kept_ready_take_only_so_many_bytes(
    wiring: Wiring, store_graph: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = predict.Predictor(wiring.settings, wiring.blobs)
    digests = [store_graph([f"{number}r", "g", "b"]) for number in range(4)]
    for digest in digests[:3]:
        predictor.predict(digest, picture("#ff0000"))
    most = sum(student.size for student in predictor._ready.values())
    assert most > 0
    monkeypatch.setattr(predict, "READY_BYTES", most)
    predictor.predict(digests[3], picture("#ff0000"))
    assert list(predictor._ready) == digests[1:]
    monkeypatch.setattr(predict, "READY_BYTES", 1)
    assert predictor.predict(digests[0], picture("#ff0000"))[0].label == "0r"
    assert list(predictor._ready) == digests[:1]
    predictor.close()


def test_a_student_of_whole_images_gives_no_class_map(client: httpx.Client, student: str) -> None:
    answer = client.post(f"/v1/students/{student}/class-map", content=picture("#ff0000"))
    assert (answer.status_code, answer.json()["code"]) == (409, "student_answers_otherwise")
    assert "/predict" in answer.json()["detail"]


def test_a_photograph_of_megabytes_reaches_whatever_a_student_answers_with(
    client: httpx.Client, student: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (800, 800, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    assert content.tell() > 2**20
    labels = client.post(f"/v1/students/{student}/predict", content=content.getvalue())
    assert labels.status_code == 200, labels.text
    class_map = client.post(f"/v1/students/{student}/class-map", content=content.getvalue())
    assert class_map.json()["code"] == "student_answers_otherwise"
