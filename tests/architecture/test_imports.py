"""Imports run one way, and the gateway starts without torch."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_import_contracts_hold() -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())",
    ]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert " 0 broken" in checked.stdout


def test_the_gateway_and_the_celery_parent_start_without_torch() -> None:
    """Only a run tells: a library may import torch where no file of this project names it."""
    entries = [name for name in ("app.main", "workers.tasks", "workers.celery_app") if _exists(name)]
    assert "app.main" in entries
    program = (
        f"import sys, {', '.join(entries)}\n"
        "print([name for name in ('torch', 'timm', 'transformers', 'diffusers', 'onnx') if name in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "[]"


def _exists(name: str) -> bool:
    return find_spec(name) is not None
