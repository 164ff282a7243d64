"""The bundle keeps its promise to a stranger: onnxruntime, numpy and Pillow are all it needs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from models import local, students
from models.data import images
from models.export import onnx_graph
from models.methods import METHODS
from models.teachers.black_box import InputFormat, OnnxTeacher

#: Runs a script with only these packages (and what they import) beside the standard library.
_ALONE = """
import sys

ALLOWED = {"numpy", "onnxruntime", "PIL", "flatbuffers", "google", "packaging", "coloredlogs", "humanfriendly",
           "sympy", "mpmath"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names and top != "__main__":
            raise ImportError(f"{name} is not there for the bundle")
        return None

sys.meta_path.insert(0, Blocker())
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


COLOURS = {"blue": (40, 90, 220), "red": (220, 60, 40)}


def paint(folder, colour, count, random):
    folder.mkdir(parents=True, exist_ok=True)
    first = len(list(folder.iterdir()))
    for number in range(first, first + count):
        pixels = (np.array(colour) + random.normal(0, 40, (45, 38, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")


def by_kd(root, random):
    """Every stage of kd: a real teacher, a real student, a few steps."""
    for split, count in (("", 4), ("test", 3)):
        for name, colour in COLOURS.items():
            paint(root / "images" / split / name, colour, count, random)
    params = METHODS["kd"].resolve(
        "draft",
        {
            "teacher": {"input_size": 32, "views": 1},
            "distillation": {"steps": 20, "batch_size": 8},
            "export": {"int8": True, "max_accuracy_drop": 1.0},
            "evaluation": {"latency_runs": 5},
        },
    )
    return local.run(
        "kd", root / "images", "efficientnet_lite0", "conv4", root / "out", params=params, device="cpu"
    )


def by_fsbbt(root, random):
    """Every stage of fsbbt: images without labels, an ONNX file that runs in its sandbox, a few steps."""
    for colour in COLOURS.values():
        paint(root / "images" / "unlabelled", colour, 10, random)
    torch.manual_seed(0)
    graph = onnx_graph.build(students.build("conv4", 2, 32), 32, images.MEAN, images.STD)
    content = onnx_graph.to_bytes(graph)
    (root / "teacher.onnx").write_bytes(content)
    teacher = OnnxTeacher(
        name="tch_1",
        title="A file",
        classes=tuple(COLOURS),
        input=InputFormat(height=32, width=32, layout="NHWC", dtype="uint8", range="0..255"),
        source=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        parameters=113_000,
        input_name="image",
        output_name="probabilities",
    )
    params = METHODS["fsbbt"].resolve(
        "draft",
        {
            "synthesis": {"images": 40, "maker": "mixup_cvae"},
            "cvae": {"epochs": 2},
            "distillation": {"steps": 20, "batch_size": 8},
            "export": {"int8": True, "max_accuracy_drop": 1.0},
            "evaluation": {"latency_runs": 5},
        },
    )
    return local.run(
        "fsbbt",
        root / "images",
        teacher,
        "conv4",
        root / "out",
        params=params,
        device="cpu",
        model=root / "teacher.onnx",
    )


@pytest.fixture(scope="module", params=[by_kd, by_fsbbt], ids=["kd", "fsbbt"])
def bundle_zip(request, tmp_path_factory):
    made = request.param(tmp_path_factory.mktemp("job"), np.random.default_rng(0))
    return made.folder("bundle") / "bundle.zip"


@pytest.fixture
def unpacked(bundle_zip, tmp_path):
    folder = tmp_path / "a folder with spaces"
    with zipfile.ZipFile(bundle_zip) as packed:
        packed.extractall(folder)
    return folder


def alone(folder, *arguments, cwd):
    """Run predict.py from elsewhere, without this project and without torch."""
    runner = cwd / "alone.py"
    runner.write_text(_ALONE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-P", str(runner), str(folder / "predict.py"), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_blocker_blocks(tmp_path):
    (tmp_path / "predict.py").write_text("import torch")
    assert "torch is not there for the bundle" in alone(tmp_path, cwd=tmp_path).stderr
    (tmp_path / "predict.py").write_text("import models.errors")
    assert "models is not there for the bundle" in alone(tmp_path, cwd=tmp_path).stderr


def test_it_holds_all_that_is_promised(unpacked):
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert names >= {
        "MODEL_CARD.md",
        "SHA256SUMS",
        "golden.json",
        "golden/00.png",
        "labels.json",
        "manifest.json",
        "model.int8.onnx",
        "model.onnx",
        "predict.py",
        "preprocess.json",
        "report.json",
    }
    assert json.loads((unpacked / "labels.json").read_text()) == ["blue", "red"]


def test_the_checksums_are_those_of_all_files(unpacked):
    lines = (unpacked / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert set(sums) == names - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256((unpacked / name).read_bytes()).hexdigest() == digest
    if shutil.which("sha256sum"):
        subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=unpacked, check=True
        )


@pytest.mark.parametrize("model", ["model.onnx", "model.int8.onnx"])
def test_golden_images_score_as_expected_in_a_fresh_process(unpacked, tmp_path, model):
    found = alone(unpacked, "--check", "--model", model, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "8 of 8 golden images as expected" in found.stdout


def test_a_changed_network_fails_the_check(unpacked, tmp_path):
    golden = json.loads((unpacked / "golden.json").read_text())
    golden["images"][0]["scores"]["model.onnx"][0] += 0.01
    (unpacked / "golden.json").write_text(json.dumps(golden))
    found = alone(unpacked, "--check", cwd=tmp_path)
    assert found.returncode == 1
    assert "golden/00.png  DIFFERS" in found.stdout


def test_a_photograph_gets_its_labels_best_first(unpacked, tmp_path):
    photograph = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(np.full((30, 80, 3), (220, 60, 40), dtype=np.uint8)).save(photograph, exif=exif)
    found = alone(unpacked, "--top", "2", photograph, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    rows = [line.split("\t") for line in found.stdout.splitlines()]
    assert {label for _, label, _ in rows} == {"blue", "red"}
    scores = [float(score) for _, _, score in rows]
    assert scores[0] >= scores[1]
    assert sum(scores) == pytest.approx(1, abs=2e-4)


def test_a_broken_image_is_named_and_the_others_are_answered(unpacked, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    found = alone(unpacked, tmp_path / "broken.jpg", unpacked / "golden" / "00.png", cwd=tmp_path)
    assert found.returncode == 1
    assert "broken.jpg" in found.stderr
    assert "Traceback" not in found.stderr
    assert "00.png\t" in found.stdout
