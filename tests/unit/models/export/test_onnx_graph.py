import json

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from models import students, teachers
from models.data import images
from models.errors import ExportError
from models.export import onnx_graph, parity
from models.stages import ExportParams

MEAN, STD = (0.1, 0.45, 0.8), (0.2, 0.3, 0.5)


class Pixels(nn.Module):
    """Lets the preprocessed pixels through: they are the logits."""

    def forward(self, pixels):
        return pixels.flatten(1)


def preprocessed(runtime, batch):
    """What the graph feeds its network, up to one constant per image, read back through the softmax."""
    return np.log(runtime.run(None, {"image": batch})[0])


@pytest.fixture(scope="module")
def seeing():
    """Session of a graph that shows its preprocessing, at 16 x 16."""
    graph = onnx_graph.build(Pixels(), 16, MEAN, STD)
    return parity.session(onnx_graph.to_bytes(graph))


@pytest.mark.parametrize("size", [(7, 5), (16, 16), (15, 17), (33, 51), (200, 31), (9, 300), (1, 1)])
def test_the_graph_resizes_and_normalises_as_training_does(seeing, size):
    batch = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    resized = images.resize(torch.from_numpy(batch).permute(0, 3, 1, 2), 16)
    expected = images.normalise(resized, MEAN, STD).flatten(1).log_softmax(1).numpy()
    assert preprocessed(seeing, batch) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("size", [(40, 61), (7, 9)])
def test_the_graph_resizes_as_pillow_does(seeing, size):
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR)) / 255
    expected = ((resized - MEAN) / STD).transpose(2, 0, 1).ravel()
    found = preprocessed(seeing, pixels[None])[0]
    difference = (found - found.mean()) - (expected - expected.mean())
    assert np.abs(difference).max() < 1.5 / 255 / min(STD)  # Pillow rounds to whole levels, twice


@pytest.mark.parametrize("name", sorted(students.STUDENTS))
def test_every_student_answers_in_onnxruntime_as_in_pytorch(name):
    torch.manual_seed(0)
    size = max(students.spec_of(name).min_input_size, 32)
    network = students.build(name, 4, size)
    network.train()
    with torch.no_grad():  # give batch norm statistics that matter
        network(torch.randn(16, 3, size, size) * 2 + 1)
    graph = onnx_graph.build(network.eval(), size, MEAN, STD)
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
    runtime = parity.session(onnx_graph.to_bytes(graph))
    reference = parity.Reference(network, size, MEAN, STD)
    random = np.random.default_rng(0)
    for shape in ((1, 50, 43, 3), (5, 21, 70, 3)):
        batch = random.integers(0, 256, shape, dtype=np.uint8)
        scores = runtime.run(None, {"image": batch})[0]
        assert scores.shape == (shape[0], 4)
        assert scores == pytest.approx(reference.probabilities(batch), abs=1e-4)


def test_onnx_own_reference_implementation_agrees(student):
    graph = onnx_graph.build(student.network, student.input_size, student.mean, student.std)
    batch = np.random.default_rng(3).integers(0, 256, (1, 40, 27, 3), dtype=np.uint8)
    (expected,) = onnx.reference.ReferenceEvaluator(graph).run(None, {"image": batch})
    (found,) = parity.session(onnx_graph.to_bytes(graph)).run(None, {"image": batch})
    assert found == pytest.approx(expected, abs=1e-4)


def test_exporting_twice_gives_equal_bytes_that_tell_nothing_of_this_machine(student):
    def export():
        properties = {"b": "2", "a": "1"}
        graph = onnx_graph.build(student.network, student.input_size, student.mean, student.std, properties)
        return onnx_graph.to_bytes(graph)

    first = export()
    assert export() == first
    graph = onnx.load_from_string(first)
    assert b"site-packages" not in first
    assert b".py" not in first
    assert [entry.key for entry in graph.metadata_props] == ["a", "b"]
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)


def test_input_and_output_have_dynamic_sizes_and_standard_operators(student):
    graph = onnx_graph.build(student.network, student.input_size, student.mean, student.std)
    (image,), (output,) = graph.graph.input, graph.graph.output
    sides = [side.dim_param or side.dim_value for side in image.type.tensor_type.shape.dim]
    assert (image.name, image.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    assert sides == ["batch", "height", "width", 3]
    assert output.name == "probabilities"
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
    assert graph.ir_version == 8


def test_a_graph_with_foreign_operators_is_refused():
    node = onnx.helper.make_node("FusedConv", ["x"], ["y"], domain="com.microsoft")
    graph = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    with pytest.raises(ExportError, match=r"com\.microsoft\.FusedConv"):
        onnx_graph.require_standard_operators(graph)


def test_a_network_that_cannot_be_exported_is_an_export_error():
    class Branches(nn.Module):
        def forward(self, pixels):
            return pixels.flatten(1) if pixels.sum() > 0 else pixels.flatten(1) * 2

    with pytest.raises(ExportError, match="cannot be written as an ONNX graph"):
        onnx_graph.build(Branches(), 8, MEAN, STD)


def test_export_writes_the_graph_its_proof_and_golden_images(context_of, sources, student):
    context = context_of("export", sources)
    onnx_graph.run(context, ExportParams(max_accuracy_drop=0.03))
    out = context.output
    assert not (out / "model.int8.onnx").exists()
    session = onnxruntime.InferenceSession(out / "model.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["labels"]) == ["käse", "red brick", "sky"]
    assert (facts["input_size"], facts["colour_order"]) == ("32", "RGB")
    assert json.loads(facts["std"]) == pytest.approx(images.STD)
    spec = teachers.TEACHERS["efficientnet_lite0"]
    assert (facts["teacher"], facts["teacher_licence"]) == (spec.name, "Apache-2.0")

    export = json.loads((out / "export.json").read_text())
    assert export["parameters"] == sum(p.numel() for p in student.network.parameters())
    assert export["bytes"] == (out / "model.onnx").stat().st_size
    assert export["max_accuracy_drop"] == 0.03
    assert export["int8"] == {"asked": False, "made": False, "reason": ""}
    assert json.loads((out / "parity.json").read_text())["largest_difference"] < 1e-4

    golden = json.loads((out / "golden.json").read_text())
    assert len(golden["images"]) == 8
    assert {image["label"] for image in golden["images"]} == {"käse", "red brick", "sky"}
    for image in golden["images"]:
        pixels = np.asarray(Image.open(out / image["file"]))[None]
        (scores,) = session.run(None, {"image": pixels})
        assert scores[0] == pytest.approx(image["scores"]["model.onnx"], abs=1e-4)


def test_export_fails_when_the_graph_does_not_answer_as_the_network(context_of, sources, monkeypatch):
    honest = onnx_graph.build

    def swapped(network, input_size, mean, std, properties=None):
        return honest(network, input_size, mean[::-1], std, properties)

    monkeypatch.setattr(onnx_graph, "build", swapped)
    with pytest.raises(ExportError, match="ONNX Runtime and PyTorch differ"):
        onnx_graph.run(context_of("export", sources), ExportParams())
