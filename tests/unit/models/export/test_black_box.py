"""EXPORT, EVALUATE and BUNDLE of students of black boxes: little is known of the teacher, and maybe no label."""

import hashlib
import io
import json
import zipfile
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from app import console
from models import teachers
from models.data import archive
from models.errors import DataError
from models.evaluation import accuracy, answers
from models.export import parity, samples
from models.pipeline import JobShape
from models.teachers.black_box import HttpTeacher, InputFormat, OnnxTeacher

CLASSES = ("käse", "red brick", "sky")
ADDRESS = "https://models.intern.example/v1/predict?team=7"
ENDPOINT = HttpTeacher(
    name="tch_01abc",
    title="Our *own* endpoint",
    classes=CLASSES,
    input=InputFormat(height=64, width=64),
    source=ADDRESS,
)
UNLABELLED = JobShape(classes=3, support=0, smallest_class=0, unlabelled=18)
HELD_OUT = [1, 4, 9, 10, 17]


@pytest.fixture(scope="module")
def bare(black_box_journey, black_box_judges, splits):
    """An endpoint, unlabelled images, no test split."""
    inputs = {
        "unlabelled": (splits["unlabelled"],),
        "teacher_on_held_out": (black_box_judges(HELD_OUT, [-1] * 5),),
    }
    return black_box_journey(ENDPOINT, inputs, UNLABELLED, int8=True, max_accuracy_drop=1.0)


def _report(made):
    return json.loads((made["report"] / "report.json").read_text())


def _printed(found, monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=text, width=500))
    console.report(found)
    return text.getvalue()


def test_without_labels_the_figure_is_the_agreement_on_images_held_out(bare, splits):
    found = _report(bare)
    session = parity.session((bare["student_onnx"] / "model.onnx").read_bytes())
    images = list(samples.stream(splits["unlabelled"]))
    same = [
        int(session.run(None, {"image": images[at].pixels[None]})[0].argmax()) == number % 3
        for number, at in enumerate(HELD_OUT)
    ]
    assert (found["evaluation"]["kind"], found["evaluation"]["images"]) == ("held_out", 5)
    assert "5 of the 18 images were held out" in found["evaluation"]["explanation"]
    assert "none has a label" in found["evaluation"]["explanation"]
    assert found["agreement"]["value"] == pytest.approx(np.mean(same))
    assert found["agreement"]["low"] == pytest.approx(accuracy.wilson(sum(same), 5)[0])
    assert found["student"]["accuracy"] is found["teacher"]["accuracy"] is None
    assert found["student_against_teacher"] is found["confusion"] is None
    assert found["per_class"] == found["worst_mistakes"] == []
    assert len(found["disagreements"]) == 5 - sum(same)
    assert {(row["label"], row["right"]) for row in found["disagreements"]} <= {(None, None)}
    assert found["data"] == {"support": 0, "unlabelled": 18, "test": 0, "shots": {}}
    assert found["summary"]["accuracy"] is found["summary"]["teacher_latency_ms"] is None
    assert found["summary"]["agreement_low"] == found["agreement"]["low"]


def test_of_an_endpoint_neither_size_nor_latency_is_made_up(bare):
    found = _report(bare)
    assert found["teacher"] == {
        "name": "tch_01abc", "title": "Our *own* endpoint", "kind": "http", "black_box": True, "input_size": 64,
        "parameters": None, "bytes": None, "accuracy": None,
    }  # fmt: skip
    assert found["compression"] == {"parameters": None, "bytes": None}
    assert found["latency"]["teacher"] is found["latency"]["speedup"] is None
    assert found["latency"]["student"]["median_ms"] > 0


def test_int8_is_judged_by_agreement_where_there_are_no_labels(bare):
    verdict = _report(bare)["int8"]
    assert verdict["accepted"]
    assert (verdict["measured_on"], verdict["accuracy_drop"]) == ("held_out", None)
    assert verdict["agreement_drop"] is not None
    assert "agreement with the teacher drops by" in verdict["reason"]
    assert verdict["calibration_images"] == 18 - len(HELD_OUT)


def test_the_address_of_an_endpoint_is_in_no_file_of_the_bundle(bare):
    with zipfile.ZipFile(bare["bundle"] / "bundle.zip") as packed:
        contents = {name: packed.read(name) for name in packed.namelist()}
    assert {"MODEL_CARD.md", "manifest.json", "model.onnx", "report.json"} <= set(contents)
    assert not [name for name, content in contents.items() if b"intern.example" in content]
    assert json.loads(contents["manifest.json"])["teacher"] == {
        "kind": "http", "title": "Our *own* endpoint", "licence": "not stated", "licence_url": "",
    }  # fmt: skip
    properties = {
        prop.key: prop.value for prop in onnx.load_from_string(contents["model.onnx"]).metadata_props
    }
    assert properties["teacher"] == "Our *own* endpoint"
    assert properties["teacher_licence"] == "not stated"


