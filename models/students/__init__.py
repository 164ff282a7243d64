"""The students that can be trained: sizes and costs. Declares only: no torch at import."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from models.errors import TrainingError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class StudentSpec:
    """`parameters` and `macs` (multiply-adds for one image) hold for 10 classes at `input_size`."""

    name: str
    title: str
    family: Literal["conv4", "lenet5", "resnet8", "resnet12", "timm"]
    parameters: int
    macs: int
    input_size: int
    licence: str
    min_input_size: int = 32
    max_input_size: int = 224


STUDENTS: dict[str, StudentSpec] = {
    spec.name: spec
    for spec in (
        StudentSpec("conv4", "Conv4-64", "conv4", 115_402, 14_158_336, 32, "Apache-2.0"),
        StudentSpec("lenet5", "LeNet-5", "lenet5", 82_826, 512_040, 28, "Apache-2.0", min_input_size=28),
        StudentSpec(
            "lenet5_half", "LeNet-5, half", "lenet5", 46_380, 175_080, 28, "Apache-2.0", min_input_size=28
        ),
        StudentSpec("resnet8", "ResNet-8", "resnet8", 454_490, 16_958_720, 32, "Apache-2.0"),
        StudentSpec("resnet8_half", "ResNet-8, half", "resnet8", 114_354, 4_350_592, 32, "Apache-2.0"),
        StudentSpec("resnet12", "ResNet-12", "resnet12", 12_430_730, 523_114_752, 32, "Apache-2.0"),
        StudentSpec(
            "mobilenetv3_small_050", "MobileNetV3-Small 0.5", "timm", 578_474, 7_858_176, 128, "Apache-2.0"
        ),
        StudentSpec(
            "mobilenetv4_conv_small_050",
            "MobileNetV4-Conv-Small 0.5",
            "timm",
            970_762,
            21_148_672,
            128,
            "Apache-2.0",
        ),
        StudentSpec("resnet10t", "ResNet-10-T", "timm", 4_927_618, 358_126_592, 128, "Apache-2.0"),
        StudentSpec(
            "test_convnext", "ConvNeXt, timm's smallest", "timm", 207_778, 11_219_968, 96, "Apache-2.0"
        ),
    )
}


#: The student that WeCoLoRA makes of its teacher: its size and cost are not known before.
SHORTENED_VIT = "shortened_vit"


@dataclass(frozen=True)
class TrainedStudent:
    """`network` maps normalised images [N, 3, S, S], S = `input_size`, to logits [N, C]."""

    network: nn.Module
    name: str
    input_size: int
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def choices(own: str | None) -> tuple[str, ...]:
    """The students that a method can have: its `own` (`pipeline.Method.student`), or else any of the registry."""
    return (own,) if own else tuple(STUDENTS)


def checked(name: str, own: str | None) -> str:
    """`name`, if a method whose own student is `own` can have it. Raises `TrainingError`."""
    if own is None:
        return spec_of(name).name
    if name != own:
        raise TrainingError(f"this method has no student '{name}'", f"It makes one of its teacher: '{own}'.")
    return name


def spec_of(name: str) -> StudentSpec:
    if name not in STUDENTS:
        raise TrainingError(f"there is no student '{name}'", f"Choose one of {', '.join(sorted(STUDENTS))}.")
    return STUDENTS[name]


def build(name: str, classes: int, input_size: int) -> nn.Module:
    """A new network with random weights: normalised images [N, 3, S, S] -> logits [N, classes]."""
    spec = spec_of(name)
    if not spec.min_input_size <= input_size <= spec.max_input_size:
        raise TrainingError(
            f"student '{name}' takes images of {spec.min_input_size} to {spec.max_input_size} pixels,"
            f" not {input_size}"
        )
    if spec.family == "conv4":
        from models.students import conv4

        return conv4.build(classes, input_size)
    if spec.family == "lenet5":
        from models.students import lenet5

        return lenet5.build(classes, input_size, half=name == "lenet5_half")
    if spec.family == "resnet8":
        from models.students import resnet8

        return resnet8.build(classes, input_size, half=name == "resnet8_half")
    if spec.family == "resnet12":
        from models.students import resnet12

        return resnet12.build(classes, input_size)
    from models.students import timm_network

    return timm_network.build(name, classes)


def load(folder: Path, device: str = "cpu") -> TrainedStudent:
    """The student in a `trained_student` folder, in evaluation mode."""
    from safetensors.torch import load_file

    document = json.loads((folder / "student.json").read_text())
    classes = tuple(document["classes"])
    if document["name"] == SHORTENED_VIT:
        from models.students import shortened_vit

        network = shortened_vit.load_student(folder, document)
    else:
        network = build(document["name"], len(classes), document["input_size"])
        network.load_state_dict(load_file(folder / "weights.safetensors"))
    return TrainedStudent(
        network=network.eval().to(device),
        name=document["name"],
        input_size=document["input_size"],
        classes=classes,
        mean=tuple(document["mean"]),
        std=tuple(document["std"]),
    )


def read_name(folder: Path) -> str:
    """The student that a `student` source folder names."""
    name: str = json.loads((folder / "student.json").read_text())["name"]
    return name
