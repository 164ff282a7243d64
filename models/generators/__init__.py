"""The generators that can be named, and whether they can be had here. Declares only: no torch at import.

A generator is a text-to-image latent diffusion model in Stable Diffusion's format: a folder with `model_index.json`
and the parts that it names.
"""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models import hub
from models.errors import GeneratorError
from models.hub import Availability

if TYPE_CHECKING:
    from models.generators.diffusion import Diffusion

_PACKAGE = Path(__file__).resolve().parents[1]
_PINNED = re.compile(r"[0-9a-f]{40}")
_INDEX = "model_index.json"
#: What diffusers and transformers call a part's weights.
_WEIGHTS = ("diffusion_pytorch_model", "model")
_FIRST_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
#: The parts that every method here needs; their folders in a checkpoint.
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_kept: dict[tuple[str, str], Diffusion] = {}  # the one that `kept` gave last, by specification and device


class Kind(IntEnum):
    """How a synthetic image was made."""

    MIXUP = 0
    CUTMIX = 1
    CVAE = 2
    DIFFUSION = 3


class GeneratorSpec(BaseModel):
    """All that is needed to load a generator: an operator may add more of these.

    `source`, by kind: embedded: a folder below `models/`; local: the absolute path of a folder; hub: an id
    `owner/name`, with the 40-digit commit as `revision`. Of the other kinds `revision` is a name for the weights:
    change it with them, so that nothing made by the old ones is used again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    title: str
    kind: Literal["embedded", "local", "hub"]
    source: str
    revision: str | None = None
    resolution: int = Field(ge=8, le=2048, description="Side in pixels of its images.")
    parameters: int | None = Field(None, ge=1, description="Learned numbers of all its parts.")
    licence: str
    licence_url: str
    resident_mib: int = Field(0, ge=0, description="Memory that the loaded networks take, as a hint.")
    guidance: float = Field(
        7.5, ge=1, le=30, description="Classifier-free guidance where a job's parameters name none."
    )

    @property
    def folder(self) -> Path | None:
        """Where its files are; None for one at the hub."""
        if self.kind == "hub":
            return None
        return _PACKAGE / self.source if self.kind == "embedded" else Path(self.source)

    @model_validator(mode="after")
    def _source_fits_kind(self) -> Self:
        if self.kind == "local" and not Path(self.source).is_absolute():
            raise ValueError(f"generator '{self.name}': source '{self.source}' is no absolute path")
        if self.kind == "hub" and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.source):
            raise ValueError(f"generator '{self.name}': source '{self.source}' is no hub id owner/name")
        if self.kind == "hub" and not _PINNED.fullmatch(self.revision or ""):
            raise ValueError(
                f"generator '{self.name}': a hub id needs its commit (40 hex digits) as revision"
            )
        return self


GENERATORS: dict[str, GeneratorSpec] = {
    spec.name: spec
    for spec in (
        GeneratorSpec(
            name="embedded",
            title="Dram's own small latent diffusion model",
            kind="embedded",
            source="zoo/generator",
            revision="2",
            resolution=32,
            parameters=10_024_027,
            licence="Apache-2.0",
            licence_url="https://www.apache.org/licenses/LICENSE-2.0",
            resident_mib=35,
            guidance=3.0,  # stronger, and its images of a class look alike
        ),
        GeneratorSpec(
            name="stable_diffusion_15",
            title="Stable Diffusion 1.5",
            kind="hub",
            source="stable-diffusion-v1-5/stable-diffusion-v1-5",
            revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            resolution=512,
            parameters=1_066_235_307,
            licence="CreativeML Open RAIL-M",
            licence_url="https://huggingface.co/spaces/CompVis/stable-diffusion-license",
            resident_mib=4100,
        ),
    )
}
#: What a method that needs a generator takes where none is named.
DEFAULT = "embedded"


def availability(spec: GeneratorSpec) -> Availability:
    """Whether the generator can be loaded on this machine now, and if not, why."""
    if spec.folder is None:
        return hub.availability(spec.source, spec.revision or "", (_INDEX, _FIRST_WEIGHTS))
    missing = _missing(spec.folder)
    if not missing:
        return Availability(True, "In a local folder." if spec.kind == "local" else "It comes with Dram.")
    if spec.kind == "embedded":
        return Availability(False, f"Its weights are not part of this installation: {missing}")
    return Availability(False, missing)


def load(spec: GeneratorSpec, device: str = "cpu") -> Diffusion:
    """The generator, ready on `device`. Raises `GeneratorError`."""
    state = availability(spec)
    if not state.available:
        raise GeneratorError(
            f"generator '{spec.name}' cannot be had: {state.reason}", "Choose another generator."
        )
    from models.generators import diffusion

    return diffusion.load(spec.folder or _snapshot(spec), device)


def kept(spec: GeneratorSpec, device: str = "cpu") -> Diffusion:
    """As `load`, but one that was asked for last is not loaded again: a job's shards follow each other in a process.

    All get the same object: leave it as it was.
    """
    key = (spec.model_dump_json(), device)
    if key not in _kept:
        release()  # before, not after: memory may not hold two
        _kept[key] = load(spec, device)
    return _kept[key]


def release() -> None:
    """Let the memory of the generator go that `kept` holds."""
    _kept.clear()


def read_spec(folder: Path) -> GeneratorSpec:
    """The generator that an artefact folder names."""
    return GeneratorSpec.model_validate_json((folder / "generator.json").read_text())


def _missing(folder: Path) -> str:
    """What a local folder lacks; empty when it lacks nothing."""
    if not (folder / _INDEX).is_file():
        return f"its folder has no {_INDEX}."
    absent = [part for part in _PARTS if not (folder / part).is_dir()]
    return f"its folder has no {', '.join(absent)}." if absent else ""


def _snapshot(spec: GeneratorSpec) -> Path:
    """The hub's files of a generator on this machine: the parts in use, weights as safetensors only."""
    from huggingface_hub import snapshot_download

    described = [_INDEX, *(f"{part}/*.{kind}" for part in _PARTS for kind in ("json", "txt"))]
    weights = [f"{part}/{name}.safetensors" for part in _PARTS for name in _WEIGHTS]
    try:
        return Path(
            snapshot_download(spec.source, revision=spec.revision, allow_patterns=[*described, *weights])
        )
    except Exception as error:  # the hub client raises its transport's own errors too
        raise GeneratorError(
            f"generator '{spec.name}' cannot be loaded from the model hub: {type(error).__name__}",
            "Try again later, or choose another generator.",
        ) from error
