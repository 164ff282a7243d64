"""A vision transformer with some of its blocks left out, and the tokens that pass through it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.arrays import Images
from models.errors import TeacherError, TrainingError
from models.students import vit_families
from models.teachers import timm_network, transformers_network
from models.teachers.few_shot_head import HeadedNetwork
from models.teachers.protocol import Teacher

_WEIGHTS = "weights.safetensors"
_DOCUMENT = "backbone.json"
#: Parts of the names of learned position embeddings: timm's and transformers', and BEiT's tables of relative positions.
_POSITIONS = ("pos_embed", "position_embedding", "relative_position")


@dataclass(frozen=True)
class Shortening:
    """What the student is made of: the blocks `kept`, ascending, of the `depth` that the teacher has.

    `rule` chose them; `changes` is what `block_selection.least_change` measured, if it did, `timed` what
    `evaluation.depth_latency` did (`Timed`).
    """

    kept: tuple[int, ...]
    depth: int
    rule: str
    changes: tuple[float, ...] = ()
    timed: tuple[Mapping[str, Any], ...] = ()

    def save(self, folder: Path) -> None:
        (folder / "shortened.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Shortening:
        return cls.of(json.loads((folder / "shortened.json").read_text()))

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Shortening:
        lists = {name: tuple(document[name]) for name in ("kept", "changes", "timed")}
        return cls(**{**document, **lists})

    @property
    def matches(self) -> tuple[int, ...]:
        """For each student block the teacher's block after which its tokens should be the same.

        That is the block before the next kept one, whose input each kept block learned to work on; for the last block
        the teacher's last.
        """
        return (*(block - 1 for block in self.kept[1:]), self.depth - 1)


def shorten(network: nn.Module, kept: Sequence[int]) -> nn.Module:
    """The network with the blocks `kept` only. It shares its weights with `network`."""
    shared: dict[int, Any] = {id(value): value for value in (*network.parameters(), *network.buffers())}
    short = copy.deepcopy(network, shared)
    blocks = vit_families.blocks_of(short)
    vit_families.set_blocks(short, [blocks[index] for index in kept])
    inner = vit_families.bare(short)
    if getattr(inner, "rope_mixed", False):  # its frequencies are learnt block by block: [2, blocks, ...]
        rope: Any = inner.rope
        rope.freqs = nn.Parameter(rope.freqs[:, list(kept)], requires_grad=rope.freqs.requires_grad)
    if getattr(inner, "pooler", None) is not None:  # `PooledBackbone` does not ask it
        inner.pooler = None  # type: ignore[assignment]
    return short


class TokenTap:
    """Lets images through a network and keeps the tokens [N, T, D] that come out of some of its blocks.

    These are the residual stream, before the final norm, whatever the library calls it.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[int]) -> None:
        self.network = network
        self._seen: dict[int, Tensor] = {}
        modules = vit_families.blocks_of(network)
        self._order = tuple(blocks)
        self._handles = [
            modules[block].register_forward_hook(self._keeper(block)) for block in sorted(set(blocks))
        ]

    def __call__(self, images: Images) -> list[Tensor]:
        """The tokens after each of the blocks, for normalised images [N, 3, S, S]."""
        self.network(images)
        tokens = [self._seen[block] for block in self._order]
        self._seen.clear()
        return tokens

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> TokenTap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keeper(self, block: int) -> Any:
        def keep(_module: nn.Module, _arguments: object, output: Any) -> None:
            self._seen[block] = output[0] if isinstance(output, tuple) else output

        return keep


