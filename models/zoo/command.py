"""What the training scripts of the zoo share as commands: their options, pauses, and what they say on the way."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from models import runtime
from models.errors import ModelsError
from models.local import FolderCheckpoints
from models.pipeline import Report
from models.training.checkpoint import History

Budget = TypeVar("Budget", bound=Any)  # a dataclass: sizes and lengths of a training
PAUSED = 75  # EX_TEMPFAIL: try again
_REPORT_SECONDS = 30.0


class PausedError(Exception):
    """The time is up, and the state is kept."""


@dataclass
class Pausing(FolderCheckpoints):
    """Keeps checkpoints, and stops the training with `PausedError` at the first one after `deadline` (monotonic)."""

    deadline: float = field(kw_only=True)

    def due(self) -> bool:
        return time.monotonic() >= self.deadline or super().due()

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        super().save(step, write)
        if time.monotonic() >= self.deadline:
            raise PausedError(f"stopped after step {step}")


def reporter(what: str, say: Callable[[str], None]) -> Report:
    """Says where the training is every half minute, with its speed since the last time."""
    said: tuple[float, int] | None = None

    def report(step: int, total: int, **metrics: float) -> None:
        nonlocal said
        now = time.monotonic()
        if said is None:
            said = now, step
        elif now - said[0] >= _REPORT_SECONDS or step == total:
            speed = (step - said[1]) / (now - said[0])
            say(f"{what}: step {step:,} of {total:,}, loss {metrics['loss']:.4f}, {speed:.2f} steps/s")
            said = now, step

    return report


def recent_loss(history: History) -> float:
    """Mean loss over the last tenth of the curve."""
    last = [entry["loss"] for entry in history][-max(1, len(history) // 10) :]
    return sum(last) / len(last)


def parser(description: str | None, budgets: Iterable[str], trained: str) -> argparse.ArgumentParser:
    """The options of every script; `trained` says of what --steps and --batch-size are."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, required=True, action="append", help="folder of class folders")
    options.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    options.add_argument("--work", type=Path, help="folder of the state; OUT.work if not given")
    options.add_argument(
        "--budget", choices=budgets, help="size and length; gpu where there is one, else cpu"
    )
    options.add_argument("--steps", type=int, help=f"of {trained}, in place of the budget's")
    options.add_argument("--batch-size", type=int, help=f"of {trained}, in place of the budget's")
    options.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after so long, to go on later"
    )
    options.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    options.add_argument("--threads", type=int, help="CPU threads")
    options.add_argument("--seed", type=int, default=0)
    return options


def run(
    given: argparse.Namespace, budgets: Mapping[str, Budget], train: Callable[[Budget, Path, float], None]
) -> int:
    """Call `train(budget, work, deadline)` as the options say; returns the command's exit status.

    An option that is named as one of a budget's fields takes that field's place.
    """
    deadline = time.monotonic() + 60 * given.minutes
    if given.threads:
        runtime.use_threads(given.threads)
    runtime.use_bfloat16_on_cpu()
    fits = "gpu" if runtime.resolve_device(given.device).type == "cuda" else "cpu"
    budget = budgets[given.budget or fits]
    wanted = {each.name: getattr(given, each.name, None) for each in fields(budget)}
    budget = replace(budget, **{name: value for name, value in wanted.items() if value is not None})
    work = given.work or given.out.with_name(f"{given.out.name}.work")
    try:
        train(budget, work, deadline)
    except PausedError as paused:
        print(f"{paused}; give the same command again to go on", flush=True)
        return PAUSED
    except ModelsError as error:
        print(f"{error.detail}. {error.hint}", file=sys.stderr)
        return 1
    return 0


def say(text: str) -> None:
    """Print a line at once, also into a file."""
    print(text, flush=True)
