"""BUNDLE: everything a stranger needs to run, judge and check the student, in one zip.

| file | what |
|---|---|
| model.onnx, model.int8.onnx | the student; the int8 file only where its accuracy holds |
| labels.json, preprocess.json | the classes in order; what the graph expects and does |
| report.json, MODEL_CARD.md | how good it is, for machines and for people |
| manifest.json | what it was made from and with |
| golden/, golden.json | images with the scores, or the class maps, that they must get |
| predict.py | runs it with onnxruntime and Pillow |
| SHA256SUMS | digests of all of them |

Equal inputs give equal bytes: fixed order, fixed times.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from models import teachers
from models.data import archive
from models.export import model_card, onnx_graph
from models.pipeline import StageContext
from models.teachers import AnyTeacher, TeacherSpec

FILE_NAME = "bundle.zip"
SCHEMA_VERSION = 1
_EPOCH = (1980, 1, 1, 0, 0, 0)
#: Libraries whose version may change the student or its scores.
_LIBRARIES = (
    "dram",
    "torch",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "scipy",
    "pillow",
    "safetensors",
)
#: What the caller and the graph do to an image, from `student.json` and `export.json`, as in `preprocessing`.
Preprocessing = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
#: A model card from the report, the teacher, what `Preprocessing` gives, and the version of ONNX Runtime.
Card = Callable[[Mapping[str, Any], AnyTeacher, Mapping[str, Any], str], str]


def run(context: StageContext, params: None) -> None:
    """BUNDLE of a classifier: write the bundle's files to the artefact's folder and, packed, to `bundle.zip`."""
    int8 = read(context.folder("report") / "report.json")["int8"]["accepted"]
    models = [onnx_graph.FILE_NAME, *([onnx_graph.INT8_FILE_NAME] if int8 else [])]
    golden = golden_of(read(context.folder("student_onnx") / "golden.json"), models)
    write(context, preprocessing, model_card.render, "predict_template.py", models, golden)


def write(
    context: StageContext,
    preprocessing_of: Preprocessing,
    card: Card,
    predict: str,
    models: Iterable[str] = (onnx_graph.FILE_NAME,),
    golden: Mapping[str, Any] | None = None,
) -> None:
    """The bundle of these ONNX files. `predict`: the file beside this one that becomes `predict.py`.

    `golden`: the content of `golden.json`. None: as EXPORT wrote it.
    """
    exported, out = context.folder("student_onnx"), context.output
    student = read(context.folder("trained_student") / "student.json")
    export = read(exported / onnx_graph.EXPORT_FILE_NAME)
    report = read(context.folder("report") / "report.json")
    teacher = teachers.read_any(context.folder("teacher"))
    preprocess = preprocessing_of(student, export)
    for name in models:
        shutil.copyfile(exported / name, out / name)
    shutil.copyfile(context.folder("report") / "report.json", out / "report.json")
    shutil.copytree(exported / "golden", out / "golden")
    shutil.copyfile(Path(__file__).with_name(predict), out / "predict.py")
    _write(out / "golden.json", golden or read(exported / "golden.json"))
    _write(out / "labels.json", student["classes"])
    _write(out / "preprocess.json", preprocess)
    _write(out / "manifest.json", manifest(context, export, student))
    text = card(report, teacher, preprocess, metadata.version("onnxruntime"))
    (out / "MODEL_CARD.md").write_text(text, encoding="utf-8")

    content = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    sums = "".join(f"{_sha256(out / name)}  {name}\n" for name in content)
    (out / "SHA256SUMS").write_text(sums, encoding="utf-8")
    pack(out, [*content, "SHA256SUMS"], out / FILE_NAME)
    context.report(1, 1)


def preprocessing(student: Mapping[str, Any], export: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller does to an image, what the graph does to it, and what comes out."""
    return {
        "input": {
            "name": onnx_graph.INPUT,
            "dtype": "uint8",
            "shape": ["batch", "height", "width", 3],
            "colour_order": "RGB",
        },
        "before_the_graph": ["decode", "apply the EXIF orientation", "convert to RGB"],
        "inside_the_graph": [
            "resize",
            "divide by 255",
            "subtract mean",
            "divide by std",
            "network",
            "softmax",
        ],
        "resize": {
            "size": student["input_size"],
            "mode": "linear",
            "antialias": True,
            "coordinate_transformation_mode": "half_pixel",
            "keeps_aspect_ratio": False,
        },
        "mean": student["mean"],
        "std": student["std"],
        "output": {
            "name": onnx_graph.OUTPUT,
            "dtype": "float32",
            "shape": ["batch", len(student["classes"])],
        },
        "opset": export["opset"],
        "ir_version": export["ir_version"],
    }


def manifest(context: StageContext, export: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """What the student was made from: digests of images and inputs, counts, seed, versions."""
    images = {
        name: {
            "sha256": _sha256(context.folder(name) / archive.FILE_NAME),
            "images": len(archive.read_index(context.folder(name) / archive.FILE_NAME).images),
        }
        for name in ("support", "unlabelled", "test")
        if name in context.inputs
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "data": {"unlabelled": {"images": 0}} | images,
        "teacher": teacher_of(context),
        "student": {name: student[name] for name in sorted(student) if name != "classes"},
        "classes": len(student["classes"]),
        "seed": context.seed,
        "export": export,
        "inputs": {
            name: [folder_digest(folder) for folder in folders]
            for name, folders in sorted(context.inputs.items())
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def teacher_of(context: StageContext) -> dict[str, Any]:
    """The whole spec of a network. Of a black box only what its owner wants told: its source may be private."""
    spec = teachers.read_any(context.folder("teacher"))
    told = None if isinstance(spec, TeacherSpec) else {"title", "kind", "licence", "licence_url"}
    return spec.model_dump(mode="json", include=told)


def golden_of(golden: dict[str, Any], models: Iterable[str]) -> dict[str, Any]:
    """The golden scores of the files that ship."""
    kept = set(models)
    return {
        "tolerance": {name: bounds for name, bounds in golden["tolerance"].items() if name in kept},
        "images": [
            image | {"scores": {name: row for name, row in image["scores"].items() if name in kept}}
            for image in golden["images"]
        ],
    }


def folder_digest(folder: Path) -> str:
    """sha-256 of the names and contents of all files under `folder`."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n".encode())
    return total.hexdigest()


def pack(folder: Path, names: Iterable[str], target: Path) -> None:
    """Zip the files `names` of `folder`; the bytes depend on names and contents only."""
    with zipfile.ZipFile(target, "w") as packed:
        for name in sorted(names):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            packed.writestr(entry, (folder / name).read_bytes())


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # not every worker has all of them
            continue
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
