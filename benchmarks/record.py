"""What every benchmark prints and writes: a table, and benchmarks/results/NAME.json with its checks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    *("torch", "timm", "diffusers", "transformers", "peft", "onnxruntime"),
    *("fastapi", "uvicorn", "sqlalchemy", "celery", "numpy"),
)


def check(
    name: str,
    value: float,
    interval: tuple[float, float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> dict[str, Any]:
    """A target and whether this run met it."""
    holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    target = {"at_least": at_least} if at_least is not None else {"at_most": at_most}
    return {"name": name, "value": value, "interval": list(interval), "target": target, "holds": holds}


def write(
    name: str,
    *,
    rows: Sequence[dict[str, Any]],
    checks: Sequence[dict[str, Any]],
    seeds: Sequence[int],
    quick: bool,
) -> None:
    """Print the rows and checks; write them, unless this is the quick version."""
    console = Console(width=120)
    console.print(_table(name, rows))
    console.print(_table("checks", checks))
    if quick:
        return
    RESULTS.mkdir(exist_ok=True)
    document = {
        "command": _command(Path(sys.argv[0]).stem, sys.argv[1:]),
        "commit": _commit(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform(terse=True)},
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "seeds": list(seeds),
        "rows": list(rows),
        "checks": list(checks),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=title)
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in names))
    return table


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _command(benchmark: str, arguments: Sequence[str]) -> str:
    """What to type for the same run, without this machine's folders: of other paths than the data's, the last name."""
    folders = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    folders.add_argument("--data")
    folders.add_argument("--work")
    _, others = folders.parse_known_args(arguments)
    shown = (Path(word).name if word.startswith(("/", "..")) else word for word in others)
    return " ".join([f"python -m benchmarks.{benchmark}", *shown])


def _commit() -> str:
    answer = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "unknown"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
