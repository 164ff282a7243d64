"""What goes over the wire and how answers are read, against the protocols' own words and hand-made numbers."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.security.egress import Egress
from models.errors import TeacherError
from models.pipeline import Response
from models.teachers.black_box import AnswerKind, HttpTeacher, InputFormat, WireProtocol
from models.teachers.formats import read_answers
from models.teachers.http_endpoint import HttpEndpoint
from models.teachers.http_protocols import ADAPTERS

IMAGES = [np.random.default_rng(at).integers(0, 256, (4, 5, 3), dtype=np.uint8) for at in range(3)]
BATCH = np.stack(IMAGES)  # [3, 4, 5, 3]
CLASSES = ("cat", "dog", "7")


def teacher(protocol: str, answers: str = "probabilities", **changes: Any) -> HttpTeacher:
    given = {
        "input": InputFormat(height=4, width=5, range="-1..1", mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 2.0)),
        **changes,
    }
    return HttpTeacher(
        name="t", title="T", classes=CLASSES, source="https://t.example/", protocol=WireProtocol(protocol),
        answers=AnswerKind(answers), **given,
    )  # fmt: skip


def asked(spec: HttpTeacher, images: list[Any] = IMAGES) -> tuple[bytes, dict[str, str]]:
    return ADAPTERS[spec.protocol].request(images, spec)


def read(spec: HttpTeacher, body: Any, n: int = 3, **headers: str) -> np.ndarray[Any, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ADAPTERS[spec.protocol].parse(Response(200, headers, content), spec, n)


def expected_input() -> np.ndarray[Any, Any]:
    """What `teacher` wants to see, [3, 3, 4, 5]."""
    scaled = BATCH.astype(np.float64) * 2 / 255 - 1
    return ((scaled - [0.1, 0.2, 0.3]) / [0.5, 0.5, 2.0]).transpose(0, 3, 1, 2)


def test_every_protocol_has_an_adapter() -> None:
    assert set(ADAPTERS) == set(WireProtocol)


def test_dram_sends_png_images_in_base64() -> None:
    body, headers = asked(teacher("dram"))
    assert headers["Content-Type"] == "application/json"
    document = json.loads(body)
    assert list(document) == ["images"]
    for sent, pixels in zip(document["images"], IMAGES, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(sent, validate=True)))
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(picture), pixels)


def test_pictures_are_sent_grey_and_in_the_size_of_the_teacher() -> None:
    spec = teacher("dram", input=InputFormat(height=2, width=3, channels=1))
    picture = Image.open(io.BytesIO(base64.b64decode(json.loads(asked(spec)[0])["images"][0])))
    assert (picture.mode, picture.size) == ("L", (3, 2))


def test_kserve_sends_one_named_tensor_with_its_numbers_in_row_major_order() -> None:
    body, headers = asked(teacher("kserve_v2", input_name='pix"els', output_name="scores"))
    assert headers["Content-Type"] == "application/json"
    document = json.loads(body)
    (tensor,) = document["inputs"]
    assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ('pix"els', "FP32", [3, 3, 4, 5])
    assert document["outputs"] == [{"name": "scores"}]
    sent = np.array(tensor["data"]).reshape(3, 3, 4, 5)
    assert sent == pytest.approx(expected_input(), abs=1e-5)
    binary = asked(teacher("kserve_v2_binary"))[0]
    exact = np.frombuffer(binary[-sent.size * 4 :], "<f4").reshape(sent.shape)
    assert np.array_equal(sent.astype(np.float32), exact)  # nothing is lost in writing


def test_kserve_sends_whole_numbers_to_a_teacher_of_bytes() -> None:
    shown = InputFormat(height=4, width=5, layout="NHWC", dtype="uint8", range="0..255")
    (tensor,) = json.loads(asked(teacher("kserve_v2", input=shown))[0])["inputs"]
    assert (tensor["datatype"], tensor["shape"], tensor["data"]) == (
        "UINT8",
        [3, 4, 5, 3],
        BATCH.ravel().tolist(),
    )


@pytest.mark.parametrize("output_name", ["", "scores"])
def test_kserve_binary_puts_the_tensor_behind_the_json(output_name: str) -> None:
    body, headers = asked(teacher("kserve_v2_binary", output_name=output_name))
    length = int(headers["Inference-Header-Content-Length"])
    document = json.loads(body[:length])
    (tensor,) = document["inputs"]
    assert "data" not in tensor
    assert (
        tensor["parameters"]
        == {"binary_data_size": 3 * 3 * 4 * 5 * 4}
        == {"binary_data_size": len(body) - length}
    )
    sent = np.frombuffer(body[length:], "<f4").reshape(tensor["shape"])
    assert sent == pytest.approx(expected_input(), abs=1e-5)
    if output_name:
        assert document["outputs"] == [{"name": "scores", "parameters": {"binary_data": True}}]
    else:
        assert document["parameters"] == {"binary_data_output": True}


def test_torchserve_sends_one_png_as_the_body() -> None:
    body, headers = asked(teacher("torchserve"), IMAGES[:1])
    assert headers["Content-Type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), IMAGES[0])
    assert ADAPTERS[WireProtocol.TORCHSERVE].most_images == 1


def test_tensorflow_serving_sends_nested_rows() -> None:
    shown = InputFormat(height=4, width=5, layout="NHWC")
    document = json.loads(asked(teacher("tensorflow_serving", input=shown))[0])
    assert list(document) == ["instances"]
    assert np.array(document["instances"]) == pytest.approx(BATCH / 255, abs=1e-6)
    bytes_format = InputFormat(height=4, width=5, layout="NHWC", dtype="uint8", range="0..255")
    document = json.loads(asked(teacher("tensorflow_serving", input=bytes_format))[0])
    assert document["instances"] == BATCH.tolist()


ROWS = [[0.5, 0.25, 0.25], [1, 0, 0], [0, 0, 1]]
NAN = float("nan")
OUTPUT = {"name": "scores", "datatype": "FP32", "shape": [3, 3]}
FLAT = [value for values in ROWS for value in values]
NAMED = {"name": "names", "datatype": "BYTES", "shape": [3]}


@pytest.mark.parametrize(
    ("spec", "body", "expected"),
    [
        (teacher("dram"), {"probabilities": ROWS}, ROWS),
        (teacher("dram"), {"probabilities": ROWS, "labels": [0], "classes": list(CLASSES)}, ROWS),
        (teacher("dram", "logits"), {"logits": ROWS}, ROWS),
        (teacher("dram", "label"), {"labels": ["dog", "cat", "7"]}, [1, 0, 2]),
        (teacher("dram", "label"), {"labels": [1, 0, 2]}, [1, 0, 2]),
        (teacher("dram", "label"), {"labels": [1, "cat", "2"]}, [1, 0, 2]),
        (teacher("dram", "top_k"),
         {"top_k": [[{"class": "dog", "probability": 0.75}], [{"class": 0, "probability": 1},
                    {"class": "7", "probability": 0}], [{"class": "2", "probability": 0.5}]]},
         [[NAN, 0.75, NAN], [1, NAN, 0], [NAN, NAN, 0.5]]),
        (teacher("kserve_v2"), {"model_name": "m", "outputs": [{**OUTPUT, "data": FLAT}]}, ROWS),
        (teacher("kserve_v2"), {"outputs": [{**OUTPUT, "data": ROWS}]}, ROWS),
        (teacher("kserve_v2", output_name="scores"),
         {"outputs": [{**OUTPUT, "name": "other", "data": [0] * 9}, {**OUTPUT, "data": FLAT}]}, ROWS),
        (teacher("kserve_v2", "label"), {"outputs": [{**NAMED, "data": ["dog", "cat", "7"]}]}, [1, 0, 2]),
        (teacher("kserve_v2", "label"),
         {"outputs": [{"name": "n", "datatype": "INT64", "shape": [3, 1], "data": [1, 0, 2]}]}, [[1], [0], [2]]),
        (teacher("kserve_v2_binary"), {"outputs": [{**OUTPUT, "data": FLAT}]}, ROWS),  # JSON all the same
        (teacher("tensorflow_serving"), {"predictions": ROWS}, ROWS),
        (teacher("tensorflow_serving", output_name="scores"),
         {"predictions": [{"scores": values, "features": [1.0]} for values in ROWS]}, ROWS),
        (teacher("tensorflow_serving", "label"), {"predictions": ["dog", "cat", "7"]}, [1, 0, 2]),
        (teacher("tensorflow_serving", "label"), {"predictions": [1, 0, 2]}, [1, 0, 2]),
    ],
    ids=[f"answer{at}" for at in range(17)],
)  # fmt: skip
def test_answers_are_read_as_the_protocol_says(spec: HttpTeacher, body: Any, expected: Any) -> None:
    raw = read(spec, body)
    assert raw.dtype.kind in "if"
    assert np.array_equal(raw, np.array(expected), equal_nan=True)


@pytest.mark.parametrize(
    ("answers", "body", "expected"),
    [("top_k", {"dog": 0.75, "cat": 0.125}, [[0.125, 0.75, NAN]]), ("top_k", {"1": 0.75}, [[NAN, 0.75, NAN]]),
     ("probabilities", {"dog": 0.75, "cat": 0.25, "7": 0}, [[0.25, 0.75, 0]]),
     ("logits", [1.5, -2.0, 0.0], [1.5, -2.0, 0.0]), ("label", "dog", [1]), ("label", 2, [2]), ("label", ["cat"], [0])],
    ids=[f"answer{at}" for at in range(7)],
)  # fmt: skip
def test_torchserve_answers_are_read(answers: str, body: Any, expected: Any) -> None:
    raw = read(teacher("torchserve", answers), body, 1)
    assert np.array_equal(raw, np.array(expected), equal_nan=True)


@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [("FP16", "<f2"), ("FP32", "<f4"), ("FP64", "<f8"), ("INT8", "i1"), ("INT32", "<i4"), ("UINT64", "<u8")],
)
def test_binary_tensors_are_read_from_their_place_among_the_outputs(datatype: str, dtype: str) -> None:
    before, values = b"\x01" * 7, np.array(ROWS).astype(dtype)
    outputs = [
        {"name": "other", "datatype": "UINT8", "shape": [7], "parameters": {"binary_data_size": 7}},
        {"name": "json", "datatype": "FP32", "shape": [1], "data": [1.0]},
        {
            "name": "scores",
            "datatype": datatype,
            "shape": [3, 3],
            "parameters": {"binary_data_size": values.nbytes},
        },
    ]
    head = json.dumps({"outputs": outputs}).encode()
    body = head + before + values.tobytes() + b"\x02" * 3
    raw = read(
        teacher("kserve_v2_binary", output_name="scores"),
        body,
        **{"inference-header-content-length": str(len(head))},
    )
    assert np.array_equal(raw, values)


def test_binary_strings_are_read_as_class_names() -> None:
    binary = b"".join(len(name).to_bytes(4, "little") + name for name in (b"dog", b"7", b"cat"))
    head = json.dumps({"outputs": [{**NAMED, "parameters": {"binary_data_size": len(binary)}}]}).encode()
    raw = read(
        teacher("kserve_v2_binary", "label"),
        head + binary,
        **{"inference-header-content-length": str(len(head))},
    )
    assert raw.tolist() == [1, 2, 0]


TOP = [{"class": "cat", "probability": 0.5}]
BAD = (
    (teacher("dram"), b"<!DOCTYPE html><html>login</html>", "HTML page"),
    (teacher("dram"), b"", "is empty"),
    (teacher("dram"), b'{"probabilities": [[0.1, 0.', "breaks off or is no JSON"),
    (teacher("dram"), b"\xff\xfe\x00", "breaks off or is no JSON"),
    (teacher("dram"), b"[" * 100_000, "breaks off or is no JSON"),
    (teacher("dram"), b'{"probabilities": [[' + b"1" * 5000 + b"]]}", "breaks off or is no JSON"),
    (teacher("dram"), b'{"probabilities": [[NaN, 1, 0]]}', "holds NaN"),
    (teacher("dram", "top_k"), b'{"top_k": [[{"class": 0, "probability": NaN}]]}', "holds NaN"),
    (teacher("dram"), b'{"probabilities": [[-Infinity, 1, 0]]}', "holds -Infinity"),
    (teacher("dram"), [ROWS], "the answer must be a JSON object"),
    (teacher("dram"), {"logits": ROWS}, "no 'probabilities'; it has: 'logits'"),
    (teacher("dram"), {"probabilities": [[1], [1, 2]]}, "rows of the same length"),
    (teacher("dram"), {"probabilities": [["0.5", "0.5", 0]]}, "must be numbers"),
    (teacher("dram"), {"probabilities": [[True, False, False]]}, "must be numbers"),
    (teacher("dram"), {"probabilities": [[None, 1, 0]]}, "must be numbers"),
    (teacher("dram"), {"probabilities": 0.5}, "must be a list"),
    (teacher("dram"), {"probabilities": [[10**400, 0, 0]]}, "range of a float"),
    (teacher("dram"), b'{"probabilities": ' + b"[" * 80 + b"1" + b"]" * 80 + b"}", "a row for each image"),
    (
        teacher("dram", "top_k"),
        {"top_k": [TOP, TOP, [{"class": 1, "probability": 10**400}]]},
        "range of a float",
    ),
    (teacher("dram"), {"probabilities": ROWS, "classes": ["cat", "dog"]}, "classes are not those"),
    (teacher("dram"), {"probabilities": ROWS, "classes": ["dog", "cat", "7"]}, "classes are not those"),
    (teacher("dram", "label"), {"labels": ["cat", "mouse", "dog"]}, "the class 'mouse'"),
    (teacher("dram", "label"), {"labels": ["cat", "3", "dog"]}, "the class '3'"),
    (teacher("dram", "label"), {"labels": "cat"}, "must be a list"),
    (teacher("dram", "top_k"), {"top_k": [TOP, TOP]}, "a list of 3 entries"),
    (teacher("dram", "top_k"), {"top_k": [TOP, TOP, [{"class": "cat"}]]}, '"probability"'),
    (teacher("dram", "top_k"), {"top_k": [TOP, TOP, "cat"]}, '"probability"'),
    (teacher("dram", "top_k"), {"top_k": [TOP, TOP, TOP * 2]}, "named class 'cat' twice"),
    (teacher("dram", "top_k"), {"top_k": [TOP, TOP, [{"class": -1, "probability": 1}]]}, "the class '-1'"),
    (teacher("dram", "top_k"), {"top_k": [TOP, TOP, [{"class": 1, "probability": "1"}]]}, "must be a number"),
    (teacher("kserve_v2"), {"error": "no"}, "'outputs' must be a list of tensors"),
    (teacher("kserve_v2"), {"outputs": []}, "'outputs' must be a list of tensors"),
    (teacher("kserve_v2"), {"outputs": [{**OUTPUT, "data": FLAT[:8]}]}, "has 8 values, but its shape is"),
    (teacher("kserve_v2"), {"outputs": [{**OUTPUT, "shape": "3x3", "data": FLAT}]}, "'shape' must be"),
    (teacher("kserve_v2"), {"outputs": [{**OUTPUT}]}, "must be a list"),
    (teacher("kserve_v2"), {"outputs": [{**OUTPUT, "shape": [1] * 100, "data": [1]}]}, "'shape' must be"),
    (teacher("kserve_v2"), {"outputs": [{**OUTPUT, "shape": [0, 10**30], "data": []}]}, "'shape' must be"),
    (
        teacher("kserve_v2"),
        {"outputs": [{**OUTPUT, "datatype": [], "parameters": {"binary_data_size": 0}}]},
        "'datatype' must be one of",
    ),
    (
        teacher("kserve_v2", output_name="gone"),
        {"outputs": [{**OUTPUT, "data": FLAT}]},
        "no output 'gone'; it has",
    ),
    (teacher("torchserve"), {"dog": 0.75, "cat": 0.25}, "named 2 of 3 classes"),
    (teacher("torchserve", "top_k"), {"code": 0.5}, "the class 'code'"),
    (teacher("torchserve"), {"cat": 10**400, "dog": 0, "7": 0}, "range of a float"),
    (teacher("tensorflow_serving"), {"outputs": ROWS}, "'predictions' must be"),
    (teacher("tensorflow_serving"), {"predictions": [{"a": [1], "b": [2]}]}, "they have: 'a', 'b'"),
)


@pytest.mark.parametrize(("spec", "body", "words"), BAD, ids=[f"answer{at}" for at in range(len(BAD))])
def test_an_answer_that_breaks_its_protocol_is_an_error_in_words(
    spec: HttpTeacher, body: Any, words: str
) -> None:
    with pytest.raises(TeacherError) as error:
        read(spec, body)
    assert words in error.value.detail
    assert len(error.value.detail) < 400


@pytest.mark.parametrize(
    ("datatype", "size", "length", "words"),
    [("FP32", 36, "9999", "Inference-Header-Content-Length"), ("FP32", 36, "-1", "Inference-Header-Content-Length"),
     ("FP32", 36, "9" * 5000, "Inference-Header-Content-Length"), ("FP32", 35, None, "as long as"),
     ("FP32", 32, None, "has 8 values"), ("BF16", 36, None, "'datatype' must be one of"),
     ("BYTES", 36, None, "BYTES tensor"), ("FP32", -1, None, "has 0 values"), ("FP32", "36", None, "has 0 values")],
    ids=[f"answer{at}" for at in range(9)],
)  # fmt: skip
def test_a_binary_answer_that_does_not_fit_is_an_error_in_words(
    datatype: str, size: Any, length: str | None, words: str
) -> None:
    output = {**OUTPUT, "datatype": datatype, "parameters": {"binary_data_size": size}}
    head = json.dumps({"outputs": [output]}).encode()
    headers = {"inference-header-content-length": length or str(len(head))}
    with pytest.raises(TeacherError) as error:
        read(teacher("kserve_v2_binary"), head + b"\xff" * 36, **headers)
    assert words in error.value.detail


def test_one_long_string_among_many_costs_no_more_than_it_is_long() -> None:
    body = {"labels": ["x" * 2**20, *["cat"] * 2**16]}
    with pytest.raises(TeacherError, match="the class 'xxx"):
        read(teacher("dram", "label"), body)


GUIDE = Path(__file__).parents[4] / "docs" / "black-box-teachers.md"


def test_the_answers_that_the_guide_shows_are_read() -> None:
    shown = re.findall(r"<!-- answer: (\w+) (\w+) -->\n```json\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert {protocol for protocol, _, _ in shown} == set(WireProtocol) - {WireProtocol.KSERVE_V2_BINARY}
    for protocol, answers, body in shown:
        images = 1 if protocol == "torchserve" else 2
        spec = teacher(protocol, answers).model_copy(update={"classes": ("cat", "dog", "fox")})
        raw = read(spec, body.encode(), images)
        rows = read_answers(raw, spec.answers, 3, images)
        assert np.nanargmax(rows, axis=1).tolist() == [0, 2][:images]


def test_the_endpoint_that_the_guide_shows_answers() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "guide"}
    exec(code, names)  # our own page
    names["Handler"].log_message = lambda *_: None
    with names["ThreadingHTTPServer"](("127.0.0.1", 0), names["Handler"]) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        spec = teacher("dram").model_copy(update={"source": f"http://{address}/"})
        egress = Egress([address])
        rows = HttpEndpoint(spec, egress, {}).answer(IMAGES)
        server.shutdown()
        egress.close()
    assert rows[:, 0] == pytest.approx(BATCH.mean(axis=(1, 2, 3)) / 255, abs=1e-5)
