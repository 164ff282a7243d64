"""Uploaded ONNX files: good ones answer, bad ones are refused in words, and this process stays unharmed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.errors import TeacherError
from models.teachers import onnx_file
from models.teachers.black_box import AnswerKind, InputFormat, OnnxTeacher, Pixels
from models.teachers.onnx_file import Limits, OnnxFile, inspect

SIZE = 6
CLASSES = ("red", "green", "blue")
LIMITS = Limits(memory=768 << 20, load_s=20, call_s=10)
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]

Nodes = list[onnx.NodeProto]


def _value(name: str, shape: list[Any], dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _constant(name: str, values: object, dtype: type = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def _model(
    nodes: Nodes,
    constants: list[onnx.TensorProto] | None = None,
    *,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
    **more: Any,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "teacher",
        inputs or [_value("image", ["N", 3, SIZE, SIZE])],
        outputs or [_value("probabilities", ["N", 3])],
        constants or [],
    )
    return helper.make_model(graph, **{"opset_imports": OPSETS, "ir_version": 8, **more})


def _mean_colour() -> Nodes:
    """image -> logits: four times the mean of each channel."""
    return [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Mul", ["mean", "four"], ["logits"]),
    ]


FOUR = _constant("four", 4, np.float32)
SOFTMAX = helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)


def _good(**more: Any) -> onnx.ModelProto:
    return _model([*_mean_colour(), SOFTMAX], [FOUR], **more)


def _expected(images: list[Pixels]) -> np.ndarray[Any, Any]:
    logits = 4 * np.stack([image.mean(axis=(0, 1)) / 255 for image in images])
    exponentials = np.exp(logits)
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def _images(count: int, size: int = SIZE) -> list[Pixels]:
    return list(np.random.default_rng(1).integers(0, 256, (count, size, size, 3), np.uint8))


def _saved(folder: Path, model: onnx.ModelProto | bytes) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def _spec(path: Path, **changes: Any) -> OnnxTeacher:
    known = {
        "name": "teacher",
        "title": "Teacher",
        "classes": CLASSES,
        "input": InputFormat(height=SIZE, width=SIZE),
        "source": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "parameters": 1,
        "input_name": "image",
        "output_name": "probabilities",
    }
    return OnnxTeacher.model_validate({**known, **changes})


@pytest.fixture(autouse=True)
def _no_child_is_left() -> Iterator[None]:
    yield
    assert _sandboxes() == []


def _sandboxes() -> list[psutil.Process]:
    """The children that run uploaded files; a session of tests has others, too."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("onnx_sandbox" in part for part in child.cmdline())]


# --- what works -----------------------------------------------------------------------------------------------


def test_a_file_answers_each_image_in_its_batch(tmp_path: Path) -> None:
    path = _saved(tmp_path, _good())
    images = _images(70)  # more than one call
    with OnnxFile(path, _spec(path), LIMITS) as box:
        np.testing.assert_allclose(box.answer(images), _expected(images), atol=1e-6)
        np.testing.assert_allclose(box.answer(images[:1]), _expected(images[:1]), atol=1e-6)
        assert box.answer([]).shape == (0, 3)
        assert len(_sandboxes()) == 1


def test_facts_say_what_a_file_takes_and_gives(tmp_path: Path) -> None:
    outputs = [_value("logits", ["N", 3]), _value("probabilities", ["N", 3]), _value("image2", [None] * 4)]
    nodes = [*_mean_colour(), SOFTMAX, helper.make_node("Identity", ["image"], ["image2"])]
    path = _saved(tmp_path, _model(nodes, [FOUR], outputs=outputs))
    facts = inspect(path, LIMITS)
    assert facts.format == InputFormat(height=SIZE, width=SIZE)
    assert facts.input_shape == (None, 3, SIZE, SIZE)
    assert (facts.input_name, facts.input_dtype, facts.dynamic_batch) == ("image", "float32", True)
    assert (facts.parameters, facts.bytes) == (1, path.stat().st_size)
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    told = [(output.name, output.classes, output.looks_like) for output in facts.outputs]
    assert told == [("logits", 3, AnswerKind.LOGITS), ("probabilities", 3, AnswerKind.PROBABILITIES)]
    assert [output.name for output in inspect(path, LIMITS, output="logits").outputs] == ["logits"]


