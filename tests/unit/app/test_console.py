"""What the command line shows of data sets, errors and reports."""

from __future__ import annotations

from typing import Any

import pytest

from app import console
from app.client import Dataset, DramApiError


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


def test_an_error_is_not_said_twice_where_it_is_the_only_finding(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [{"pointer": "/seed", "detail": "It must be 0 or more"}, {"pointer": "", "detail": "Too old"}]
    console.error(DramApiError(422, "invalid", "/seed: It must be 0 or more.", findings[:1], None))
    console.error(
        DramApiError(422, "invalid", "/seed: It must be 0 or more (and 1 more, see errors).", findings, None)
    )
    rank = {"pointer": "/params/rank", "detail": "Parameter 'rank': too high."}
    console.error(DramApiError(422, "unfit", "Parameter 'rank': too high.", [rank], None))
    missing = [{"pointer": pointer, "detail": "Field required"} for pointer in ("/params/seed", "/seed")]
    console.error(DramApiError(422, "invalid", "/params/seed: Field required (and 1 more).", missing, None))
    assert capsys.readouterr().err.splitlines() == [
        "Error: /seed: It must be 0 or more. [invalid]",
        "Error: /seed: It must be 0 or more (and 1 more, see errors). [invalid]",
        "  Too old",
        "Error: Parameter 'rank': too high. [unfit]",
        "Error: /params/seed: Field required (and 1 more). [invalid]",
        "  /seed: Field required",
    ]


def test_a_report_of_class_maps_shows_how_well_they_agree_with_masks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def network(miou: float, low: float | None) -> dict[str, Any]:
        share = {"value": miou, "low": low, "high": None if low is None else miou + 0.1}
        about = {"name": "a", "title": "A", "parameters": 1000, "bytes": 4000}
        return {**about, "miou": share, "pixel_accuracy": {**share, "value": 0.97}}

    timed = {"median_ms": 1.5}
    console.report(
        {
            "task": "segmentation",
            "student": network(0.8, 0.7),
            "teacher": network(0.9, None),
            "latency": {
                "student": timed,
                "teacher": timed,
                "speedup": {"value": 2.0},
                "runtime": "onnxruntime",
                "threads": 1,
            },
            "compression": {"bytes": 2.0},
            "int8": {"asked": False},
            "evaluation": {"explanation": "Measured with masks."},
        }
    )
    shown = capsys.readouterr().out
    assert "mean IoU" in shown
    assert "80.0% [70.0%, 90.0%]" in shown
    assert "90.0%" in shown  # without an interval
    assert "2.0 times smaller, 2.0 times faster (onnxruntime, 1 thread)" in shown
    assert "agreement" not in shown


def test_a_report_of_features_shows_how_alike_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    about = {"name": "a", "title": "A", "parameters": 1000, "bytes": 4000, "accuracy": None}
    console.report(
        {
            "task": "features",
            "student": about,
            "teacher": about,
            "cosine": {"value": 0.91234, "low": 0.9, "high": 0.92},
            "cka": {"value": 0.8, "low": 0.75, "high": 1.0},
            "agreement": {"value": 0.5, "low": 0.4, "high": 0.6},
            "latency": {
                "student": {"median_ms": 1.5},
                "teacher": {"median_ms": 3.0},
                "speedup": {"value": 2.0},
                "runtime": "onnxruntime",
                "threads": 1,
            },
            "compression": {"bytes": 2.0},
            "int8": {"asked": False},
            "evaluation": {"explanation": "Compared on images."},
        }
    )
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "cosine to the teacher's 0.912 [0.900, 0.920]" in lines
    assert "CKA with the teacher's 0.800 [0.750, 1.000]" in lines
