"""What is left out of an order is filled in: the method for the images, its student, a teacher that knows enough."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer

from app.client import Dram
from app.order_defaults import Names, complete
from tests.unit.app.scripted import Answer, Asked, Script, script

__all__ = ["script"]  # the fixture

KD = {"id": "kd", "task": "classification", "needs": ["features"], "student": None}
FSBBT = {"id": "fsbbt", "task": "classification", "needs": ["probabilities"], "student": None}
SHORTER = {"id": "shorter", "task": "classification", "needs": ["tokens"], "student": "short"}
MAPS = {"id": "maps", "task": "segmentation", "needs": ["tokens"], "student": "short"}
TEACHERS = {
    "away": {"id": "away", "kind": "timm", "available": False, "offers": ["features", "tokens"]},
    "tch_1": {"id": "tch_1", "kind": "http", "available": True, "offers": ["probabilities"]},
    "lite": {"id": "lite", "kind": "efficientnet_lite", "available": True, "offers": ["features"]},
    "vit": {"id": "vit", "kind": "embedded", "available": True, "offers": ["features", "tokens"]},
}
STUDENT = "mobilenetv4_conv_small_050"


@pytest.fixture
def catalogue(script: Script) -> Script:
    """Four methods, four teachers; data set ds_m has masks, ds_c has classes."""

    def answer(asked: Asked) -> Answer:
        path = asked.path.partition("?")[0].removeprefix("/v1/")
        documents: dict[str, Any] = {
            "methods": {"data": [KD, FSBBT, SHORTER, MAPS]},
            "teachers": {"data": list(TEACHERS.values())},
            "datasets/ds_c": {"id": "ds_c", "name": "c", "task": "classification", "classes": []},
            "datasets/ds_m": {"id": "ds_m", "name": "m", "task": "segmentation", "classes": []},
        }
        documents |= {f"teachers/{name}": teacher for name, teacher in TEACHERS.items()}
        return Answer(body=json.dumps(documents[path]).encode())

    script.answers = [answer] * 10
    return script


@pytest.mark.parametrize(
    ("dataset", "given", "names"),
    [
        ("ds_c", {}, Names("lite", "kd", STUDENT)),
        ("ds_c", {"teacher": "vit"}, Names("vit", "kd", STUDENT)),
        ("ds_c", {"teacher": "tch_1"}, Names("tch_1", "fsbbt", STUDENT)),
        ("ds_c", {"method": "shorter"}, Names("vit", "shorter", "short")),
        ("ds_m", {}, Names("vit", "maps", "short")),
        ("ds_m", {"student": "conv4", "method": "kd"}, Names("lite", "kd", "conv4")),
        ("ds_c", {"method": "nobody's"}, Names("lite", "nobody's", STUDENT)),
    ],
)
def test_what_is_left_out_fits_what_is_given(
    dataset: str, given: dict[str, str], names: Names, catalogue: Script
) -> None:
    with Dram(catalogue.url, "dram_k") as dram:
        asked: dict[str, str | None] = {"teacher": None, "method": None, "student": None, **given}
        assert complete(dram, dataset, **asked) == names


def test_where_all_is_named_nothing_is_asked(catalogue: Script) -> None:
    with Dram(catalogue.url, "dram_k") as dram:
        assert complete(dram, "ds_c", "t", "m", "s") == Names("t", "m", "s")
    assert catalogue.asked == []


def test_no_teacher_for_a_method_ends_with_a_sentence(
    catalogue: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(TEACHERS, "vit")
    with Dram(catalogue.url, "dram_k") as dram, pytest.raises(typer.Exit) as ended:
        complete(dram, "ds_m", None, None, None)
    assert ended.value.exit_code == 1
    assert "`dram teachers` says why" in " ".join(capsys.readouterr().err.split())