def test_bytes_with_channels_last_and_a_batch_of_one_are_fed_as_they_must_be(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["bytes"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("ArgMax", ["mean"], ["label"], axis=1, keepdims=0),
    ]
    model = _model(
        nodes,
        inputs=[_value("bytes", [1, SIZE, SIZE, 3], TensorProto.UINT8)],
        outputs=[_value("label", [1], TensorProto.INT64)],
    )
    path = _saved(tmp_path, model)
    facts = inspect(path, LIMITS)
    assert facts.format == InputFormat(height=SIZE, width=SIZE, layout="NHWC", dtype="uint8", range="0..255")
    assert not facts.dynamic_batch
    assert [(output.classes, output.looks_like) for output in facts.outputs] == [(0, AnswerKind.LABEL)]
    images = _images(5)
    spec = _spec(path, input=facts.format, answers="label", output_name="label")
    with OnnxFile(path, spec, LIMITS) as box:
        np.testing.assert_array_equal(box.answer(images).argmax(axis=1), _expected(images).argmax(axis=1))


def test_half_precision_and_functions_of_the_file_itself_are_accepted(tmp_path: Path) -> None:
    function = helper.make_function(
        "my.library", "Half", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], OPSETS[:1]
    )
    nodes = [
        helper.make_node("Half", ["image"], ["twice"], domain="my.library"),
        helper.make_node("ReduceMean", ["twice"], ["logits"], axes=[2, 3], keepdims=0),
        SOFTMAX,
    ]
    model = _model(
        nodes,
        inputs=[_value("image", ["N", 3, SIZE, SIZE], TensorProto.FLOAT16)],
        outputs=[_value("probabilities", ["N", 3], TensorProto.FLOAT16)],
        functions=[function],
        opset_imports=[*OPSETS, helper.make_opsetid("my.library", 1)],
    )
    path = _saved(tmp_path, model)
    assert inspect(path, LIMITS).input_dtype == "float16"
    with OnnxFile(path, _spec(path), LIMITS) as box:
        np.testing.assert_allclose(box.answer(_images(2)).sum(axis=1), 1, atol=1e-6)


def test_an_input_of_any_size_takes_the_stated_one(tmp_path: Path) -> None:
    path = _saved(tmp_path, _good(inputs=[_value("image", ["N", "C", "H", "W"])]))
    stated = InputFormat(height=9, width=5)
    assert inspect(path, LIMITS, stated).format == stated
    with pytest.raises(TeacherError, match="leaves open how large") as refused:
        inspect(path, LIMITS)
    assert refused.value.hint.startswith("State `input`")


# --- what is refused at upload --------------------------------------------------------------------------------


def _outside(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The same tensor, said to lie in a file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def _branches(*nodes: onnx.NodeProto) -> onnx.NodeProto:
    """An If of which one branch holds the nodes, which give `logits`."""
    other = [helper.make_node("Neg", ["mean"], ["logits"])]
    branches = [
        helper.make_graph(list(a), "branch", [], [_value("logits", ["N", 3])]) for a in (nodes, other)
    ]
    return helper.make_node("If", ["yes"], ["logits"], then_branch=branches[0], else_branch=branches[1])


def _external_in_subgraph() -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["seven"], value=_outside(_constant("seven", 7, np.float32)))
    mean = helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0)
    branch = _branches(constant, helper.make_node("Mul", ["mean", "seven"], ["logits"]))
    return _model([mean, branch, SOFTMAX], [_constant("yes", True, bool)])


def _external_in_function() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Constant", [], ["c"], value=_outside(_constant("c", 7, np.float32))),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    function = helper.make_function("own", "Plus", ["x"], ["y"], nodes, OPSETS[:1])
    imports = [*OPSETS, helper.make_opsetid("own", 1)]
    return _good(functions=[function], opset_imports=imports)


