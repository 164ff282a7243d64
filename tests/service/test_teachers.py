"""Teachers of one's own over HTTP: what is refused and why, what is shown, what a probe finds."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import onnx
import pytest
import structlog
from onnx import TensorProto, helper
from PIL import Image
from pydantic import SecretStr, ValidationError
from sqlalchemy.orm import Session

from app import ids
from app.client import AsyncDram, Dram
from app.datasets.tables import Dataset
from app.errors import Conflict, Invalid, Unavailable
from app.jobs.tables import Job
from app.security.principal import Principal
from app.settings import Settings
from app.teachers import registration, service
from app.teachers.schemas import HttpOrder
from app.wiring import Wiring

if TYPE_CHECKING:
    from tests.conftest import Gateway

CLASSES = ["red", "green", "blue"]
SECRET = "s3cr3t-of-the-endpoint"
Answering = Callable[[dict[str, Any], dict[str, str]], tuple[int, Any]]


@dataclass
class Endpoint:
    """A real HTTP server on the loopback that speaks Dram's own contract, well or badly."""

    url: str = ""
    asked: list[dict[str, str]] = field(default_factory=list)
    answer: Answering = lambda document, headers: (200, {"probabilities": [mean_colour(document)]})


def mean_colour(document: dict[str, Any]) -> list[float]:
    """Knows colours: the share of red, green and blue in the one image that was sent."""
    (encoded,) = document["images"]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        channels = np.asarray(image.convert("RGB")).mean((0, 1)) + 1e-3
    shares: list[float] = (channels / channels.sum()).tolist()
    return shares


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    played = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            played.asked.append(dict(self.headers.items()))
            status, document = played.answer(json.loads(body), dict(self.headers.items()))
            content = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    played.url = f"http://127.0.0.1:{server.server_address[1]}/answer"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield played
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The loopback may be asked, and there is a key on either database."""
    key = base64.b64encode(bytes(range(32))).decode()
    return settings.model_copy(update={"egress_allow": ("127.0.0.0/8",), "secret_key": SecretStr(key)})


def order(url: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": "http",
        "title": "Colours",
        "url": url,
        "classes": CLASSES,
        "input": {"height": 32, "width": 32},
        **more,
    }


def made(client: httpx.Client, url: str, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/teachers", json=order(url, **more))
    assert answer.status_code == 201, answer.text
    document: dict[str, Any] = answer.json()
    assert answer.headers["Location"] == f"/v1/teachers/{document['id']}"
    return document


def graph(outputs: tuple[str, ...] = ("probabilities",), size: int | None = 32) -> bytes:
    """Knows the mean colour: float32 [N, 3, size, size] -> `probabilities`, or `logits`, of red, green, blue."""
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    side = size or "side"
    built = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, side, side])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in outputs],
        [
            helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
            helper.make_tensor("scale", TensorProto.FLOAT, [1, 3], [9.0, 9.5, 10.0]),
        ],
    )
    model = helper.make_model(built, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def upload(client: httpx.Client, model: bytes | None = None, **spec: Any) -> httpx.Response:
    described = {"kind": "onnx", "title": "Colours", "classes": CLASSES, **spec}
    return client.post(
        "/v1/teachers",
        files={"model": ("colours.onnx", graph() if model is None else model, "application/octet-stream")},
        data={"spec": json.dumps(described)},
    )


def picture(colour: str, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(content, kind)
    return content.getvalue()


def pointers(answer: httpx.Response) -> dict[str, str]:
    assert answer.status_code == 422, answer.text
    return {finding["pointer"]: finding["detail"] for finding in answer.json()["errors"]}


# ---- an endpoint ----------------------------------------------------------------------------------------------


def test_an_endpoint_is_registered_probed_and_listed(client: httpx.Client, endpoint: Endpoint) -> None:
    teacher = made(client, endpoint.url, headers={"Authorization": f"Bearer {SECRET}"}, licence="MIT")
    assert (teacher["kind"], teacher["source"], teacher["available"]) == ("http", endpoint.url, True)
    assert teacher["offers"] == ["labels", "probabilities"]
    assert teacher["black_box"]["headers"] == ["Authorization"]
    assert teacher["black_box"]["classes"] == CLASSES
    report = client.post(f"/v1/teachers/{teacher['id']}/probe", content=picture("#00ff00")).json()
    assert (report["ok"], report["problems"], report["shape"]) == (True, [], [1, 3])
    assert report["top"][0]["name"] == "green"
    assert report["latency_ms"] > 0
    assert endpoint.asked[0]["Authorization"] == f"Bearer {SECRET}"
    shown = client.get(f"/v1/teachers/{teacher['id']}").json()
    assert shown["black_box"]["probe"]["top"] == report["top"]
    listed = client.get("/v1/teachers").json()["data"]
    assert [item["id"] for item in listed][-1] == teacher["id"]
    assert {name: shown[name] for name in listed[-1]} == listed[-1]


def test_a_probe_without_an_image_asks_about_a_pattern(client: httpx.Client, endpoint: Endpoint) -> None:
    teacher = made(client, endpoint.url)
    assert client.post(f"/v1/teachers/{teacher['id']}/probe").json()["ok"] is True
    assert len(endpoint.asked) == 1


def html(document: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
    return 200, b"<html>welcome</html>"


def refusing(document: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
    return 401, f"no entry for {headers['Authorization']}".encode()


def failing(document: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
    return 500, f"crashed with {headers['Authorization']}".encode()


def rejecting(document: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
    return 400, f"what is {headers['Authorization']}?".encode()


def too_many_classes(document: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
    return 200, {"probabilities": [[0.25] * 4]}


def not_summing(document: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
    return 200, {"probabilities": [[0.9, 0.9, 0.9]]}


def redirecting(document: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
    return 302, b""


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (html, "JSON"), (refusing, "401"), (failing, "500"), (rejecting, "400"), (too_many_classes, "4"),
        (not_summing, "2.7"), (redirecting, "redirect"),
    ],
    ids=["html", "401", "500", "400", "four classes", "sum of 2.7", "redirect"],
)  # fmt: skip
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_bad_endpoint_is_a_report_that_hides_the_secret_and_makes_it_unavailable(
    client: httpx.Client, endpoint: Endpoint, answer: Answering, word: str
) -> None:
    teacher = made(client, endpoint.url, headers={"Authorization": f"Bearer {SECRET}"}, retries=0)
    endpoint.answer = answer
    probed = client.post(f"/v1/teachers/{teacher['id']}/probe")
    assert probed.status_code == 200
    report = probed.json()
    assert (report["ok"], report["top"]) == (False, [])
    assert word in report["problems"][0]
    assert report["hint"]
    shown = client.get(f"/v1/teachers/{teacher['id']}")
    assert shown.json()["available"] is False
    assert report["problems"][0] in shown.json()["reason"]
    assert SECRET not in probed.text + shown.text


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_endpoint_that_is_down_is_a_report_and_recovers(client: httpx.Client, endpoint: Endpoint) -> None:
    closed = made(client, "http://127.0.0.1:9/answer")
    report = client.post(f"/v1/teachers/{closed['id']}/probe").json()
    assert (report["ok"], "127.0.0.1:9" in report["problems"][0]) == (False, True)
    teacher = made(client, endpoint.url)
    endpoint.answer = html
    assert client.post(f"/v1/teachers/{teacher['id']}/probe").json()["ok"] is False
    endpoint.answer = Endpoint().answer
    assert client.post(f"/v1/teachers/{teacher['id']}/probe").json()["ok"] is True
    assert client.get(f"/v1/teachers/{teacher['id']}").json()["available"] is True


def test_secrets_appear_nowhere(
    client: httpx.Client,
    endpoint: Endpoint,
    wiring: Wiring,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with structlog.testing.capture_logs() as logs:
        teacher = made(client, endpoint.url, headers={"Authorization": f"Bearer {SECRET}"})
        texts = [
            json.dumps(teacher),
            client.post(f"/v1/teachers/{teacher['id']}/probe").text,
            client.get(f"/v1/teachers/{teacher['id']}").text,
            client.get("/v1/teachers").text,
            client.post("/v1/teachers", json=order("nowhere", headers={"A b": SECRET, "Host": SECRET})).text,
            client.put(
                f"/v1/teachers/{teacher['id']}/headers", json={"headers": {"X-Key": f"{SECRET}\n"}}
            ).text,
        ]
    assert endpoint.asked[0]["Authorization"] == f"Bearer {SECRET}"
    said = capfd.readouterr()
    everything = "".join([*texts, str(logs), said.out, said.err])
    assert SECRET not in everything
    with wiring.database.reading() as session:
        row = service.get(session, Principal("default", frozenset()), teacher["id"])
        assert row.secret
        assert SECRET not in str(vars(row))
        assert service.headers(session, wiring.settings, "default", row.id) == {
            "Authorization": f"Bearer {SECRET}"
        }
    stored = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert stored or not wiring.database.sqlite
    assert [content for content in stored if SECRET.encode() in content] == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_new_headers_take_the_place_of_all_old_ones(client: httpx.Client, endpoint: Endpoint) -> None:
    teacher = made(client, endpoint.url, headers={"Authorization": "old", "X-Team": "bolts"})
    url = f"/v1/teachers/{teacher['id']}"
    changed = client.put(f"{url}/headers", json={"headers": {"X-Key": "new"}})
    assert changed.json()["black_box"]["headers"] == ["X-Key"]
    client.post(f"{url}/probe")
    assert endpoint.asked[-1]["X-Key"] == "new"
    assert not {"Authorization", "X-Team"} & endpoint.asked[-1].keys()
    assert client.put(f"{url}/headers", json={"headers": {}}).json()["black_box"]["headers"] == []
    client.post(f"{url}/probe")
    assert "X-Key" not in endpoint.asked[-1]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_headers_encrypted_with_another_key_are_a_clear_error(
    client: httpx.Client, endpoint: Endpoint, gateway_with: Callable[..., AbstractContextManager[Gateway]],
    wiring: Wiring,
) -> None:  # fmt: skip
    teacher = made(client, endpoint.url, headers={"X-Key": SECRET})
    other = SecretStr(base64.b64encode(bytes(32)).decode())
    changed = wiring.settings.model_copy(update={"secret_key": other})
    with wiring.database.reading() as session, pytest.raises(Unavailable, match="another one") as caught:
        service.headers(session, changed, "default", teacher["id"])
    assert caught.value.code == "secret_unreadable"
    assert SECRET not in caught.value.detail


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_service_with_a_remote_database_and_no_key_keeps_no_secrets_and_says_so(
    wiring: Wiring, endpoint: Endpoint
) -> None:
    from app.keys import service as keys
    from tests.conftest import Gateway, serving

    without = Wiring.build(wiring.settings.model_copy(update={"secret_key": SecretStr("")}))
    key = keys.ensure_first_key(without)
    assert key is not None
    with serving(without) as url, Gateway(url, key, without).client(key) as client:
        refused = client.post("/v1/teachers", json=order(endpoint.url, headers={"X-Key": SECRET}))
        assert (refused.status_code, refused.json()["code"]) == (503, "secret_key_missing")
        assert "DRAM_SECRET_KEY" in refused.json()["detail"]
        assert client.post("/v1/teachers", json=order(endpoint.url)).status_code == 201
    without.close()


# ---- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_every_mistake_of_a_description_is_told_at_once(client: httpx.Client) -> None:
    wrong = order(
        "http://10.0.0.1/answer",
        classes=["red", "green", "red"],
        input={"height": 0, "width": 32, "mean": [0.5]},
        answers="guesses",
        headers={"Host": "x"},
        batch_size=1000,
        colour="blue",
    )
    found = pointers(client.post("/v1/teachers", json=wrong))
    assert found.keys() == {
        "/url",
        "/classes",
        "/input/height",
        "/answers",
        "/headers",
        "/batch_size",
        "/colour",
    }
    assert "public internet" in found["/url"]
    assert "'red' is named twice, at 0 and at 2" in found["/classes"]
    assert "Host" in found["/headers"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://user:word@127.0.0.1/x", "header"),
        ("http://127.0.0.1/x?api_key=hush-hush", "api_key"),
        ("http://127.0.0.1/x#part", "fragment"),
        ("ftp://127.0.0.1/x", "https://"),
        ("https://169.254.169.254/latest", "public internet"),
        ("not a url", "space"),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_url_that_cannot_be_asked_is_refused(client: httpx.Client, url: str, words: str) -> None:
    answer = client.post("/v1/teachers", json=order(url))
    assert words in pointers(answer)["/url"]
    assert "hush-hush" not in answer.text


@pytest.mark.parametrize(
    "name", ["key", "api_key", "apiKey", "X-Amz-Signature", "access_token", "sig", "code", "subscription-key"]
)
def test_a_parameter_that_looks_like_a_secret_is_refused(name: str) -> None:
    described = order(f"https://models.example/infer?version=2&{name}={SECRET}")
    with pytest.raises(ValidationError, match=f"'{name}' looks like a secret"):
        HttpOrder.model_validate(described)


@pytest.mark.parametrize("name", ["version", "api-version", "author", "zipcode", "signature_name", "design"])
def test_other_parameters_are_taken(name: str) -> None:
    described = order(f"https://models.example/infer?{name}=7")
    assert HttpOrder.model_validate(described).url == described["url"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_values_of_parameters_are_not_shown(client: httpx.Client, endpoint: Endpoint) -> None:
    teacher = made(client, f"{endpoint.url}?version=v-17")
    assert teacher["source"] == f"{endpoint.url}?version=…"
    assert client.post(f"/v1/teachers/{teacher['id']}/probe").json()["ok"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_bodies_that_are_no_description_are_refused(client: httpx.Client, endpoint: Endpoint) -> None:
    def sent(content: bytes, kind: str) -> tuple[int, str]:
        answer = client.post("/v1/teachers", content=content, headers={"Content-Type": kind})
        return answer.status_code, answer.json()["code"]

    assert sent(b"{", "application/json") == (400, "json_invalid")
    assert sent(b"[" * 100_000, "application/json") == (400, "json_invalid")
    assert sent(b'{"timeout_s": NaN}', "application/json") == (400, "json_invalid")
    assert sent(b'"text"', "application/json")[0] == 422
    assert sent(b"x" * (6 * 2**20), "application/json") == (413, "too_large")
    assert sent(b"kind=http", "application/x-www-form-urlencoded") == (415, "unsupported_media_type")
    assert pointers(client.post("/v1/teachers", json=order(endpoint.url, title="a\x00b"))).keys() == {
        "/title"
    }
    surrogate = json.dumps(order(endpoint.url, title="a\ud800b")).encode()
    assert sent(surrogate, "application/json")[0] == 422
    answer = client.post("/v1/teachers", json={**order(endpoint.url), "kind": "onnx"})
    assert "/kind" in pointers(answer)
    label = order(endpoint.url, protocol="kserve_v2", answers="top_k")
    assert pointers(client.post("/v1/teachers", json=label)).keys() == {"/answers"}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_ten_thousand_classes_are_accepted(client: httpx.Client, endpoint: Endpoint) -> None:
    names = [f"class {number:05d} {'x' * 80}" for number in range(10_000)]
    teacher = made(client, endpoint.url, classes=names)
    assert teacher["black_box"]["classes"] == names
    assert pointers(client.post("/v1/teachers", json=order(endpoint.url, classes=[*names, "one more"])))


# ---- a file ---------------------------------------------------------------------------------------------------


def test_a_file_is_registered_from_its_own_facts_and_probed(client: httpx.Client, wiring: Wiring) -> None:
    answer = upload(client)
    assert answer.status_code == 201, answer.text
    teacher = answer.json()
    box = teacher["black_box"]
    assert (teacher["kind"], teacher["input_size"]) == ("onnx", 32)
    assert (box["answers"], box["output_name"], box["bytes"]) == (
        "probabilities",
        "probabilities",
        len(graph()),
    )
    assert box["input"]["layout"] == "NCHW"
    for kind, colour in (("PNG", "red"), ("JPEG", "blue")):
        report = client.post(f"/v1/teachers/{teacher['id']}/probe", content=picture(colour, kind)).json()
        assert (report["ok"], report["shape"], report["top"][0]["name"]) == (True, [1, 3], colour)
    with wiring.database.reading() as session:
        owner = Principal("default", frozenset())
        resolved = service.resolve(session, wiring.settings, owner, teacher["id"])
        assert resolved.spec.name == teacher["id"]
        with wiring.blobs.open(resolved.files["model.onnx"]) as stored:
            assert stored.read() == graph()
        assert service.headers(session, wiring.settings, "default", teacher["id"]) == {}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_equal_files_are_two_teachers_that_share_their_answers(client: httpx.Client, wiring: Wiring) -> None:
    first, second = (upload(client, title=title).json()["id"] for title in ("one", "two"))
    assert first != second
    with wiring.database.reading() as session:
        rows = [
            service.get(session, Principal("default", frozenset()), teacher) for teacher in (first, second)
        ]
        assert len({service.spec_of(row).answers_key for row in rows}) == 1
        assert rows[0].files == rows[1].files


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_what_the_file_leaves_open_is_asked_for_and_can_be_stated(client: httpx.Client) -> None:
    open_size = graph(size=None)
    assert "height" in pointers(upload(client, open_size))["/model"]
    stated = upload(client, open_size, input={"height": 20, "width": 24, "mean": [0.5, 0.5, 0.5]}).json()
    assert stated["black_box"]["input"] == {
        "height": 20, "width": 24, "channels": 3, "layout": "NCHW", "dtype": "float32", "range": "0..1",
        "mean": [0.5, 0.5, 0.5], "std": [],
    }  # fmt: skip
    assert client.post(f"/v1/teachers/{stated['id']}/probe").json()["ok"]
    two = graph(("logits", "probabilities"))
    assert "'logits'" in pointers(upload(client, two))["/output_name"]
    assert upload(client, two, output_name="logits").json()["black_box"]["answers"] == "logits"
    assert "/answers" in pointers(upload(client, two, output_name="logits", answers="probabilities"))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_file_that_does_not_fit_is_refused_with_where_and_how(client: httpx.Client) -> None:
    assert "3" in pointers(upload(client, classes=["a", "b"]))["/classes"]
    assert pointers(upload(client, b"no onnx at all")).keys() == {"/model"}
    assert pointers(upload(client, b"no onnx", title="", classes=["a", "a"])).keys() == {
        "/model", "/title", "/classes",
    }  # fmt: skip
    assert "one for each channel" in pointers(upload(client, input={"std": [1, 2]}))["/input"]
    assert "/input" in pointers(upload(client, input={"std": [0.5]}))
    assert "/model" in pointers(upload(client, input={"height": 16, "width": 16}))
    assert "/input" in pointers(upload(client, input={"channels": 1}))


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_form_with_wrong_parts_says_which(client: httpx.Client) -> None:
    spec = json.dumps({"kind": "onnx", "title": "t", "classes": CLASSES}).encode()
    file = ("m.onnx", graph(), "application/octet-stream")
    as_file = client.post(
        "/v1/teachers", files={"model": file, "spec": ("spec.json", spec, "application/json")}
    )
    assert as_file.status_code == 201, as_file.text
    assert pointers(client.post("/v1/teachers", files={"model": file})).keys() == {"/spec"}
    assert pointers(client.post("/v1/teachers", files={"modle": file})).keys() == {
        "/model",
        "/modle",
        "/spec",
    }
    assert pointers(client.post("/v1/teachers", files={"x": (None, b"")}, data={"model": "text"})).keys() >= {
        "/model"
    }


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_file_over_the_cap_is_refused(
    gateway_with: Callable[..., AbstractContextManager[Gateway]], wiring: Wiring
) -> None:
    with gateway_with(max_model_bytes=1000) as gateway, gateway.client(gateway.key) as client:
        assert upload(client, b"\0" * 1001).status_code == 413
        assert upload(client, b"\0" * (6 * 2**20)).status_code == 413
    with wiring.database.reading() as session:
        assert service.page(session, wiring.settings, Principal("default", frozenset()), 5, None)[1] == []


# ---- who may, and what becomes of it --------------------------------------------------------------------------


def test_other_tenants_do_not_see_it(client: httpx.Client, gateway: Gateway, endpoint: Endpoint) -> None:
    teacher = made(client, endpoint.url)
    url = f"/v1/teachers/{teacher['id']}"
    with gateway.client(gateway.key_of("rival", "admin")) as rival:
        answers = [
            rival.get(url), rival.delete(url), rival.post(f"{url}/probe"),
            rival.put(f"{url}/headers", json={"headers": {}}),
        ]  # fmt: skip
        assert [answer.status_code for answer in answers] == [404] * 4
        assert teacher["id"] not in rival.get("/v1/teachers").text
    with gateway.wiring.database.reading() as session:
        settings = gateway.wiring.settings
        with pytest.raises(Invalid, match=r"efficientnet_lite0") as caught:
            service.resolve(session, settings, Principal("rival", frozenset()), teacher["id"])
        assert caught.value.code == "unknown_teacher"
        assert service.headers(session, settings, "rival", teacher["id"]) == {}
        with pytest.raises(Invalid, match=teacher["id"]):
            service.resolve(session, settings, Principal("default", frozenset()), "nobody")
    assert endpoint.asked == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_key_that_only_reads_changes_nothing(
    client: httpx.Client, gateway: Gateway, endpoint: Endpoint
) -> None:
    teacher = made(client, endpoint.url)
    url = f"/v1/teachers/{teacher['id']}"
    with gateway.client(gateway.key_of("default", "jobs:read")) as reader:
        assert reader.get(url).status_code == 200
        refused = [
            reader.post("/v1/teachers", json=order(endpoint.url)), reader.delete(url),
            reader.post(f"{url}/probe"), reader.put(f"{url}/headers", json={"headers": {}}),
        ]  # fmt: skip
        assert [answer.status_code for answer in refused] == [403] * 4
        assert "teachers:write" in refused[0].json()["detail"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_list_goes_on_from_the_catalogue_to_ones_own(client: httpx.Client, endpoint: Endpoint) -> None:
    own = [made(client, endpoint.url, title=str(number))["id"] for number in range(3)]
    whole = [item["id"] for item in client.get("/v1/teachers", params={"limit": 100}).json()["data"]]
    assert whole[-3:] == own[::-1]
    for limit in (1, 2, 4, len(whole)):
        seen: list[str] = []
        more = True
        while more:
            page = client.get(
                "/v1/teachers", params={"limit": limit, **({"after": seen[-1]} if seen else {})}
            ).json()
            seen += [item["id"] for item in page["data"]]
            more = page["has_more"]
        assert seen == whole


def add_job(session: Session, teacher_id: str) -> Job:
    """One that runs."""
    dataset = Dataset(id=ids.new("ds"), tenant="default", name="d", digest="d", classes=["a", "b"], splits={},
                      smallest_class=2, report={})  # fmt: skip
    session.add(dataset)
    session.flush()
    job = Job(
        id=ids.new("job"), tenant="default", dataset_id=dataset.id, teacher=teacher_id, method="fsbbt",
        student="conv4", preset="draft", params={}, seed=0, labels={}, sources={}, shape={}, status="running",
    )  # fmt: skip
    session.add(job)
    return job


def test_a_teacher_is_not_deleted_while_a_job_asks_it(
    client: httpx.Client, wiring: Wiring, endpoint: Endpoint
) -> None:
    teacher = made(client, endpoint.url, headers={"X-Key": SECRET})
    url = f"/v1/teachers/{teacher['id']}"
    with wiring.database.writing() as session:
        job = add_job(session, teacher["id"])
    refused = client.delete(url)
    assert (refused.status_code, refused.json()["code"]) == (409, "teacher_in_use")
    assert job.id in refused.json()["detail"]
    with wiring.database.writing() as session:
        held = session.get_one(Job, job.id)
        held.status, held.finished_at = "succeeded", 1.0
    assert client.delete(url).status_code == 204
    assert client.get(url).status_code == 404
    assert client.delete(url).status_code == 404
    with wiring.database.reading() as session:
        assert service.headers(session, wiring.settings, "default", teacher["id"]) == {}


def test_a_job_that_is_being_ordered_keeps_its_teacher(wiring: Wiring, endpoint: Endpoint) -> None:
    """Whoever deletes waits until the job is there, and then finds it."""
    owner = Principal("default", frozenset())
    described = HttpOrder.model_validate(order(endpoint.url))
    teacher = service.create(wiring, owner, registration.http_teacher(described, service.new_id()), {}, {})
    with ThreadPoolExecutor(1) as threads:
        with wiring.database.writing() as session:
            assert service.resolve(session, wiring.settings, owner, teacher.id).spec.name == teacher.id
            deleting = threads.submit(service.delete, wiring, owner, teacher.id)
            with pytest.raises(TimeoutError):
                deleting.result(0.3)
            add_job(session, teacher.id)
        with pytest.raises(Conflict, match="still asks"):
            deleting.result(10)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_teachers_of_the_catalogue_are_probed_for_availability_and_stay(client: httpx.Client) -> None:
    url = "/v1/teachers/efficientnet_lite0"
    shown = client.get(url).json()
    report = client.post(f"{url}/probe").json()
    assert (report["ok"], report["shape"]) == (shown["available"], None)
    assert shown["black_box"] is None
    assert client.delete(url).json()["code"] == "teacher_not_yours"
    assert client.put(f"{url}/headers", json={"headers": {}}).json()["code"] == "teacher_not_yours"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_probe_with_no_image_in_its_body_is_refused(client: httpx.Client, endpoint: Endpoint) -> None:
    teacher = made(client, endpoint.url)
    answer = client.post(f"/v1/teachers/{teacher['id']}/probe", content=b"%PDF-1.7")
    assert (answer.status_code, answer.json()["code"]) == (415, "image_format")
    assert endpoint.asked == []


# ---- the clients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_client_does_all_of_it(gateway: Gateway, endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "colours.onnx").write_bytes(graph())
    (tmp_path / "blue.png").write_bytes(picture("blue"))
    with Dram(gateway.url, gateway.key) as dram:
        behind = dram.teachers.add_http(
            title="Colours", url=endpoint.url, classes=CLASSES, input={"height": 8, "width": 8},
            headers={"X-Key": SECRET}, batch_size=4,
        )  # fmt: skip
        assert behind.is_own
        assert behind.black_box is not None
        assert behind.black_box["batch_size"] == 4
        assert dram.teachers.probe(behind.id, tmp_path / "blue.png").top[0].name == "blue"
        assert dram.teachers.replace_headers(behind.id, {"X-Other": "x"}).black_box["headers"] == ["X-Other"]
        file = dram.teachers.add_onnx(tmp_path / "colours.onnx", classes=CLASSES, answers="probabilities")
        assert (file.title, file.kind) == ("colours", "onnx")
        assert dram.teachers.probe(file.id).ok
        assert dram.teachers.get(file.id).black_box["probe"]["ok"]
        assert [item.id for item in dram.teachers.list(limit=100).data][-2:] == [file.id, behind.id]
        dram.teachers.delete(behind.id)
        assert behind.id not in [item.id for item in dram.teachers.list(limit=100).data]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_asynchronous_client_does_all_of_it(gateway: Gateway, endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "colours.onnx").write_bytes(graph())

    async def use() -> None:
        async with AsyncDram(gateway.url, gateway.key) as dram:
            behind = await dram.teachers.add_http(
                title="Colours", url=endpoint.url, classes=CLASSES, input={"height": 8, "width": 8}
            )
            assert (await dram.teachers.probe(behind.id, picture("red"))).top[0].name == "red"
            await dram.teachers.replace_headers(behind.id, {"X-Other": "x"})
            assert (await dram.teachers.get(behind.id)).black_box["headers"] == ["X-Other"]
            file = await dram.teachers.add_onnx(tmp_path / "colours.onnx", classes=CLASSES)
            assert (await dram.teachers.probe(file.id)).ok
            await dram.teachers.delete(file.id)
            assert file.id not in [item.id for item in (await dram.teachers.list(limit=100)).data]

    asyncio.run(use())
