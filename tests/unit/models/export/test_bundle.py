"""EXPORT, EVALUATE and BUNDLE after one another, on a real small student."""

import hashlib
import json
import zipfile

import numpy as np
import pytest

from models.errors import DataError
from models.evaluation import accuracy, answers
from models.export import bundle, model_card, onnx_graph, parity, samples
from models.stages import EvaluationParams


@pytest.fixture(scope="module")
def plain(journey):
    """In float, with a test split."""
    return journey()


def _report(made):
    return json.loads((made["report"] / "report.json").read_text())


def test_a_student_with_a_test_split_is_measured_through_its_onnx_file(journey, splits):
    made = journey(int8=True, max_accuracy_drop=1.0)
    found = _report(made)
    test = list(samples.stream(splits["test"]))
    session = parity.session((made["student_onnx"] / "model.onnx").read_bytes())
    right = [
        int(session.run(None, {"image": image.pixels[None]})[0].argmax()) == image.label for image in test
    ]
    assert found["evaluation"]["kind"] == "test"
    assert found["student"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert found["student"]["accuracy"]["low"] == pytest.approx(accuracy.wilson(sum(right), 30)[0])
    assert (found["teacher"]["accuracy"]["correct"], found["teacher"]["accuracy"]["total"]) == (24, 30)
    assert np.array(found["confusion"]).sum() == 30
    assert np.trace(found["confusion"]) == sum(right)
    assert sum(row["images"] for row in found["per_class"]) == 30
    paired = found["student_against_teacher"]
    assert paired["both_right"] + paired["only_first_right"] == sum(right)
    assert len(found["worst_mistakes"]) == min(20, 30 - sum(right))
    assert found["data"]["shots"] == {"käse": 8, "red brick": 8, "sky": 8}
    assert found["compression"]["bytes"] == found["teacher"]["bytes"] / found["student"]["bytes"]
    assert set(found["latency"]) >= {"student", "teacher", "student_int8", "speedup", "threads"}
    assert found["summary"]["accuracy"] == found["student"]["accuracy"]["value"]

    assert found["int8"]["accepted"]
    assert found["int8"]["measured_on"] == "test"
    assert (made["bundle"] / "model.int8.onnx").is_file()
    golden = json.loads((made["bundle"] / "golden.json").read_text())
    assert set(golden["tolerance"]) == {"model.onnx", "model.int8.onnx"}


def test_an_int8_file_that_loses_too_much_does_not_ship_and_the_report_says_why(journey, monkeypatch):
    def coarse(graph, images):
        """The same graph with its last bias turned: another class wins."""
        damaged = type(graph)()
        damaged.CopyFrom(graph)
        bias = next(
            tensor
            for tensor in damaged.graph.initializer
            if tensor.name.endswith("bias") and tensor.dims == [3]
        )
        bias.CopyFrom(onnx_graph.onnx.numpy_helper.from_array(np.float32([-1e3, -1e3, 1e3]), bias.name))
        return damaged

    monkeypatch.setattr(onnx_graph.quantise, "static_int8", coarse)
    made = journey(int8=True, max_accuracy_drop=0.01)
    verdict = _report(made)["int8"]
    assert not verdict["accepted"]
    assert verdict["accuracy_drop"] > 0.01
    assert "more than the 1.00 % allowed" in verdict["reason"]
    assert not (made["bundle"] / "model.int8.onnx").exists()
    with zipfile.ZipFile(made["bundle"] / "bundle.zip") as packed:
        assert "model.int8.onnx" not in packed.namelist()
    assert set(json.loads((made["bundle"] / "golden.json").read_text())["tolerance"]) == {"model.onnx"}
    assert (
        "`model.int8.onnx` is not included: accuracy drops" in (made["bundle"] / "MODEL_CARD.md").read_text()
    )


def test_a_student_that_cannot_be_quantised_ships_in_float(journey, monkeypatch):
    def refuse(graph, images):
        raise onnx_graph.ExportError("the graph cannot be quantised: odd operator")

    monkeypatch.setattr(onnx_graph.quantise, "static_int8", refuse)
    made = journey(int8=True)
    assert _report(made)["int8"] == {
        "asked": True,
        "accepted": False,
        "max_accuracy_drop": 0.01,
        "reason": "the graph cannot be quantised: odd operator",
    }
    assert (made["bundle"] / "model.onnx").is_file()


def test_without_a_test_split_the_report_says_that_it_is_cross_validated(journey):
    made = journey(with_test=False)
    found = _report(made)
    assert (found["evaluation"]["kind"], found["evaluation"]["folds"]) == ("cross_validation", 3)
    assert "There is no test split" in found["evaluation"]["explanation"]
    student = found["student"]["accuracy"]
    assert (student["correct"], student["total"]) == (15, 24)
    assert student["low"] < accuracy.wilson(15, 24)[0]
    assert student["high"] > accuracy.wilson(15, 24)[1]
    assert found["teacher"]["accuracy"]["correct"] == 21
    assert "There is no test split" in (made["bundle"] / "MODEL_CARD.md").read_text()
    assert found["worst_mistakes"][0]["image"].endswith(".jpg")


def test_mistakes_of_a_cross_validation_are_named_by_their_place_in_the_support(judges, splits):
    judged = answers.cross_validated(judges["cross_validation"], splits["support"])
    images = {sample.name: sample.label for sample in samples.stream(splits["support"])}
    assert [images[name] for name in judged.names] == judged.labels.tolist()
    assert [rows.tolist() for rows in judged.folds] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 24)),
    ]


