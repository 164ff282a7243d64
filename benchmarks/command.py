"""What the command lines of benchmarks share: options, whether the data is there, several runs at once."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

CIFAR10 = "cifar10.tar.xz"
Task = TypeVar("Task")
Result = TypeVar("Result")


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--work", type=Path, default=Path(".dram/benchmarks", name), help="folder kept between runs"
    )
    made.add_argument(
        "--quick", action="store_true", help="as little as shows that it runs; writes no result"
    )
    return made


def add_data(parser: argparse.ArgumentParser, file: str = CIFAR10) -> None:
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help=f"folder with {file}")


def has_data(given: argparse.Namespace, file: str = CIFAR10) -> bool:
    """Whether `file` is in --data; says so where it is not."""
    found = (given.data / file).is_file()
    if not found:
        print(f"skipped: {given.data} has no {file}; name its folder with --data")
    return found


def add_draws(parser: argparse.ArgumentParser, *, processes: int = 2) -> None:
    parser.add_argument("--draws", type=int, default=3, help="draws of the images")
    parser.add_argument("--processes", type=int, default=processes, help="draws at the same time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")


def at_once(measure: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> list[Result]:
    """What `measure` finds for each task, in processes of their own, so many at the same time."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(measure, tasks))
