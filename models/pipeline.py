"""What a method is: its parameters and its stages. Declares only; imports no torch.

A job starts from *sources* (the images, the teacher, the student) and runs *stages*. A stage reads artefacts
and writes one artefact; an artefact is a folder of files. Each stage has a key, a digest of everything that
its result depends on, so equal work is done once (see `Method.plan`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict

#: Artefacts that exist before the first stage. `unlabelled` and `test` are absent where the data set has none.
SOURCES = ("support", "unlabelled", "test", "teacher", "student")

Queue = Literal["gpu", "cpu"]
Preset = Literal["draft", "balanced", "best"]


class Params(BaseModel):
    """Base of every parameter group: unknown names are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherOutput(StrEnum):
    """What a teacher can be asked for. A method needs some of these; a teacher offers some."""

    LABELS = "labels"
    PROBABILITIES = "probabilities"
    FEATURES = "features"
    WEIGHTS = "weights"


@dataclass(frozen=True)
class JobShape:
    """Counts that decide which stages a job has and into how many shards they split."""

    classes: int
    support: int
    smallest_class: int
    unlabelled: int = 0
    test: int = 0


class Report(Protocol):
    """Tells the outside how far a stage is, and the values of its training curves at this step."""

    def __call__(self, step: int, total: int, **metrics: float) -> None: ...


class Checkpoints(Protocol):
    """Where a long stage keeps its state, so that a killed worker loses seconds and not hours."""

    def latest(self) -> Path | None:
        """The folder of the newest intact checkpoint of this shard, or None."""

    def due(self) -> bool:
        """True when enough time has passed since the last checkpoint."""

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Let `write` fill an empty folder, then keep it as the newest checkpoint."""


@dataclass(frozen=True)
class StageContext:
    """Everything a stage may touch. Paths are local folders; nobody else writes to them."""

    inputs: Mapping[str, tuple[Path, ...]]  # artefact name -> its folders, one per shard that made it
    output: Path  # an empty folder to fill
    shape: JobShape
    seed: int
    device: str  # "cpu", "cuda:0"
    report: Report
    checkpoints: Checkpoints
    shard: int = 0
    shards: int = 1

    def folder(self, name: str) -> Path:
        """The folder of an input made in one piece."""
        (folder,) = self.inputs[name]
        return folder


@dataclass(frozen=True)
class Stage:
    """One step of a method.

    `inputs` must exist; `optional` ones are given when the job has them. `shards` says into how many
    independent pieces the work splits, `needed` whether this job has the stage at all. `version` goes into
    the key: raise it when the stage's code changes what it computes.
    """

    name: str
    run: Callable[[StageContext, Any], None]
    output: str
    inputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    params: str | None = None  # name of the group in the method's parameters that this stage reads
    shards: Callable[[JobShape], int] = lambda shape: 1
    needed: Callable[[JobShape], bool] = lambda shape: True
    queue: Queue = "gpu"
    seeded: bool = True  # False: the result does not depend on the job's seed
    weight: float = 1.0  # expected share of the job's time, for the progress bar
    version: int = 1


@dataclass(frozen=True)
class PlannedStage:
    """A stage of one job, with the keys under which its shards' outputs are kept."""

    stage: Stage
    key: str
    shard_keys: tuple[str, ...]
    params: dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A distillation method: where it comes from, what it needs, its parameters and its stages in order."""

    name: str
    title: str
    source: str  # paper
    needs: frozenset[TeacherOutput]
    params: type[Params]
    stages: tuple[Stage, ...]
    presets: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # preset -> nested parameter values

    def __post_init__(self) -> None:
        made = set(SOURCES)
        names: set[str] = set()
        for stage in self.stages:
            if stage.name in names:
                raise ValueError(f"method '{self.name}' has two stages named '{stage.name}'")
            names.add(stage.name)
            for name in (*stage.inputs, *stage.optional):
                if name not in made:
                    raise ValueError(
                        f"method '{self.name}', stage '{stage.name}': input '{name}' is made by no earlier stage"
                    )
            if stage.output in made:
                raise ValueError(
                    f"method '{self.name}', stage '{stage.name}': '{stage.output}' is made twice"
                )
            if stage.params is not None and stage.params not in self.params.model_fields:
                raise ValueError(
                    f"method '{self.name}', stage '{stage.name}': no parameter group '{stage.params}'"
                )
            made.add(stage.output)

    def resolve(self, preset: str, overrides: Mapping[str, Any]) -> Params:
        """The parameters of a job: defaults, then the preset, then what the caller gave.

        Raises `pydantic.ValidationError` for unknown names and values out of range, ValueError for an unknown preset.
        """
        known = {*get_args(Preset), *self.presets}
        if preset not in known:
            raise ValueError(f"there is no preset '{preset}'; there are: {', '.join(sorted(known))}")
        return self.params.model_validate(_merged(self.presets.get(preset, {}), overrides))

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def stage_params(self, stage: Stage, params: Mapping[str, Any]) -> Any:
        """The typed parameter group that `stage.run` gets as its second argument (None: it takes none)."""
        if stage.params is None:
            return None
        group: type[BaseModel] = self.params.model_fields[stage.params].annotation  # type: ignore[assignment]
        return group.model_validate(params)

    def plan(
        self, shape: JobShape, sources: Mapping[str, str], params: Params, seed: int
    ) -> tuple[PlannedStage, ...]:
        """The stages of one job with their keys.

        `sources` maps each source that the job has to its content digest. A stage's key covers its name and
        version, its own parameter group, the seed, and the keys of its inputs. Another student therefore
        changes only the keys of the stages that read it, directly or not.
        """
        keys = dict(sources)
        planned = []
        for stage in self.stages:
            if not stage.needed(shape):
                continue
            missing = [name for name in stage.inputs if name not in keys]
            if missing:
                raise ValueError(f"method '{self.name}', stage '{stage.name}': no {', '.join(missing)}")
            group = getattr(params, stage.params).model_dump(mode="json") if stage.params else {}
            inputs = {name: keys[name] for name in (*stage.inputs, *stage.optional) if name in keys}
            shards = max(1, stage.shards(shape))
            key = digest(
                {
                    "stage": stage.name,
                    "version": stage.version,
                    "params": group,
                    "inputs": inputs,
                    "seed": seed if stage.seeded else None,
                    "shards": shards,
                }
            )
            keys[stage.output] = key
            shard_keys = tuple(digest([key, index]) for index in range(shards))
            planned.append(PlannedStage(stage, key, shard_keys, group))
        return tuple(planned)


def digest(value: Any) -> str:
    """sha-256 of a JSON value in canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()


def canonical(value: Any) -> bytes:
    """The JSON of a value as always the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def registry(*methods: Method) -> dict[str, Method]:
    """Methods by name; two of a name are refused."""
    by_name: dict[str, Method] = {}
    for method in methods:
        if method.name in by_name:
            raise ValueError(f"two methods are named '{method.name}'")
        by_name[method.name] = method
    return by_name


def inputs_of(stage: Stage, available: Container[str]) -> tuple[str, ...]:
    """The input names that a stage will get, given which artefacts the job has."""
    return (*stage.inputs, *(name for name in stage.optional if name in available))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        below = merged.get(name)
        nested = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[name] = _merged(below, value) if nested else value  # type: ignore[arg-type]
    return merged