def test_golden_images_come_from_the_unlabelled_ones(bare):
    golden = json.loads((bare["bundle"] / "golden.json").read_text())
    assert len(golden["images"]) == parity.GOLDEN_IMAGES
    assert {image["label"] for image in golden["images"]} == {None}
    assert json.loads((bare["bundle"] / "labels.json").read_text()) == list(CLASSES)
    manifest = json.loads((bare["bundle"] / "manifest.json").read_text())
    assert manifest["data"]["unlabelled"]["images"] == 18
    assert "support" not in manifest["data"]


def test_the_card_says_what_is_not_known(bare):
    card = (bare["bundle"] / "MODEL_CARD.md").read_text()
    for words in (
        r"distilled from **Our \*own\* endpoint**, a black box, with images without labels",
        "accuracy not known, for lack of labels; it gives the teacher's answer to",
        "| parameters | 113,603 | not known |",
        "18 images without labels",
        "5 of them were held out",
        r"It learned what Our \*own\* endpoint answers to the others and to any images",
        "The teacher is an HTTP endpoint of the bundle's owner. Its licence: not stated.",
        "is for the owner to know",
        "How good it is at each class is not known",
    ):
        assert words in card
    assert "None" not in card
    assert "nan" not in card


def test_the_console_says_what_is_not_known(bare, monkeypatch):
    printed = _printed(_report(bare), monkeypatch)
    assert "teacher Our *own* endpoint" in printed
    assert (
        "Teacher: a black box, its size is not known; the latency of the teacher's endpoint was not measured."
        in printed
    )
    assert "None" not in printed


def test_labels_of_thirty_images_held_out_give_an_accuracy(
    black_box_journey, black_box_judges, splits, student
):
    held_out = [*range(20), 24, 27, 41]
    shape = replace(UNLABELLED, support=24, smallest_class=8)
    inputs = {"support": (splits["support"],), "unlabelled": (splits["unlabelled"],)}
    few = black_box_journey(
        ENDPOINT, inputs | {"teacher_on_held_out": (black_box_judges(held_out, [0] * 23),)}, shape
    )
    assert _report(few)["student"]["accuracy"] is None
    assert "only 20 of them have labels, and 30 are needed" in _report(few)["evaluation"]["explanation"]
    assert (
        "24 labelled images (8 a class) and 18 unlabelled ones"
        in (few["bundle"] / "MODEL_CARD.md").read_text()
    )

    shape = replace(UNLABELLED, support=30, smallest_class=10)
    inputs["support"] = (splits["test"],)  # 30 labelled images
    held_out = [*range(30), 31, 47]
    made = black_box_journey(
        ENDPOINT,
        inputs | {"teacher_on_held_out": (black_box_judges(held_out, [0] * 32),)},
        shape,
        int8=True,
        max_accuracy_drop=1.0,
    )
    found = _report(made)
    session = parity.session((made["student_onnx"] / "model.onnx").read_bytes())
    right = sum(
        int(session.run(None, {"image": image.pixels[None]})[0].argmax()) == image.label
        for image in samples.stream(splits["test"])
    )
    assert (found["student"]["accuracy"]["correct"], found["student"]["accuracy"]["total"]) == (right, 30)
    assert found["teacher"]["accuracy"]["total"] == 30
    assert found["agreement"]["images"] == 32
    assert np.array(found["confusion"]).sum() == 30
    assert "measured on the 30 of them that have labels" in found["evaluation"]["explanation"]
    assert found["int8"]["accuracy_drop"] is not None