def _external_sparse() -> onnx.ModelProto:
    model = _good()
    sparse = helper.make_sparse_tensor(_outside(_constant("s", [1.0], np.float32)), _constant("i", [0]), [9])
    model.graph.sparse_initializer.append(sparse)
    return model


def _sparse_bomb() -> onnx.ModelProto:
    model = _good()
    sparse = helper.make_sparse_tensor(_constant("s", [1.0], np.float32), _constant("i", [0]), [1 << 40])
    model.graph.sparse_initializer.append(sparse)
    return model


def _fill_bomb(fill: str) -> onnx.ModelProto:
    """Adds the sum of 8 GiB of zeros to the logits."""
    nodes = {
        "ConstantOfShape": [helper.make_node("ConstantOfShape", ["huge"], ["zeros"])],
        "Expand": [helper.make_node("Expand", ["nought", "huge"], ["zeros"])],
    }[fill]
    nodes = [
        *_mean_colour(),
        *nodes,
        helper.make_node("ReduceMax", ["zeros"], ["sum"], keepdims=0),
        helper.make_node("Add", ["logits", "sum"], ["more"]),
        helper.make_node("Softmax", ["more"], ["probabilities"], axis=1),
    ]
    return _model(nodes, [FOUR, _constant("huge", [1 << 31]), _constant("nought", 0, np.float32)])