def test_folds_that_miss_an_image_are_an_error(judges, splits):
    with pytest.raises(DataError, match="each of the 24 labelled images once"):
        answers.cross_validated(judges["cross_validation"][:2], splits["support"])


def test_answers_of_another_test_split_are_an_error(judges, splits):
    measured = answers.Measured({}, np.zeros(30, dtype=np.int64), ("x",) * 30)
    with pytest.raises(DataError, match="do not belong"):
        answers.on_test_split(
            np.zeros((30, 3), dtype=np.float32), measured, judges["teacher_on_test"][::-1], splits["test"]
        )


def test_equal_inputs_give_equal_bundles(plain, context_of, sources, splits):
    inputs = (
        sources | {"test": (splits["test"],)} | {name: (plain[name],) for name in ("student_onnx", "report")}
    )
    digests = set()
    for name in ("first", "second"):
        context = context_of(name, inputs)
        bundle.run(context, None)
        digests.add(hashlib.sha256((context.output / "bundle.zip").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_the_manifest_names_data_seed_versions_and_every_input(plain, splits):
    found = json.loads((plain["bundle"] / "manifest.json").read_text())
    packed = (splits["support"] / "images.zip").read_bytes()
    assert found["data"]["support"] == {"sha256": hashlib.sha256(packed).hexdigest(), "images": 24}
    assert found["data"]["test"]["images"] == 30
    assert found["seed"] == 7
    assert found["teacher"]["name"] == "efficientnet_lite0"
    assert set(found["versions"]) >= {"python", "torch", "onnx", "onnxruntime"}
    assert (found["export"]["opset"], found["export"]["ir_version"]) == (18, 8)
    assert set(found["inputs"]) >= {"student_onnx", "report", "trained_student", "teacher", "support"}


def test_the_card_gives_the_teachers_licence_the_interval_and_the_limits(plain):
    card = (plain["bundle"] / "MODEL_CARD.md").read_text()
    assert "Apache-2.0, https://github.com/tensorflow/tpu/blob/master/LICENSE" in card
    assert "(95 % interval" in card
    assert "24 labelled images (8 a class) and 18 unlabelled ones" in card
    assert "python predict.py --check" in card
    assert "gives one of them to every image" in card
    assert "{" not in card


def test_sizes_are_written_for_people():
    assert (model_card.size(463_898), model_card.size(13_491_106)) == ("464 kB", "13.5 MB")


def test_evaluation_takes_no_fewer_than_5_runs():
    with pytest.raises(ValueError, match="greater than or equal to 5"):
        EvaluationParams(latency_runs=1)


@pytest.mark.parametrize(
    ("ratio", "words"), [(29.4, "29 times smaller"), (1.44, "1.4 times smaller"), (0.25, "4.0 times larger")]
)
def test_a_ratio_says_which_way_it_goes(ratio: float, words: str) -> None:
    assert model_card.times(ratio, "smaller", "larger") == words


def test_a_class_named_by_a_user_stays_text_in_the_card() -> None:
    assert model_card.plain("a|b <i>[x](y)") == r"a\|b \<i\>\[x\](y)"
