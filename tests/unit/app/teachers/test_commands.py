"""`dram teachers` as a person meets it: what is sent, what is shown, exit codes. Each command is a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.app.scripted import Answer, Script, script

__all__ = ["script"]  # the fixture


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("DRAM_")]:
        monkeypatch.delenv(name)
    return


def dram(script: Script, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "app.cli", *map(str, arguments), "--url", script.url],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def teacher(**more: Any) -> dict[str, Any]:
    return {"id": "tch_1", "title": "Ours", "kind": "http", "available": True, "reason": "ok", **more}


def listing(*items: object, has_more: bool = False) -> Answer:
    return Answer(body=json.dumps({"object": "list", "data": items, "has_more": has_more}).encode())


def test_all_pages_of_teachers_are_listed(script: Script) -> None:
    lite = teacher(id="lite0", kind="efficientnet_lite", title="Lite", parameters=3_371_008)
    down = teacher(available=False, reason="It did not pass its last probe: it is down.")
    script.answers = [listing(lite, has_more=True), listing(down)]
    ran = dram(script, "teachers")
    assert [line.split()[:2] for line in ran.stdout.splitlines()[1:]] == [["lite0", "yes"], ["tch_1", "no"]]
    assert "it is down" in ran.stdout
    assert "after=lite0" in script.asked[1].path


def test_an_endpoint_is_added_with_its_headers_from_a_file(script: Script, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n\n")
    (tmp_path / "secrets").write_text("Authorization: Bearer a:b\n")
    script.answers = [Answer(201, json.dumps(teacher()).encode())]
    ran = dram(
        script, "teachers", "add-http", "https://models.example/v2/models/m/infer", "--classes", "labels.txt",
        "--size", "28x32", "--mean", "0.5,0.5,0.5", "--protocol", "kserve_v2", "-H", "@secrets", "-H", "X-Team: a",
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, "tch_1\n")
    assert "dram teachers probe tch_1" in ran.stderr
    assert json.loads(script.asked[0].body) == {
        "kind": "http", "title": "HTTP endpoint",
        "url": "https://models.example/v2/models/m/infer", "classes": ["cat", "dog"],
        "input": {"height": 28, "width": 32, "mean": [0.5, 0.5, 0.5]}, "protocol": "kserve_v2",
        "headers": {"Authorization": "Bearer a:b", "X-Team": "a"},
    }  # fmt: skip


def test_a_file_is_added_with_what_it_does_not_say(script: Script, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('["cat", "dog"]')
    (tmp_path / "pets.onnx").write_bytes(b"graph")
    script.answers = [Answer(201, json.dumps(teacher(kind="onnx")).encode())]
    ran = dram(script, "teachers", "add-onnx", "pets.onnx", "--classes", "labels.json", "--answers", "logits")
    assert (ran.returncode, ran.stdout) == (0, "tch_1\n")
    body = script.asked[0].body
    assert b"graph" in body
    spec = {"title": "pets", "classes": ["cat", "dog"], "answers": "logits", "kind": "onnx"}
    assert json.dumps(spec).encode() in body


def test_a_probe_that_fails_says_why_and_how_to_mend_it(script: Script) -> None:
    report = {"teacher_id": "tch_1", "ok": False, "problems": ["It answered HTML."], "hint": "Check the URL."}
    script.answers = [Answer(body=json.dumps(report).encode())]
    ran = dram(script, "teachers", "probe", "tch_1")
    assert ran.returncode == 1
    assert "It answered HTML." in ran.stderr
    assert "Check the URL." in ran.stderr


def test_a_probe_shows_what_the_teacher_sees(script: Script, tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"picture")
    report = {
        "teacher_id": "tch_1", "ok": True, "latency_ms": 12.3, "shape": [1, 2],
        "top": [{"name": "cat", "score": 0.9}], "problems": [], "hint": "",
    }  # fmt: skip
    script.answers = [Answer(body=json.dumps(report).encode())]
    ran = dram(script, "teachers", "probe", "tch_1", "cat.png")
    assert ran.returncode == 0
    assert "0.900" in ran.stdout
    assert "12 ms" in ran.stderr
    assert script.asked[0].body == b"picture"


def test_headers_are_replaced_and_not_repeated(script: Script) -> None:
    script.answers = [Answer(body=json.dumps(teacher()).encode())]
    ran = dram(script, "teachers", "headers", "tch_1", "--header", "X-Key: hush")
    assert "X-Key" in ran.stderr
    assert "hush" not in ran.stdout + ran.stderr
    assert json.loads(script.asked[0].body) == {"headers": {"X-Key": "hush"}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "big"], "224 or 28x32"),
        (["--size", "32", "--mean", "a,b"], "numbers with commas"),
        (["--size", "32", "-H", "s3cr3t"], "NAME: VALUE"),
    ],
    ids=["size", "mean", "header"],
)
def test_what_cannot_be_read_is_a_usage_error_that_repeats_no_secret(
    script: Script, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    ran = dram(script, "teachers", "add-http", "https://a.example/", "--classes", "labels.txt", *arguments)
    assert ran.returncode == 2
    assert words in " ".join(ran.stderr.replace("│", " ").split())
    assert "s3cr3t" not in ran.stderr
    assert script.asked == []