def _endless() -> onnx.ModelProto:
    """A Loop that turns 2^62 times."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Cos", ["before"], ["after"]),
        ],
        "body",
        [
            _value("turn", [], TensorProto.INT64),
            _value("go", [], TensorProto.BOOL),
            _value("before", ["N", 3]),
        ],
        [_value("on", [], TensorProto.BOOL), _value("after", ["N", 3])],
    )
    loop = helper.make_node("Loop", ["turns", "yes", "logits"], ["end"], body=body)
    softmax = helper.make_node("Softmax", ["end"], ["probabilities"], axis=1)
    constants = [FOUR, _constant("turns", 1 << 62), _constant("yes", True, bool)]
    return _model([*_mean_colour(), loop, softmax], constants)


def _function_chain(length: int, calls: int) -> onnx.ModelProto:
    """Functions of which each calls the next one `calls` times."""
    functions = []
    for at in range(length):
        last = at == length - 1
        names = ["x", *(f"v{step}" for step in range(calls - 1)), "y"]
        nodes = [
            helper.make_node("Abs" if last else f"F{at + 1}", [a], [b], domain="" if last else "own")
            for a, b in pairwise(names)
        ]
        imports = [OPSETS[0], helper.make_opsetid("own", 1)]
        functions.append(helper.make_function("own", f"F{at}", ["x"], ["y"], nodes, imports))
    call = helper.make_node("F0", ["logits"], ["probabilities"], domain="own")
    imports = [*OPSETS, helper.make_opsetid("own", 1)]
    return _model([*_mean_colour(), call], [FOUR], functions=functions, opset_imports=imports)


def _nested(depth: int) -> onnx.ModelProto:
    node = helper.make_node("Abs", ["mean"], ["logits"])
    for _ in range(depth):
        node = _branches(node)
    mean = helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0)
    return _model([mean, node, SOFTMAX], [_constant("yes", True, bool)])


def _two_inputs() -> onnx.ModelProto:
    return _good(inputs=[_value("image", ["N", 3, SIZE, SIZE]), _value("mask", ["N", 1])])


def _embedding_only() -> onnx.ModelProto:
    nodes = [helper.make_node("Identity", ["image"], ["features"])]
    return _model(nodes, outputs=[_value("features", ["N", 3, SIZE, SIZE])])


def _nan() -> onnx.ModelProto:
    nodes = [*_mean_colour(), helper.make_node("Sub", ["logits", "hundred"], ["minus"])]
    nodes.append(helper.make_node("Sqrt", ["minus"], ["probabilities"]))
    return _model(nodes, [FOUR, _constant("hundred", 100, np.float32)])


def _softmax_over_batch() -> onnx.ModelProto:
    softmax = helper.make_node("Softmax", ["logits"], ["probabilities"], axis=0)
    return _model([*_mean_colour(), softmax], [FOUR])


def _batch_of_one_inside() -> onnx.ModelProto:
    nodes = [*_mean_colour(), helper.make_node("ReduceMean", ["logits"], ["probabilities"], axes=[0])]
    return _model(nodes, [FOUR], outputs=[_value("probabilities", [1, 3])])


def _reshaped_to_one() -> onnx.ModelProto:
    reshape = helper.make_node("Reshape", ["logits", "shape"], ["probabilities"])
    return _model([*_mean_colour(), reshape], [FOUR, _constant("shape", [1, 3])])


def _wrong_types() -> onnx.ModelProto:
    model = _good()
    model.graph.initializer.append(_constant("more", [[1, 2, 3]]))
    model.graph.node[1].input[1] = "more"  # float times int64
    return model


def _from_the_future() -> onnx.ModelProto:
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    return _model([*nodes, SOFTMAX], opset_imports=[helper.make_opsetid("", 9999)])


def _input(shape: list[Any], dtype: int = TensorProto.FLOAT) -> Callable[[], onnx.ModelProto]:
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["probabilities"]),
    ]
    values = [_value("image", shape, dtype)]
    return lambda: _model(nodes, inputs=values, outputs=[_value("probabilities", [None, None])])


BAD: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "empty": (lambda: b"", "holds no graph"),
    "random": (lambda: np.random.default_rng(0).bytes(5000), "no ONNX file"),
    "truncated": (lambda: _good().SerializeToString()[:-40], "no ONNX file, or not all of it"),
    "torch": (lambda: b"PK\x03\x04" + b"\0" * 100, "torch.save"),
    "html": (lambda: b"<html>Not found</html>", "HTML"),
    "external": (
        lambda: _model([*_mean_colour(), SOFTMAX], [_outside(_constant("four", 4, np.float32))]),
        "lies outside the file",
    ),
    "external_in_subgraph": (_external_in_subgraph, "'seven' lies outside the file"),
    "external_in_function": (_external_in_function, "'c' lies outside the file"),
    "external_sparse": (_external_sparse, "'s' lies outside the file"),
    "custom_domain": (
        lambda: _model([helper.make_node("Run", ["image"], ["probabilities"], domain="evil.ops")]),
        "operator 'Run' of the domain 'evil.ops'",
    ),
    "custom_in_subgraph": (
        lambda: _model([_branches(helper.make_node("Fused", ["image"], ["logits"], domain="com.microsoft"))]),
        "'com.microsoft'",
    ),
    "sparse_bomb": (_sparse_bomb, "more than 200,000,000 elements"),
    "fill_bomb": (lambda: _fill_bomb("ConstantOfShape"), "needs more memory than the 768 MiB"),
    "expand_bomb": (lambda: _fill_bomb("Expand"), "needs more memory than the 768 MiB"),
    "long_chain": (lambda: _function_chain(2000, 1), "more than 16 levels"),
    "billion_laughs": (lambda: _function_chain(12, 10), "more than 50,000 operators"),
    "deep": (lambda: _nested(20), "nested deeper than 16"),
    "invalid": (_wrong_types, "checker finds the file invalid"),
    "unknown_opset": (_from_the_future, "Opset 9999"),
    "two_inputs": (_two_inputs, "has 2 inputs: 'image'"),
    "flat_input": (_input(["N", 108]), "must have four dimensions"),
    "integer_input": (_input(["N", 3, SIZE, SIZE], TensorProto.INT64), "must take float32, float16 or uint8"),
    "batch_of_eight": (_input([8, 3, SIZE, SIZE]), "exactly 8 images"),
    "five_channels": (_input(["N", 5, SIZE, SIZE]), "3 channels (RGB) or 1"),
    "no_answers": (_embedding_only, "no output of the shape [N, classes]: it has 'features'"),
    "nan": (_nan, "NaN or infinity for an image of noise"),
    "softmax_over_batch": (_softmax_over_batch, "softmax over the classes, not over the batch"),
    "reshaped_to_one": (_reshaped_to_one, "the graph fails on 2 image(s) of shape [3, 6, 6]"),
    "batch_of_one_inside": (_batch_of_one_inside, "shape [1, 3], expected [2, 3]"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_bad_file_is_refused_with_what_is_wrong_and_how_to_mend_it(name: str, tmp_path: Path) -> None:
    make, words = BAD[name]
    path = _saved(tmp_path, make())
    with pytest.raises(TeacherError) as refused:
        inspect(path, LIMITS)
    assert words in f"{refused.value.detail} {refused.value.hint}"
    assert refused.value.hint


def test_an_endless_loop_is_ended(tmp_path: Path) -> None:
    path = _saved(tmp_path, _endless())
    started = time.monotonic()
    with pytest.raises(TeacherError, match=r"answering 1 image\(s\) took longer than 0.5 s"):
        inspect(path, Limits(call_s=0.5))
    assert time.monotonic() - started < 10


def test_loading_has_its_time_too(tmp_path: Path) -> None:
    path = _saved(tmp_path, _good())
    with pytest.raises(TeacherError, match=r"loading the teacher took longer than 0.02 s"):
        inspect(path, Limits(load_s=0.02))


def test_slow_outputs_are_not_all_tried_one_by_one(tmp_path: Path) -> None:
    outputs = [_value(name, ["N", 3]) for name in ("probabilities", "logits")]
    path = _saved(tmp_path, _good(outputs=outputs))
    hasty = Limits(tries_s=0.0)
    with pytest.raises(TeacherError, match="trying the graph's 2 outputs takes longer than 0 s") as refused:
        inspect(path, hasty)
    assert "output_name" in refused.value.hint
    assert [facts.name for facts in inspect(path, hasty, output="logits").outputs] == ["logits"]


def test_what_was_stated_must_fit_the_graph(tmp_path: Path) -> None:
    path = _saved(tmp_path, _good())
    with pytest.raises(TeacherError, match=r"`input` states float32 \[N, 6, 6, 3\]"):
        inspect(path, LIMITS, InputFormat(height=SIZE, width=SIZE, layout="NHWC"))
    with pytest.raises(TeacherError, match="no output 'scores'"):
        inspect(path, LIMITS, output="scores")


def test_a_file_that_is_too_large_is_not_even_read(tmp_path: Path) -> None:
    path = _saved(tmp_path, _good())
    with pytest.raises(TeacherError, match="at most 100 are accepted"):
        inspect(path, Limits(bytes=100))
    with pytest.raises(TeacherError, match="cannot be read"):
        inspect(tmp_path / "missing.onnx", LIMITS)


# --- what goes wrong while a job asks -------------------------------------------------------------------------


def test_a_file_that_was_accepted_is_asked_whatever_its_size(tmp_path: Path) -> None:
    path = _saved(tmp_path, _good())
    with OnnxFile(path, _spec(path), Limits(bytes=100)) as box:
        assert box.answer(_images(1)).shape == (1, 3)


def test_a_class_list_of_another_length_is_told(tmp_path: Path) -> None:
    path = _saved(tmp_path, _good())
    with (
        OnnxFile(path, _spec(path, classes=("a", "b", "c", "d")), LIMITS) as box,
        pytest.raises(TeacherError, match="it has 3 outputs, the class list 4 names"),
    ):
        box.answer(_images(2))


def test_logits_said_to_be_probabilities_are_told(tmp_path: Path) -> None:
    path = _saved(tmp_path, _model(_mean_colour(), [FOUR], outputs=[_value("logits", ["N", 3])]))
    images = _images(9)
    with (
        OnnxFile(path, _spec(path, output_name="logits"), LIMITS) as box,
        pytest.raises(TeacherError) as told,
    ):
        box.answer(images)
    assert "'logits'" in told.value.hint
    with OnnxFile(path, _spec(path, output_name="logits", answers="logits"), LIMITS) as box:
        np.testing.assert_allclose(box.answer(images), _expected(images), atol=1e-6)


def test_another_file_than_the_one_uploaded_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path, _good())
    box = OnnxFile(path, _spec(path, source="0" * 64), LIMITS)
    with pytest.raises(TeacherError, match="not the one that was uploaded"):
        box.answer(_images(1))


def test_a_crash_costs_one_call_and_the_next_one_is_answered(tmp_path: Path) -> None:
    path = _saved(tmp_path, _endless())
    with OnnxFile(path, _spec(path), LIMITS) as box:
        crash = threading.Timer(2, lambda: os.kill(_sandboxes()[0].pid, signal.SIGSEGV))
        crash.start()
        with pytest.raises(TeacherError, match=r"process ended \(signal SIGSEGV\)"):
            box.answer(_images(1))
    path = _saved(tmp_path, _good())
    with OnnxFile(path, _spec(path), LIMITS) as box:
        box.answer(_images(1))
        (child,) = _sandboxes()
        child.kill()
        child.wait()
        np.testing.assert_allclose(box.answer(_images(3)), _expected(_images(3)), atol=1e-6)


def test_closing_ends_a_call_under_way(tmp_path: Path) -> None:
    path = _saved(tmp_path, _endless())
    box = OnnxFile(path, _spec(path), LIMITS)
    threading.Timer(1.5, box.close).start()
    with pytest.raises(TeacherError, match="closed"):
        box.answer(_images(1))
    with pytest.raises(TeacherError, match="is closed"):
        box.answer(_images(1))


def test_the_child_outlives_the_thread_that_asked_but_not_the_process(tmp_path: Path) -> None:
    path = _saved(tmp_path, _good())
    (tmp_path / "spec.json").write_text(_spec(path).model_dump_json())
    program = f"""
        import json, threading, time, psutil, numpy as np
        from pathlib import Path
        from models.teachers.black_box import OnnxTeacher
        from models.teachers.onnx_file import OnnxFile
        spec = OnnxTeacher.model_validate_json(Path({str(tmp_path / "spec.json")!r}).read_text())
        box = OnnxFile(Path({str(path)!r}), spec)
        images = [np.zeros(({SIZE}, {SIZE}, 3), np.uint8)]
        children = []
        for turn in range(2):
            asking = threading.Thread(target=box.answer, args=(images,))
            asking.start()
            asking.join()
            children.append(psutil.Process().children()[0].pid)
        print(json.dumps(children), flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process:
        first, second = json.loads(process.stdout.readline())
        child = psutil.Process(first)
        process.kill()
    assert first == second
    child.wait(30)


HOSTILE = {
    "endless_header": "send(2**32 - 1, 2**32 - 1, b'')",
    "no_json": "send(3, 0, b'abc')",
    "no_facts": "send(2, 0, b'{}'); sys.stdout.flush(); time.sleep(60)",
    "half_a_frame": "send(100, 0, b'{')",
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_child_that_was_taken_over_is_not_believed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import struct, sys, time\n"
        "def send(header, payload, rest): sys.stdout.buffer.write(struct.pack('>II', header, payload) + rest)\n"
        + HOSTILE[name]
    )
    monkeypatch.setattr(onnx_file, "PROGRAM", program)
    with pytest.raises(TeacherError, match=r"the teacher's process ended \((exit status 0|signal SIGKILL)\)"):
        inspect(_saved(tmp_path, _good()), LIMITS)


def test_the_child_can_neither_write_nor_find_files(tmp_path: Path) -> None:
    path = _saved(tmp_path, _good())
    with OnnxFile(path, _spec(path), LIMITS) as box:
        box.answer(_images(1))
        (child,) = _sandboxes()
        limits = Path(f"/proc/{child.pid}/limits").read_text()
        assert child.environ().keys() == {"LANG", "MALLOC_ARENA_MAX", "OPENBLAS_NUM_THREADS"}
        assert str(Path(f"/proc/{child.pid}/cwd").readlink()).endswith("(deleted)")
        assert os.getsid(child.pid) == child.pid
    assert [line.split()[-3:-1] for line in limits.splitlines() if line.startswith("Max file size")] == [
        ["0", "0"]
    ]