def check_size(teacher: Teacher) -> None:
    """Raise `TeacherError` where images of the teacher's `input_size` do not divide into its patches.

    The libraries leave out what is over at the border, and say nothing. A size that the teacher was trained on is
    always right: some divide its images of 384 pixels into patches of 14.
    """
    size = teacher.input_size
    if size == _own_size(teacher):
        return
    stem = next((module for module in teacher.network.modules() if isinstance(module, nn.Conv2d)), None)
    if stem is None or stem.stride != stem.kernel_size:  # no plain cutting into patches
        return
    patch = int(stem.stride[0])
    if size % patch:
        nearest = sorted({max(patch, size // patch * patch), -(-size // patch) * patch})
        raise TeacherError(
            f"images of {size} pixels do not divide into the teacher's patches of {patch}",
            f"Choose {' or '.join(map(str, nearest))} as distillation.input_size.",
        )


def interpolated_from(teacher: Teacher) -> int | None:
    """The side that the teacher's position embedding was trained on, if images are of another one now."""
    own = _own_size(teacher)
    names = [name for name, _ in teacher.network.named_parameters()]
    learned = any(part in name for name in names for part in _POSITIONS)
    return own if learned and own != teacher.input_size else None


def _own_size(teacher: Teacher) -> int | None:
    """The side of the images that it was trained on, if known."""
    return teacher.architecture["own_size"] if teacher.architecture else None


@dataclass(frozen=True)
class Backbone:
    """A shortened network without a head, with what is needed to build it again and to feed it.

    `interpolated_from` is the side of the images that the teacher's position embedding was trained on, where it had to
    be interpolated.
    """

    network: nn.Module
    architecture: Mapping[str, Any]
    shortening: Shortening
    input_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    embedding_dim: int
    interpolated_from: int | None
    trained_with: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        network: nn.Module,
        shortening: Shortening,
        trained_with: Mapping[str, Any] | None = None,
    ) -> Backbone:
        """A shorter `network` made of the teacher's. `trained_with`: parameters, for the records."""
        return cls(
            network=network,
            architecture=teacher.architecture or {},
            shortening=shortening,
            input_size=teacher.input_size,
            mean=teacher.mean,
            std=teacher.std,
            embedding_dim=teacher.embedding_dim,
            interpolated_from=interpolated_from(teacher),
            trained_with=trained_with or {},
        )

    def document(self) -> dict[str, Any]:
        """All but the weights, as JSON."""
        fields = {name: value for name, value in vars(self).items() if name != "network"}
        return {**fields, "shortening": asdict(self.shortening)}

    def save(self, folder: Path) -> None:
        save_weights(self.network, folder)
        (folder / _DOCUMENT).write_text(json.dumps(self.document(), indent=1) + "\n")

    def as_teacher(self, device: torch.device) -> Teacher:
        """The same network as something that turns images into features."""
        return Teacher(
            self.network.eval().requires_grad_(False).to(device),
            self.input_size,
            self.mean,
            self.std,
            self.embedding_dim,
            self.architecture,
        )


def load_backbone(folder: Path) -> Backbone:
    """What DISTILL_TOKENS left."""
    document = json.loads((folder / _DOCUMENT).read_text())
    backbone = _empty(document)
    _load_weights(backbone.network, folder)
    return backbone


def load_student(folder: Path, document: Mapping[str, Any]) -> nn.Module:
    """The network of a `trained_student` folder whose `student.json` is `document`: [N, 3, S, S] -> logits [N, C]."""
    backbone = _empty(document["backbone"])
    classes = len(document["classes"])
    network = HeadedNetwork.empty(backbone.network, backbone.embedding_dim, classes, **document["head"])
    _load_weights(network, folder)
    return network


def save_weights(network: nn.Module, folder: Path) -> None:
    weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    save_file(weights, folder / _WEIGHTS)


def drawn_anew(teacher: Teacher, shortening: Shortening) -> nn.Module:
    """A shorter network of the teacher's kind, on its device, with weights from torch's global generators."""
    device = next(teacher.network.parameters()).device
    return _untrained(teacher.architecture or {}, teacher.input_size, shortening).to(device)


def _untrained(architecture: Mapping[str, Any], input_size: int, shortening: Shortening) -> nn.Module:
    if architecture["library"] == "timm":
        whole = timm_network.build(architecture, input_size)
    else:
        whole = transformers_network.build(architecture)
    return copy.deepcopy(shorten(whole, shortening.kept)).eval()


def _empty(document: Mapping[str, Any]) -> Backbone:
    """A backbone with random weights."""
    shortening = Shortening.of(document["shortening"])
    architecture = document["architecture"]
    return Backbone(
        network=_untrained(architecture, document["input_size"], shortening),
        architecture=architecture,
        shortening=shortening,
        input_size=document["input_size"],
        mean=tuple(document["mean"]),
        std=tuple(document["std"]),
        embedding_dim=document["embedding_dim"],
        interpolated_from=document["interpolated_from"],
        trained_with=document["trained_with"],
    )


def _load_weights(network: nn.Module, folder: Path) -> None:
    try:
        network.load_state_dict(load_file(folder / _WEIGHTS))
    except RuntimeError as error:
        raise TrainingError(f"the student's weights do not fit its network: {error}") from error
