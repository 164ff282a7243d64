"""What is left out of an order is filled in: the method for the images, its student, a teacher that knows enough."""

from __future__ import annotations

import json

import pytest
import typer

from app.client import Dram
from app.order_defaults import complete
from tests.unit.app.scripted import Answer, Asked, Script, script

__all__ = ["script"]  # the fixture

KD = {"id": "kd", "task": "classification", "needs": ["features"], "student": None}
FSBBT = {"id": "fsbbt", "task": "classification", "needs": ["labels"], "student": None}
SHORTER = {"id": "shorter", "task": "classification", "needs": ["tokens"], "student": "short"}
MAPS = {"id": "maps", "task": "segmentation", "needs": ["tokens"], "student": "short"}
TEACHERS = {
    "away": {"id": "away", "kind": "timm", "available": False, "offers": ["labels", "features", "tokens"]},
    "tch_1": {"id": "tch_1", "kind": "http", "available": True, "offers": ["labels"]},
    "lite": {"id": "lite", "kind": "timm", "available": True, "offers": ["labels", "features"]},
    "vit": {"id": "vit", "kind": "timm", "available": True, "offers": ["labels", "features", "tokens"]},
}
STUDENT = "mobilenetv4_conv_small_050"
#: An order that names nobody.
NOTHING = {"teacher_id": None, "method": None, "student": None}


@pytest.fixture
def catalogue(script: Script) -> Script:
    """Four methods, four teachers."""

    def answer(asked: Asked) -> Answer:
        path = asked.path.partition("?")[0].removeprefix("/v1/")
        lists = {"methods": [KD, FSBBT, SHORTER, MAPS], "teachers": list(TEACHERS.values())}
        return Answer(body=json.dumps({"data": lists[path]}).encode())

    script.answers = [answer] * 10
    return script


@pytest.mark.parametrize(
    ("task", "given", "names"),
    [
        ("classification", {}, ("lite", "kd", STUDENT)),
        ("classification", {"teacher_id": "vit"}, ("vit", "kd", STUDENT)),
        ("classification", {"teacher_id": "tch_1"}, ("tch_1", "fsbbt", STUDENT)),
        ("classification", {"teacher_id": "nobody"}, ("nobody", "kd", STUDENT)),
        ("classification", {"method": "shorter"}, ("vit", "shorter", "short")),
        ("classification", {"method": "fsbbt"}, ("lite", "fsbbt", STUDENT)),
        ("classification", {"method": "nobody's"}, ("lite", "nobody's", STUDENT)),
        ("classification", {"student": "short"}, ("vit", "shorter", "short")),
        ("classification", {"student": "conv4"}, ("lite", "kd", "conv4")),
        ("segmentation", {}, ("vit", "maps", "short")),
        ("segmentation", {"teacher_id": "lite"}, ("lite", "maps", "short")),
        ("segmentation", {"student": "conv4", "method": "kd"}, ("lite", "kd", "conv4")),
    ],
)
def test_what_is_left_out_fits_what_is_given(
    task: str, given: dict[str, str], names: tuple[str, str, str], catalogue: Script
) -> None:
    with Dram(catalogue.url, "dram_k") as dram:
        order = complete(dram, {**NOTHING, "seed": 3, **given}, lambda: task)
    teacher, method, student = names
    assert order == {"teacher_id": teacher, "method": method, "student": student, "seed": 3}


def test_where_all_is_named_nothing_is_asked(catalogue: Script) -> None:
    with Dram(catalogue.url, "dram_k") as dram:
        named = {"teacher_id": "t", "method": "m", "student": "s"}
        assert complete(dram, named, lambda: "classification") == named
    assert catalogue.asked == []


def test_no_teacher_for_a_method_ends_with_a_sentence(
    catalogue: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(TEACHERS, "vit")
    with Dram(catalogue.url, "dram_k") as dram, pytest.raises(typer.Exit) as ended:
        complete(dram, NOTHING, lambda: "segmentation")
    assert ended.value.exit_code == 1
    assert "method 'maps', which needs tokens" in " ".join(capsys.readouterr().err.split())
