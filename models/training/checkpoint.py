"""The state of a training run as safetensors and JSON: weights, their average, the optimiser, the history.

Learning rates and random numbers are functions of the step (`optimiser.one_cycle`, `runtime.generator`), so
the step stands for the scheduler and the generators. Frozen parameters are not part of it: whoever goes on has them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from models.training.optimiser import changing

History = list[dict[str, float]]


def save(
    folder: Path, step: int, network: nn.Module, average: nn.Module, optimiser: Optimizer, history: History
) -> None:
    """Write the state after `step` steps into `folder`."""
    tensors: dict[str, Tensor] = {}
    for prefix, state in (("network", network.state_dict()), ("average", average.state_dict())):
        tensors |= {f"{prefix}.{name}": state[name] for name in changing(network)}
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
    _fill(network, _below("network.", tensors), changing(network))
    _fill(average, _below("average.", tensors), changing(network))
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in _below("optimiser.", tensors).items():
        index, key = name.split(".", 1)
        states.setdefault(int(index), {})[key] = value
    with torch.no_grad():
        optimiser.load_state_dict({**optimiser.state_dict(), "state": states})
    progress = json.loads((folder / "progress.json").read_text())
    return int(progress["step"]), progress["history"]


def _fill(network: nn.Module, tensors: dict[str, Tensor], names: list[str]) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise RuntimeError(f"the checkpoint is of another network: it has no {missing[0]}")
    network.load_state_dict(tensors, strict=False)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
