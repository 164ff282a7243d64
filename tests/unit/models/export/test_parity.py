import numpy as np
import pytest
import torch

from models.errors import ExportError
from models.export import onnx_graph, parity, samples


@pytest.fixture(scope="module")
def graph(student):
    return onnx_graph.to_bytes(
        onnx_graph.build(student.network, student.input_size, student.mean, student.std)
    )


@pytest.fixture
def reference(student):
    return parity.Reference(student.network, student.input_size, student.mean, student.std)


@pytest.fixture(scope="module")
def real(splits):
    return samples.stratified(splits["support"], 9)


def test_an_exact_export_passes_in_every_batch_and_level(graph, reference, real):
    found = parity.check(graph, reference, real)
    # 9 images: 9 batches of one, 4 of two, 1 of seven, each with optimisations off and on
    assert (found.images, found.comparisons) == (9, 2 * (9 + 4 + 1))
    assert 0 <= found.largest_difference < 1e-4
    assert found.batches == (1, 2, 7)


def test_one_image_is_enough_for_every_batch(graph, reference, real):
    assert parity.check(graph, reference, real[:1]).comparisons == 2 * 3


def test_swapped_colours_are_found(graph, reference, real, student):
    wrong = parity.Reference(student.network, student.input_size, student.mean[::-1], student.std)
    with pytest.raises(ExportError, match=r"differ by .* on 'käse/0.jpg' \(batch 1, optimisations off\)"):
        parity.check(graph, wrong, real)


def test_a_weight_off_by_a_little_is_found(graph, real, student):
    class Nudged(torch.nn.Module):
        def forward(self, pixels):
            logits = student.network(pixels)
            return logits + torch.tensor([0.01, 0.0, 0.0])

    with pytest.raises(ExportError, match="differ"):
        parity.check(graph, parity.Reference(Nudged(), 32, student.mean, student.std), real)


def test_scores_that_are_no_numbers_are_an_error(graph, real, student):
    class Broken(torch.nn.Module):
        def forward(self, pixels):
            return student.network(pixels) * float("nan")

    with pytest.raises(ExportError, match="are no numbers"):
        parity.check(graph, parity.Reference(Broken(), 32, student.mean, student.std), real)


def test_another_best_class_is_an_error_unless_it_is_a_tie():
    tie = np.array([[0.50001, 0.49999]], dtype=np.float32)
    assert parity._compare(tie[:, ::-1], tie, ["a"], "here") == pytest.approx(2e-5, rel=0.01)
    # within the tolerance of each score, yet clearly another class: many classes, each a little off
    apart = np.full((1, 3), 1 / 3, dtype=np.float32)
    apart[0, 0] += 2e-3
    moved = apart.copy()
    moved[0] = moved[0, [1, 0, 2]]
    with pytest.raises(ExportError):
        parity._compare(moved, apart, ["a"], "here")


def test_no_images_prove_nothing(graph, reference):
    with pytest.raises(ExportError, match="no image"):
        parity.check(graph, reference, [])
