"""Run a method on this machine without a service: the same stages and keys, a folder for storage.

For notebooks and benchmarks, and the reference that the service must agree with.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models import generators, students
from models.data import archive, fewshot, masked_folder
from models.errors import DataError, TrainingError
from models.generators import GENERATORS, GeneratorSpec
from models.methods import METHODS
from models.pipeline import (
    Method,
    Params,
    PlannedStage,
    Report,
    StageContext,
    TeacherAccess,
    digest,
    inputs_of,
)
from models.runtime import resolve_device
from models.teachers import TEACHERS, AnyTeacher
from models.teachers.black_box import MODEL_FILE
from models.teachers.ledger import MemoryLedger

_CHECKPOINT_SECONDS = 60.0

#: Called as progress(stage name, shard, step, total, metrics).
Progress = Callable[[str, int, int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class LocalRun:
    """`folders`: artefact name -> its folders, one a shard; `seconds`: what each stage took, 0 if reused."""

    planned: tuple[PlannedStage, ...]
    folders: Mapping[str, tuple[Path, ...]]
    seconds: Mapping[str, float]

    def folder(self, name: str) -> Path:
        """The folder of an artefact made in one piece."""
        (folder,) = self.folders[name]
        return folder


def run(
    method: Method | str,
    images: Path | Mapping[str, Path],
    teacher: AnyTeacher | str,
    student: str,
    out: Path,
    *,
    params: Params | None = None,
    preset: str = "balanced",
    seed: int = 0,
    device: str = "auto",
    wanted: Sequence[str] | None = None,
    progress: Progress | None = None,
    model: Path | None = None,
    access: TeacherAccess | None = None,
    generator: GeneratorSpec | str = generators.DEFAULT,
) -> LocalRun:
    """Execute the stages of a method; what lies under `out` from an earlier run is not done again.

    A teacher that is an ONNX file comes with the file as `model`; one behind HTTP with `access`, whose ledger
    also counts the questions (None: a ledger without a budget, and no network). `generator` matters to methods that
    read one.
    `images` is a folder of class folders (with optional `test/` and `unlabelled/`) or, for segmentation, of images with
    masks (`models.data.masked_folder`), or packed splits by name: `support`, `unlabelled`, `test`. `wanted` names the
    artefacts to make, with what they need; None: all.
    """
    method = METHODS[method] if isinstance(method, str) else method
    teacher = TEACHERS[teacher] if isinstance(teacher, str) else teacher
    students.checked(student, method.student)
    params = params or method.resolve(preset, {})
    misfit = method.misfit(params, teacher) if method.needs <= teacher.offers else None
    if misfit is not None:
        raise TrainingError(f"parameter '{misfit.parameter}': {misfit.detail}")
    documents: dict[str, Any] = {"teacher": teacher.model_dump(mode="json"), "student": {"name": student}}
    if method.draws(params):
        generator = GENERATORS[generator] if isinstance(generator, str) else generator
        documents["generator"] = generator.model_dump(mode="json")
    splits = _packed(images, out / "splits") if isinstance(images, Path) else dict(images)
    _check_task(method, splits)
    sources = {**splits, **_write_documents(out / "sources", documents, model)}
    shape = fewshot.shape_of(splits.get("support"), splits.get("unlabelled"), splits.get("test"))
    access = access or TeacherAccess(MemoryLedger())
    planned = method.plan(shape, source_digests(splits, documents), params, seed)
    folders: dict[str, tuple[Path, ...]] = {name: (path,) for name, path in sources.items()}
    made = {step.stage.output: step for step in planned}
    needed = set(made) if wanted is None else _ancestors(wanted, made, folders)
    seconds: dict[str, float] = {}
    for step in planned:
        if step.stage.output not in needed:
            continue
        started = time.monotonic()
        available = {**folders}
        names = inputs_of(step.stage, available)
        stored = []
        reused = True
        for shard, key in enumerate(step.shard_keys):
            target = out / "artefacts" / key
            stored.append(target)
            if target.is_dir():
                continue
            reused = False
            working = _emptied(out / "working" / key)
            context = StageContext(
                inputs={name: available[name] for name in names},
                output=working,
                shape=shape,
                seed=seed,
                device=str(resolve_device(device)),
                report=_reporter(progress, step.stage.name, shard),
                checkpoints=FolderCheckpoints(out / "checkpoints" / key),
                shard=shard,
                shards=len(step.shard_keys),
                access=access if step.stage.asks else None,
            )
            step.stage.run(context, method.stage_params(step.stage, step.params))
            target.parent.mkdir(parents=True, exist_ok=True)
            working.rename(target)
            shutil.rmtree(out / "checkpoints" / key, ignore_errors=True)
        folders[step.stage.output] = tuple(stored)
        seconds[step.stage.name] = 0.0 if reused else time.monotonic() - started
    return LocalRun(planned, folders, seconds)


def source_digests(splits: Mapping[str, Path], documents: Mapping[str, Any]) -> dict[str, str]:
    """The content digests of a job's sources: of the packed images, and of what names teacher, student, generator."""
    digests = {name: _file_digest(path / archive.FILE_NAME) for name, path in splits.items()}
    return digests | {name: digest(document) for name, document in documents.items()}


