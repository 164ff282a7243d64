import numpy as np
import onnx
import pytest

from models.errors import ExportError
from models.export import onnx_graph, parity, quantise, samples


@pytest.fixture(scope="module")
def graph(student):
    return onnx_graph.build(student.network, student.input_size, student.mean, student.std, {"labels": "[]"})


@pytest.fixture(scope="module")
def int8(graph, splits):
    return quantise.static_int8(graph, samples.calibration(splits["support"], splits["unlabelled"], 24))


def test_nearly_all_numbers_are_8_bit_and_the_file_is_a_third(graph, int8):
    assert quantise.int8_weight_share(graph) == 0
    assert quantise.int8_weight_share(int8) > 0.95
    assert len(onnx_graph.to_bytes(int8)) < len(onnx_graph.to_bytes(graph)) / 3


def test_weights_keep_to_7_bits_so_that_old_processors_do_not_saturate(int8):
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in int8.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    assert weights
    assert all(np.abs(weight.astype(int)).max() <= 64 for weight in weights)


def test_input_output_and_metadata_stay(graph, int8):
    assert int8.graph.input == graph.graph.input
    assert [output.name for output in int8.graph.output] == ["probabilities"]
    assert "labels" in {entry.key for entry in int8.metadata_props}
    assert [(entry.domain, entry.version) for entry in int8.opset_import] == [("", 18)]


def test_preprocessing_and_softmax_stay_in_float(int8):
    producers = {output: node for node in int8.graph.node for output in node.output}
    for node in int8.graph.node:
        if node.op_type in ("Resize", "Softmax", "Transpose"):
            before = producers.get(node.input[0])
            assert before is None or before.op_type != "DequantizeLinear", node.op_type


def test_it_gives_nearly_the_same_scores(graph, int8, splits):
    full, small = (parity.session(onnx_graph.to_bytes(each)) for each in (graph, int8))
    test = list(samples.stream(splits["test"]))
    scores = [
        np.concatenate([session.run(None, {"image": image.pixels[None]})[0] for image in test])
        for session in (full, small)
    ]
    assert np.abs(scores[0] - scores[1]).mean() < 0.03
    assert not np.array_equal(*scores)


def test_quantising_leaves_the_float_graph_as_it_was(graph, student, splits):
    before = onnx_graph.to_bytes(graph)
    quantise.static_int8(graph, samples.calibration(splits["support"], None, 3))
    assert onnx_graph.to_bytes(graph) == before


def test_a_graph_without_weights_cannot_be_quantised():
    class Nothing(onnx_graph.nn.Module):
        def forward(self, pixels):
            return pixels.mean((2, 3))

    graph = onnx_graph.build(Nothing(), 8, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ExportError, match="nothing to quantise"):
        quantise.static_int8(graph, [np.zeros((8, 8, 3), dtype=np.uint8)])