def test_test_labels_are_matched_to_the_students_classes_by_name(black_box_journey, splits, judges, tmp_path):
    """The same test images under class lists in another order give the same figures."""
    index = archive.read_index(splits["test"] / archive.FILE_NAME)
    order = (2, 0, 1)  # where each class stands now
    turned = replace(
        index,
        classes=tuple(CLASSES[order.index(at)] for at in range(3)),
        images=tuple(replace(image, label=order[image.label]) for image in index.images),
    )
    contents = [content for _, content in archive.contents(splits["test"] / archive.FILE_NAME)]
    archive.write(tmp_path / archive.FILE_NAME, turned, contents)
    asked = []
    for shard, folder in enumerate(judges["teacher_on_test"]):
        document = load_file(folder / "probabilities.safetensors")
        document["labels"] = torch.tensor(order)[document["labels"]]
        asked.append(tmp_path / str(shard))
        asked[-1].mkdir()
        save_file(document, asked[-1] / "probabilities.safetensors")
    shape = replace(UNLABELLED, test=30)
    reports = []
    for test, teacher in ((splits["test"], judges["teacher_on_test"]), (tmp_path, tuple(asked))):
        inputs = {
            "unlabelled": (splits["unlabelled"],),
            "test": (test,),
            "teacher_on_test": teacher,
        }
        reports.append(_report(black_box_journey(ENDPOINT, inputs, shape)))
    plain, other = reports
    assert plain["evaluation"]["kind"] == "test"
    for name in ("classes", "per_class", "confusion", "agreement"):
        assert plain[name] == other[name]
    assert plain["student"]["accuracy"] == other["student"]["accuracy"]
    assert plain["teacher"]["accuracy"]["correct"] == 24


def test_a_test_image_of_a_class_that_the_student_does_not_know_is_an_error(tmp_path):
    measured = answers.Measured({}, np.array([0, -1]), ("a.jpg", "odd.jpg"))
    with pytest.raises(DataError, match=r"'odd\.jpg', are of no class that the student knows"):
        answers.on_test_split(np.zeros((2, 3), dtype=np.float32), measured, (), tmp_path)


@pytest.fixture(scope="module")
def onnx_file(sources):
    """A file that answers uint8 images of any size, and its spec."""
    content = (sources["teacher_onnx"][0] / "teacher.onnx").read_bytes()
    spec = OnnxTeacher(
        name="tch_02abc",
        title="A bigger student",
        classes=CLASSES,
        input=InputFormat(height=48, width=64, layout="NHWC", dtype="uint8", range="0..255"),
        licence="CC-BY-4.0",
        source=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        parameters=120_000,
        input_name="image",
        output_name="probabilities",
    )
    return content, spec


@pytest.mark.parametrize("whole", [True, False])
def test_an_onnx_file_is_timed_through_its_sandbox_and_a_broken_one_not_at_all(
    whole, onnx_file, black_box_journey, black_box_judges, splits, monkeypatch
):
    content, spec = onnx_file
    inputs = {
        "unlabelled": (splits["unlabelled"],),
        "teacher_on_held_out": (black_box_judges(HELD_OUT, [-1] * 5),),
    }
    made = black_box_journey(spec, inputs, UNLABELLED, model=content if whole else content[:1000])
    found = _report(made)
    timed, note = found["latency"]["teacher"], found["latency"]["teacher_note"]
    card, printed = (made["bundle"] / "MODEL_CARD.md").read_text(), _printed(found, monkeypatch)
    if whole:
        assert timed["runs"] == 5
        assert timed["median_ms"] > 0
        assert note == "the teacher was timed through the sandbox that it runs in, with its overhead"
    else:
        assert timed is None
        assert note.startswith("the teacher's latency could not be measured:")
    assert found["latency"]["speedup"] is None
    assert note in card
    assert note in printed
    assert "faster" not in printed
    assert found["compression"]["bytes"] == len(content) / found["student"]["bytes"]
    assert (found["teacher"]["parameters"], found["teacher"]["input_size"]) == (120_000, 64)
    assert "an ONNX file of the bundle's owner. Its licence: CC-BY-4.0." in card
    assert spec.source not in (made["bundle"] / "manifest.json").read_text()


def test_a_network_of_the_catalogue_used_as_a_black_box_is_known_by_its_parameters(
    black_box_journey, black_box_judges, splits, monkeypatch
):
    inputs = {
        "support": (splits["support"],),
        "teacher_on_held_out": (black_box_judges([0, 9, 20], [0, 1, 2]),),
    }
    shape = JobShape(classes=3, support=24, smallest_class=8)
    made = black_box_journey(teachers.TEACHERS["efficientnet_lite0"], inputs, shape)
    found = _report(made)
    assert (found["teacher"]["parameters"], found["teacher"]["bytes"]) == (3_371_008, None)
    assert found["compression"]["parameters"] == 3_371_008 / found["student"]["parameters"]
    card = (made["bundle"] / "MODEL_CARD.md").read_text()
    assert "30 times fewer than the teacher" in card
    assert "Apache-2.0, https://github.com/tensorflow/tpu/blob/master/LICENSE" in card
    assert "Teacher: a black box, its size is not known;" in _printed(found, monkeypatch)