def _packed(root: Path, out: Path) -> dict[str, Path]:
    return (masked_folder.pack if masked_folder.is_one(root) else fewshot.pack_folder)(root, out)


def _check_task(method: Method, splits: Mapping[str, Path]) -> None:
    """Raise `DataError` where the labelled images have masks and the method learns classes, or the reverse."""
    support = splits.get("support")
    masked = support is not None and archive.read_index(support / archive.FILE_NAME).masked
    if masked != method.learns_masks:
        fitting = [name for name, known in METHODS.items() if known.learns_masks == masked]
        raise DataError(
            f"method '{method.name}' is for {method.task}, and these images have {'' if masked else 'no '}masks",
            f"Choose another method: {', '.join(fitting)}.",
        )


@dataclass
class FolderCheckpoints:
    """Keeps the newest checkpoint of one shard in a folder."""

    folder: Path
    every: float = _CHECKPOINT_SECONDS
    _saved: float = field(default_factory=time.monotonic)

    def latest(self) -> Path | None:
        found = sorted(self.folder.glob("step-*"))
        return found[-1] if found else None

    def due(self) -> bool:
        return time.monotonic() - self._saved >= self.every

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        older = sorted(self.folder.glob("step-*"))
        working = _emptied(self.folder / "writing")
        write(working)
        target = self.folder / f"step-{step:09d}"
        shutil.rmtree(target, ignore_errors=True)  # a step done again, in smaller batches
        working.rename(target)
        for folder in older:
            if folder != target:
                shutil.rmtree(folder)
        self._saved = time.monotonic()


def _ancestors(
    wanted: Sequence[str], made: Mapping[str, PlannedStage], given: Mapping[str, object]
) -> set[str]:
    """The artefacts among `made` that `wanted` ones need, themselves included."""
    needed: set[str] = set()
    open_ends = list(wanted)
    while open_ends:
        name = open_ends.pop()
        if name in needed or name in given or name not in made:
            continue
        needed.add(name)
        open_ends += inputs_of(made[name].stage, made)
    return needed


def _write_documents(folder: Path, documents: Mapping[str, Any], model: Path | None) -> dict[str, Path]:
    for name, document in documents.items():
        target = folder / digest(document) / name
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{name}.json").write_text(json.dumps(document, ensure_ascii=False))
        if name == "teacher" and model is not None:
            shutil.copyfile(model, target / MODEL_FILE)
    return {name: folder / digest(document) / name for name, document in documents.items()}


def _reporter(progress: Progress | None, stage: str, shard: int) -> Report:
    def report(step: int, total: int, **metrics: float) -> None:
        if progress:
            progress(stage, shard, step, total, metrics)

    return report


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
