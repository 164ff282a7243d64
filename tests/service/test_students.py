"""Students over HTTP: found by their tenant only, downloaded whole or in parts, and asked about images."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image, ImageDraw

from app import ids
from app.datasets.tables import Dataset
from app.jobs.tables import Job
from app.students import predict
from app.students.tables import Student
from app.wiring import Wiring

if TYPE_CHECKING:
    from tests.conftest import Gateway

LABELS = ["red", "green", "blue"]


def graph(labels: list[str] = LABELS) -> bytes:
    """A student that knows the mean colour: uint8 [batch, height, width, 3] -> probabilities of red, green, blue."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    made = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
            helper.make_tensor("scale", TensorProto.FLOAT, [], [1 / 25]),
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, {"labels": json.dumps(labels)})
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def picture(colour: str, size: tuple[int, int] = (40, 30), kind: str = "PNG", **more: Any) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, kind, **more)
    return content.getvalue()


def store(wiring: Wiring, content: bytes, folder: Path) -> str:
    path = folder / "content"
    path.write_bytes(content)
    return wiring.blobs.put(path)


def make_student(wiring: Wiring, folder: Path, files: dict[str, bytes], tenant: str = "default") -> str:
    student_id, job_id, dataset_id = ids.new("stu"), ids.new("job"), ids.new("ds")
    common: dict[str, Any] = {"teacher": "efficientnet_lite0", "method": "kd"}
    with wiring.database.writing() as session:
        session.add(
            Dataset(
                id=dataset_id,
                tenant=tenant,
                name="colours",
                digest=ids.new("d"),
                classes=LABELS,
                splits={},
                smallest_class=2,
                report={},
            )
        )
        session.flush()
        session.add(
            Job(
                id=job_id,
                tenant=tenant,
                dataset_id=dataset_id,
                student="conv4",
                preset="draft",
                params={},
                seed=0,
                labels={},
                sources={},
                shape={},
                status="succeeded",
                **common,
            )
        )
        session.flush()
        session.add(
            Student(
                id=student_id,
                tenant=tenant,
                job_id=job_id,
                dataset_id=dataset_id,
                architecture="conv4",
                classes=LABELS,
                files={name: store(wiring, content, folder) for name, content in files.items()},
                summary={"accuracy": 1.0},
                **common,
            )
        )
    return student_id


FILES = {
    "model.onnx": graph(),
    "bundle.zip": bytes(range(256)) * 4000,
    "report.json": b'{"accuracy": 1.0}',
    "labels.json": json.dumps(LABELS).encode(),
}


@pytest.fixture
def student(wiring: Wiring, tmp_path: Path) -> str:
    return make_student(wiring, tmp_path, FILES)


def bundle(client: httpx.Client, student: str, **headers: str) -> httpx.Response:
    return client.get(f"/v1/students/{student}/bundle.zip", headers=headers)


def test_a_student_is_shown_with_its_files(client: httpx.Client, student: str) -> None:
    shown = client.get(f"/v1/students/{student}").json()
    assert (shown["object"], shown["id"], shown["classes"]) == ("student", student, LABELS)
    assert shown["created_at"].endswith("Z")
    assert client.get("/v1/students").json()["data"] == [shown]
    files = {item["name"]: item for item in shown["files"]}
    assert files.keys() == FILES.keys()
    for name, content in FILES.items():
        assert files[name]["sha256"] == hashlib.sha256(content).hexdigest()
        if name == "labels.json":
            assert files[name]["url"] is None
        else:
            assert client.get(files[name]["url"]).content == content


def test_students_are_listed_by_job_and_data_set(
    client: httpx.Client, wiring: Wiring, tmp_path: Path
) -> None:
    made = [make_student(wiring, tmp_path, FILES) for _ in range(3)]
    listed = client.get("/v1/students?limit=2").json()
    assert [item["id"] for item in listed["data"]] == [made[2], made[1]]
    assert listed["has_more"]
    one = listed["data"][0]
    for name in ("job_id", "dataset_id"):
        assert [
            item["id"] for item in client.get("/v1/students", params={name: one[name]}).json()["data"]
        ] == [made[2]]


def test_another_tenants_student_is_not_found(
    client: httpx.Client, gateway: Gateway, wiring: Wiring, tmp_path: Path
) -> None:
    theirs = make_student(wiring, tmp_path, FILES, tenant="rival")
    with gateway.client(gateway.key_of("rival", "students:read")) as rival:
        assert rival.get(f"/v1/students/{theirs}").status_code == 200
    assert client.get("/v1/students").json()["data"] == []
    for path in ("", "/model.onnx", "/bundle.zip", "/report"):
        assert client.get(f"/v1/students/{theirs}{path}").status_code == 404
    assert client.post(f"/v1/students/{theirs}/predict", content=picture("red")).status_code == 404


