"""Under which key a black box's answers are kept: what decides them is in it, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from models.teachers import black_box
from models.teachers.black_box import AnswerKind, BlackBoxTeacher, HttpTeacher, InputFormat, OnnxTeacher

SAID: dict[str, Any] = {
    "name": "tch_1", "title": "Ours", "classes": ("a", "b"), "input": InputFormat(height=6, width=6),
    "licence": "MIT", "licence_url": "https://example.org",
}  # fmt: skip
FILE = OnnxTeacher(**SAID, source="0" * 64, bytes=9, parameters=9, input_name="x", output_name="y")
ENDPOINT = HttpTeacher(**SAID, source="https://models.example/a")
BOXES = [FILE, ENDPOINT]


@pytest.mark.parametrize("box", BOXES, ids=["onnx", "http"])
@pytest.mark.parametrize(
    "changed",
    [
        {"classes": ("b", "a")}, {"input": InputFormat(height=6, width=6, range="-1..1")},
        {"answers": AnswerKind.LOGITS}, {"source": "1" * 64}, {"output_name": "z"},
    ],
    ids=["classes", "input", "answers", "source", "output"],
)  # fmt: skip
def test_what_changes_the_answers_changes_their_key(box: BlackBoxTeacher, changed: dict[str, Any]) -> None:
    assert box.model_copy(update=changed).answers_key != box.answers_key


@pytest.mark.parametrize("box", BOXES, ids=["onnx", "http"])
def test_how_it_is_called_does_not_change_the_key_of_the_answers(box: BlackBoxTeacher) -> None:
    renamed = box.model_copy(update={"title": "Theirs", "licence": "other", "licence_url": ""})
    assert renamed.answers_key == box.answers_key


def test_only_a_file_is_the_same_teacher_when_it_is_registered_again() -> None:
    """An endpoint may answer otherwise by then."""
    file, endpoint = (box.model_copy(update={"name": "tch_2"}).answers_key for box in BOXES)
    assert (file == FILE.answers_key, endpoint == ENDPOINT.answers_key) == (True, False)


@pytest.mark.parametrize("box", BOXES, ids=["onnx", "http"])
def test_answers_of_code_that_read_them_otherwise_are_not_found(
    box: BlackBoxTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = box.answers_key
    monkeypatch.setattr(black_box, "ANSWERS_VERSION", 2)
    assert box.answers_key != before
