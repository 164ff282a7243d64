"""The state of a training run as safetensors and JSON: weights, their average, the optimiser, the history.

Learning rates and random numbers are functions of the step (`optimiser.one_cycle`, `runtime.generator`), so
the step stands for the scheduler and the generators.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

History = list[dict[str, float]]


def save(
    folder: Path, step: int, network: nn.Module, average: nn.Module, optimiser: Optimizer, history: History
) -> None:
    """Write the state after `step` steps into `folder`."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": value for name, value in state.items()}
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        folder / "state.safetensors",
    )
    (folder / "progress.json").write_text(json.dumps({"step": step, "history": history}))


def restore(
    folder: Path, network: nn.Module, average: nn.Module, optimiser: Optimizer
) -> tuple[int, History]:
    """Load the state in `folder` into the objects; returns the step and the history so far."""
    tensors = load_file(folder / "state.safetensors")
    network.load_state_dict(_below("network.", tensors))
    average.load_state_dict(_below("average.", tensors))
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in _below("optimiser.", tensors).items():
        index, key = name.split(".", 1)
        states.setdefault(int(index), {})[key] = value
    with torch.no_grad():
        optimiser.load_state_dict({**optimiser.state_dict(), "state": states})
    progress = json.loads((folder / "progress.json").read_text())
    return int(progress["step"]), progress["history"]


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
