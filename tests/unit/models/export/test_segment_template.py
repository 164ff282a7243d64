"""predict.py of a student that gives class maps: each image gets a file of its own, or none is written."""

from __future__ import annotations

import json
import shutil
from importlib import util
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from models.export import onnx_graph, segment_template

DARK, BRIGHT = (20, 0, 0), (220, 0, 0)


@pytest.fixture
def predict(tmp_path: Path) -> ModuleType:
    """As it lies in a bundle, beside a graph that tells dark pixels (0) from bright ones (1)."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    shutil.copyfile(segment_template.__file__, bundle / "predict.py")
    (bundle / "labels.json").write_text(json.dumps(["dark", "bright"]))
    nodes = [
        helper.make_node("Gather", ["image", "red"], ["reds"], axis=3),
        helper.make_node("Cast", ["reds"], ["values"], to=TensorProto.INT32),
        helper.make_node("Greater", ["values", "middle"], ["above"]),
        helper.make_node("Cast", ["above"], ["classes"], to=TensorProto.UINT8),
    ]
    constants = [
        helper.make_tensor("red", TensorProto.INT64, [], [0]),
        helper.make_tensor("middle", TensorProto.INT32, [], [127]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "height", "width", 3])
    classes = helper.make_tensor_value_info("classes", TensorProto.UINT8, ["batch", "height", "width"])
    graph = helper.make_graph(nodes, "levels", [image], [classes], constants)
    opset = helper.make_opsetid("", onnx_graph.OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=onnx_graph.IR_VERSION)
    onnx.save(model, bundle / "model.onnx")
    spec = util.spec_from_file_location("predict", bundle / "predict.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(predict: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["predict.py", *map(str, arguments)])
    return int(predict.main())


def picture(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)
    return path


def test_images_that_differ_only_in_their_suffix_get_class_maps_of_their_own(
    predict: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(tmp_path / "photo.jpg", DARK), picture(tmp_path / "photo.png", BRIGHT)]
    assert run(predict, monkeypatch, *images, "--out", tmp_path / "maps") == 0
    maps = sorted((tmp_path / "maps").iterdir())
    assert [path.name for path in maps] == ["photo.jpg.classes.png", "photo.png.classes.png"]
    assert [np.unique(np.asarray(Image.open(path))).tolist() for path in maps] == [[0], [1]]


def test_images_of_one_name_are_refused_before_any_is_written_into_one_folder(
    predict: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [picture(tmp_path / folder / "photo.png", DARK) for folder in ("monday", "tuesday")]
    with pytest.raises(SystemExit) as stopped:
        run(predict, monkeypatch, *images, "--out", tmp_path / "maps")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"{images[0]} and {images[1]} would both become" in said
    assert not (tmp_path / "maps").exists()
    assert run(predict, monkeypatch, *images, images[0]) == 0
    assert [len(list(path.parent.iterdir())) for path in images] == [2, 2]
