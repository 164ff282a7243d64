"""What a method is: its parameters and its stages. Declares only; imports no torch.

A job starts from *sources* (the images, the teacher, the student) and runs *stages*. A stage reads artefacts
and writes one artefact; an artefact is a folder of files. Each stage has a key, a digest of everything that
its result depends on, so equal work is done once (see `Method.plan`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict

#: Artefacts that exist before the first stage. `support` (the labelled images), `unlabelled` and `test` are absent
#: where the data set has none, `generator` where the method reads none (`Method.reads`).
SOURCES = ("support", "unlabelled", "test", "teacher", "student", "generator")

Queue = Literal["gpu", "cpu"]
Preset = Literal["draft", "balanced", "best"]
#: What a student says of an image, and what is known of the labelled ones: its class, or (masks) that of each pixel.
#: Of features nothing need be known.
Task = Literal["classification", "segmentation", "features"]


class Params(BaseModel):
    """Base of every parameter group: unknown names are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherOutput(StrEnum):
    """What a teacher can be asked for. A method needs some of these; a teacher offers some."""

    LABELS = "labels"
    PROBABILITIES = "probabilities"
    FEATURES = "features"
    WEIGHTS = "weights"
    TOKENS = "tokens"  # of the blocks of a vision transformer


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


class Ledger(Protocol):
    """What a job may still ask its teacher, and what the teacher has answered already.

    An image goes by the digest of its pixels, an answer as it was given: bytes of float32 [C], see
    `models.teachers.ledger`. `teacher` is the key of the teacher's answers. Safe to call from several threads.
    """

    def known(self, teacher: str, images: Sequence[str]) -> dict[str, bytes]:
        """The answers that exist, by image."""

    def reserve(self, count: int) -> None:
        """Count `count` questions before they are sent. Raises `BudgetSpent` if that is more than is left."""

    def release(self, count: int) -> None:
        """Take back a reservation that the teacher refused without an answer."""

    def record(self, teacher: str, answers: Mapping[str, bytes]) -> None:
        """Keep answers, by image, before anything else is done with them."""


@dataclass(frozen=True)
class Response:
    """Status, headers (names in lower case) and body of an HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport(Protocol):
    """How a stage reaches a teacher over HTTP. Redirects are not followed."""

    def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float, max_bytes: int
    ) -> Response:
        """Raises `models.errors.Unreachable` where there is no whole answer of at most `max_bytes` in time."""


@dataclass(frozen=True)
class TeacherAccess:
    """What a stage that asks the teacher may use. `headers` hold the user's secrets: never log or store them."""

    ledger: Ledger
    transport: Transport | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


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
    access: TeacherAccess | None = None  # of stages that ask the teacher

    def folder(self, name: str) -> Path:
        """The folder of an input made in one piece."""
        (folder,) = self.inputs[name]
        return folder


@dataclass(frozen=True)
class Stage:
    """One step of a method.

    `inputs` must exist; `optional` ones are given when the job has them. `shards` says into how many
    independent pieces the work splits, `needed` whether this job has the stage at all; both are given the
    job's shape and all of the method's parameters. `version` goes into the key: raise it when the stage's
    code changes what it computes.
    """

    name: str
    run: Callable[[StageContext, Any], None]
    output: str
    inputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    params: str | None = None  # name of the group in the method's parameters that this stage reads
    shards: Callable[[JobShape, Any], int] = lambda shape, params: 1
    needed: Callable[[JobShape, Any], bool] = lambda shape, params: True
    asks: bool = False  # it puts questions to the teacher: it is given `StageContext.access`
    queue: Queue = "gpu"
    seeded: bool = True  # False: the result does not depend on the job's seed
    weight: float = 1.0  # expected share of the job's time, for the progress bar
    version: int = 1

    def given(self, *artefacts: str) -> Stage:
        """This stage in a method that makes these artefacts, too: it gets them where the job has them."""
        return replace(self, optional=(*self.optional, *artefacts))


@dataclass(frozen=True)
class PlannedStage:
    """A stage of one job, with the keys under which its shards' outputs are kept."""

    stage: Stage
    key: str
    shard_keys: tuple[str, ...]
    params: dict[str, Any]


@dataclass(frozen=True)
class Misfit:
    """A parameter that a teacher cannot do: its path, as "distillation.rank", and why, with what it can do."""

    parameter: str
    detail: str


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
    #: Whether a job of such parameters is given a generator of images, which its order may name.
    draws: Callable[[Any], bool] = lambda params: False
    #: Most questions that a job puts to its teacher, from its shape and all parameters. None: it asks no black box.
    queries: Callable[[JobShape, Any], int] | None = None
    #: What of all parameters cannot be done with the teacher (its spec), as far as that is known before the work.
    misfit: Callable[[Any, Any], Misfit | None] = lambda params, teacher: None
    #: The one student of this method, which it makes of the teacher. None: any of `models.students.STUDENTS`.
    student: str | None = None
    task: Task = "classification"

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

    def missing_sources(self, shape: JobShape, sources: Container[str], params: Params) -> set[str]:
        """The sources that this method needs for such a job and that the job does not have."""
        needed = [stage for stage in self.stages if stage.needed(shape, params)]
        return {name for stage in needed for name in stage.inputs if name in SOURCES and name not in sources}

    def reads(self, source: str) -> bool:
        """Whether a stage of this method is given `source`."""
        return any(source in (*stage.inputs, *stage.optional) for stage in self.stages)

    @property
    def learns_masks(self) -> bool:
        """Whether its labelled images must have masks; those of other methods must have none."""
        return self.task == "segmentation"

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
            if not stage.needed(shape, params):
                continue
            missing = [name for name in stage.inputs if name not in keys]
            if missing:
                raise ValueError(f"method '{self.name}', stage '{stage.name}': no {', '.join(missing)}")
            group = getattr(params, stage.params).model_dump(mode="json") if stage.params else {}
            inputs = {name: keys[name] for name in (*stage.inputs, *stage.optional) if name in keys}
            shards = max(1, stage.shards(shape, params))
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
