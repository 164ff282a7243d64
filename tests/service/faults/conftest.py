from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.stack import Stack


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A whole service on SQLite, ready."""
    made = Stack(tmp_path / "home")
    try:
        made.start_all()
        yield made
    finally:
        made.stop()
