"""What the command line shows of a data set."""

from __future__ import annotations

import pytest

from app import console
from app.client import Dataset


def test_remarks_of_one_kind_are_shown_a_few_times_and_then_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    warnings = [{"code": "image_tiny", "detail": f"{number}.png: it is tiny."} for number in range(50)]
    warnings.insert(1, {"code": "image_corrupt", "detail": "bad.png: it cannot be decoded."})
    made = Dataset(id="ds_1", name="digits", digest="d", classes=[], splits={}, report={"warnings": warnings})
    console.dataset(made)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "tiny." in line] == [f"  {n}.png: it is tiny." for n in range(3)]
    assert "  bad.png: it cannot be decoded." in lines
    assert lines[-1] == "  and 47 more like the last (image_tiny)."