def test_a_download_names_its_digest_and_its_file(client: httpx.Client, student: str) -> None:
    answer = bundle(client, student)
    digest = hashlib.sha256(FILES["bundle.zip"])
    encoded = base64.b64encode(digest.digest()).decode()
    assert answer.content == FILES["bundle.zip"]
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["etag"] == f'"{digest.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{encoded}:"
    assert answer.headers["digest"] == f"sha-256={encoded}"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-length"] == str(len(FILES["bundle.zip"]))
    assert answer.headers["content-disposition"] == f'attachment; filename="{student}.bundle.zip"'
    assert answer.headers["cache-control"] == "private, no-cache"


def test_head_tells_the_same_without_the_content(client: httpx.Client, student: str) -> None:
    whole = bundle(client, student)
    head = client.head(f"/v1/students/{student}/bundle.zip")
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "content-length", "repr-digest", "content-disposition", "content-type"):
        assert head.headers[name] == whole.headers[name]


@pytest.mark.parametrize("form", ['"{0}"', 'W/"{0}"', '"other", "{0}"', "*"])
def test_what_the_client_has_is_not_sent_again(client: httpx.Client, student: str, form: str) -> None:
    digest = hashlib.sha256(FILES["bundle.zip"]).hexdigest()
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
    client: httpx.Client, student: str, asked: str, start: int, end: int
) -> None:
    content = FILES["bundle.zip"]
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
    client: httpx.Client, student: str, asked: str
) -> None:
    answer = bundle(client, student, Range=asked)
    assert (answer.status_code, answer.content) == (200, FILES["bundle.zip"])


def test_a_download_goes_on_only_if_the_file_is_still_the_same(client: httpx.Client, student: str) -> None:
    tag = bundle(client, student).headers["etag"]
    assert bundle(client, student, **{"Range": "bytes=5-", "If-Range": tag}).status_code == 206
    assert bundle(client, student, **{"Range": "bytes=5-", "If-Range": '"old"'}).status_code == 200


def test_a_precision_that_was_not_made_says_how_to_get_it(client: httpx.Client, student: str) -> None:
    answer = client.get(f"/v1/students/{student}/model.onnx?precision=int8")
    assert (answer.status_code, answer.json()["code"]) == (404, "precision_not_available")
    assert "Order one with precision 'int8'" in answer.json()["detail"]


def test_a_file_that_the_store_has_lost_is_no_empty_download(
    client: httpx.Client, student: str, wiring: Wiring
) -> None:
    wiring.blobs.delete(hashlib.sha256(FILES["bundle.zip"]).hexdigest())
    answer = bundle(client, student)
    assert (answer.status_code, answer.json()["code"]) == (500, "blob_missing")


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
    image = Image.new("RGB", (64, 48), (90, 60, 30))
    content = io.BytesIO()
    image.save(content, "PNG")
    scores = {
        item["label"]: item["score"]
        for item in client.post(f"/v1/students/{student}/predict", content=content.getvalue()).json()[
            "predictions"
        ]
    }
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


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
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


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_image_over_the_cap_is_refused_however_it_is_sent(
    client: httpx.Client, student: str, wiring: Wiring
) -> None:
    most = wiring.settings.max_image_bytes
    url = f"/v1/students/{student}/predict"
    pieces = (b"\0" * 2**20 for _ in range(most // 2**20 + 2))
    for body in ({"content": b"\0" * (most + 1)}, {"content": pieces}):
        answer = client.post(url, **body)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_only_so_many_students_are_kept_ready(
    wiring: Wiring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "READY_STUDENTS", 2)
    predictor = predict.Predictor(wiring.settings, wiring.blobs)
    digests = [store(wiring, graph([f"{number}r", "g", "b"]), tmp_path) for number in range(3)]
    for number, digest in enumerate(digests):
        assert predictor.predict(digest, picture("#ff0000"))[0].label == f"{number}r"
    assert list(predictor._ready) == digests[1:]
    predictor.predict(digests[1], picture("#ff0000"))
    predictor.predict(digests[0], picture("#ff0000"))
    assert list(predictor._ready) == [digests[1], digests[0]]
    predictor.close()
    predictor.predict(digests[0], picture("#ff0000"))
    predictor.close()
