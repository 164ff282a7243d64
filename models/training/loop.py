"""One training loop for every network that is trained here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from models.errors import TrainingError
from models.pipeline import Checkpoints, Report
from models.runtime import training_autocast
from models.training import checkpoint, optimiser
from models.training.checkpoint import History

_REPORT_EVERY = 10


@dataclass(frozen=True)
class Schedule:
    steps: int
    lr: float
    weight_decay: float
    ema_decay: float
    betas: tuple[float, float] = optimiser.BETAS


def fit(
    network: nn.Module,
    loss_at: Callable[[int], Tensor],
    schedule: Schedule,
    report: Report,
    checkpoints: Checkpoints,
) -> tuple[nn.Module, History]:
    """Minimise `loss_at(step)`; returns the averaged network and the training curve.

    `loss_at` draws its batch from the step's own generator. A run that goes on from a checkpoint therefore
    gives the same weights as one that was never stopped. Raises `TrainingError` when the loss is no number.
    """
    device = next(network.parameters()).device
    average = optimiser.WeightAverage(network, schedule.ema_decay)
    adamw = optimiser.adamw(network, schedule.lr, schedule.weight_decay, schedule.betas)
    folder = checkpoints.latest()
    state = checkpoint.restore(folder, network, average.network, adamw) if folder else (0, [])
    start, history = state
    network.train()
    for step in range(start, schedule.steps):
        lr = optimiser.one_cycle(step, schedule.steps, schedule.lr)
        for group in adamw.param_groups:
            group["lr"] = lr
        with training_autocast(device):
            loss = loss_at(step)
        adamw.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adamw.step()
        average.update(network, step)
        done = step + 1
        if done % _REPORT_EVERY == 0 or done == schedule.steps:
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(f"the loss is {value} after {done} steps", "Try a lower learning rate.")
            history.append({"step": done, "loss": value, "lr": lr})
            report(done, schedule.steps, loss=value, lr=lr)
        if done < schedule.steps and checkpoints.due():
            checkpoints.save(
                done,
                partial(
                    checkpoint.save,
                    step=done,
                    network=network,
                    average=average.network,
                    optimiser=adamw,
                    history=history,
                ),
            )
    return average.network.eval(), history


class NoCheckpoints:
    """For runs that are too short to be worth continuing, or whose caller keeps nothing."""

    def latest(self) -> None:
        return None

    def due(self) -> bool:
        return False

    def save(self, step: int, write: Callable[..., None]) -> None:
        return None
