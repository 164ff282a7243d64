from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from models import students
from models.errors import TrainingError


def multiply_adds(network: nn.Module, size: int) -> int:
    """Counted from the shapes that pass, layer by layer."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weight: Tensor = module.weight  # type: ignore[assignment]
        total += output[0].numel() * weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    network.eval()(torch.zeros(1, 3, size, size))
    return total


@pytest.mark.parametrize("name", students.STUDENTS)
def test_the_registry_tells_the_true_size_and_cost(name: str) -> None:
    spec = students.STUDENTS[name]
    network = students.build(name, 10, spec.input_size)
    assert sum(parameter.numel() for parameter in network.parameters()) == spec.parameters
    assert multiply_adds(network, spec.input_size) == spec.macs


@pytest.mark.parametrize("name", students.STUDENTS)
@pytest.mark.parametrize("size", [32, 72])
def test_every_student_answers_with_logits_at_any_size_and_learns(name: str, size: int) -> None:
    network = students.build(name, 7, size)
    logits = network(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_conv4_has_the_layers_of_its_paper() -> None:
    network = students.build("conv4", 5, 84)
    shapes = [tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert shapes == [(64, 3, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3), (5, 1600)]


def test_unknown_students_and_sizes_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(TrainingError, match="no student 'conv5'") as caught:
        students.build("conv5", 10, 32)
    assert "conv4" in caught.value.hint
    with pytest.raises(TrainingError, match="32 to 224 pixels, not 256"):
        students.build("conv4", 10, 256)


def test_the_registries_are_read_without_torch() -> None:
    code = "import sys, models.methods, models.students, models.teachers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("name", "channels"), [("lenet5", (6, 16)), ("lenet5_half", (3, 8))])
def test_lenet5_has_the_layers_of_the_black_box_paper(name: str, channels: tuple[int, int]) -> None:
    first, second = channels
    network = students.build(name, 10, 28)
    shapes = [tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert shapes == [(first, 1, 5, 5), (second, first, 5, 5), (120, second * 36), (84, 120), (10, 84)]


def test_lenet5_sees_grey_only() -> None:
    network = students.build("lenet5", 10, 28)
    grey = torch.randn(2, 1, 28, 28)
    colours = grey + torch.tensor([0.5, -0.2, -0.3]).view(1, 3, 1, 1)
    torch.testing.assert_close(network(colours), network(grey.expand(-1, 3, -1, -1)))


def test_a_half_student_has_half_the_channels() -> None:
    def channels(name: str) -> list[int]:
        modules = students.build(name, 10, 32).modules()
        return [module.out_channels for module in modules if isinstance(module, nn.Conv2d)]

    for name in ("lenet5", "resnet8"):
        assert channels(f"{name}_half") == [count // 2 for count in channels(name)]
    assert channels("resnet8") == [16, 64, 64, 64, 128, 128, 128]
