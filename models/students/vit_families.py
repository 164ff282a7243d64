"""Where blocks, linear layers and tokens of a vision transformer are, for the families that can be shortened.

A new family is one entry in FAMILIES. Everything else (copying blocks, low-rank updates, tokens) asks here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from models.errors import TeacherError
from models.teachers.transformers_network import PooledBackbone

#: What a linear layer of a block does. The gate of a gated MLP counts as `fc1`.
Role = Literal["q", "k", "v", "proj", "fc1", "fc2"]

_TIMM: Mapping[str, tuple[Role, ...]] = {
    "attn.qkv": ("q", "k", "v"),  # one layer, its rows in this order
    "attn.q_proj": ("q",),
    "attn.k_proj": ("k",),
    "attn.v_proj": ("v",),
    "attn.proj": ("proj",),
    "mlp.fc1": ("fc1",),
    "mlp.fc1_g": ("fc1",),
    "mlp.fc1_x": ("fc1",),
    "mlp.fc2": ("fc2",),
}
_MLP: Mapping[str, tuple[Role, ...]] = {
    "mlp.fc1": ("fc1",),
    "mlp.gate_proj": ("fc1",),
    "mlp.up_proj": ("fc1",),
    "mlp.fc2": ("fc2",),
    "mlp.down_proj": ("fc2",),
}


def _separate(attention: str, output: str) -> Mapping[str, tuple[Role, ...]]:
    """The layers of a transformers block, which keeps query, key and value apart."""
    names: Mapping[str, tuple[Role, ...]] = {
        f"{attention}.q_proj": ("q",),
        f"{attention}.k_proj": ("k",),
        f"{attention}.v_proj": ("v",),
        f"{attention}.{output}": ("proj",),
    }
    return {**names, **_MLP}


@dataclass(frozen=True)
class Family:
    """Networks that are built alike. `classes`: of timm or transformers, by name.

    `blocks` is the path of the container of blocks, `linears` the layers that a block of some of them has, by path,
    each with what its rows do in order. `prefix` counts the tokens before the patches.
    """

    title: str
    library: Literal["timm", "transformers"]
    classes: tuple[str, ...]
    blocks: str
    linears: Mapping[str, tuple[Role, ...]]
    prefix: Callable[[nn.Module], int]

    def knows(self, network: nn.Module) -> bool:
        return any(
            parent.__name__ in self.classes and parent.__module__.startswith(f"{self.library}.")
            for parent in type(network).__mro__
        )


def _timm_prefix(network: nn.Module) -> int:
    return int(network.num_prefix_tokens)  # type: ignore[arg-type]


def _registers(network: nn.Module) -> int:
    return 1 + int(network.config.num_register_tokens)  # type: ignore[union-attr,arg-type]


_ATTENTION = _separate("attention", "o_proj")
_SELF_ATTENTION = _separate("self_attn", "out_proj")

FAMILIES = (
    Family(
        "timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP and SigLIP towers)",
        "timm",
        ("VisionTransformer",),
        "blocks",
        _TIMM,
        _timm_prefix,
    ),
    Family(
        "timm's Eva (EVA, EVA-02, DINOv3) and Beit", "timm", ("Eva", "Beit"), "blocks", _TIMM, _timm_prefix
    ),
    Family("transformers' ViT", "transformers", ("ViTModel",), "layers", _ATTENTION, lambda _: 1),
    Family("transformers' DeiT", "transformers", ("DeiTModel",), "layers", _ATTENTION, lambda _: 2),
    Family(
        "transformers' DINOv2", "transformers", ("Dinov2Model",), "encoder.layer", _ATTENTION, lambda _: 1
    ),
    Family(
        "transformers' DINOv2 with registers",
        "transformers",
        ("Dinov2WithRegistersModel",),
        "encoder.layer",
        _ATTENTION,
        _registers,
    ),
    Family(
        "transformers' DINOv3", "transformers", ("DINOv3ViTModel",), "model.layer", _ATTENTION, _registers
    ),
    Family(
        "transformers' CLIP vision model",
        "transformers",
        ("CLIPVisionModel",),
        "encoder.layers",
        _SELF_ATTENTION,
        lambda _: 1,
    ),
    Family(
        "transformers' SigLIP vision model",
        "transformers",
        ("SiglipVisionModel",),
        "encoder.layers",
        _SELF_ATTENTION,
        lambda _: 0,
    ),
)


def bare(network: nn.Module) -> nn.Module:
    """The library's own network inside a teacher's."""
    return network.backbone if isinstance(network, PooledBackbone) else network


def family_of(network: nn.Module) -> Family:
    """The family of a teacher's network. Raises `TeacherError` with the list of families where it has none."""
    inner = bare(network)
    for family in FAMILIES:
        if family.knows(inner):
            return family
    raise TeacherError(
        f"the teacher's network is a {type(inner).__name__}; only a vision transformer can be shortened",
        "Choose a teacher that is one of: " + ", ".join(family.title for family in FAMILIES) + ".",
    )


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network in order. Raises `TeacherError` for no vision transformer, or unequal blocks."""
    blocks = list(bare(network).get_submodule(family_of(network).blocks).children())
    shapes = [{name: value.shape for name, value in block.state_dict().items()} for block in blocks]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise TeacherError(
                f"block {number} of the teacher's network is built otherwise than block 0, so that blocks between"
                " them cannot be left out",
                "Choose a vision transformer whose blocks are all alike.",
            )
    return blocks


def set_blocks(network: nn.Module, blocks: list[nn.Module]) -> None:
    """Put `blocks` in the place of the network's own."""
    path = family_of(network).blocks
    inner = bare(network)
    container = inner.get_submodule(path)
    new = nn.Sequential(*blocks) if isinstance(container, nn.Sequential) else nn.ModuleList(blocks)
    inner.set_submodule(path, new)


def linears_of(network: nn.Module) -> list[tuple[nn.Linear, tuple[Role, ...]]]:
    """The linear layers of all blocks, block by block, each with what its rows do.

    Raises `TeacherError` where a block has none for one of the six roles.
    """
    found: list[tuple[nn.Linear, tuple[Role, ...]]] = []
    known = family_of(network).linears
    for number, block in enumerate(blocks_of(network)):
        named = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        here = [(named[name], roles) for name, roles in known.items() if name in named]
        missing = {"q", "k", "v", "proj", "fc1", "fc2"} - {role for _, roles in here for role in roles}
        if missing:
            raise TeacherError(
                f"block {number} of the teacher's network has no linear layer for {', '.join(sorted(missing))};"
                f" it has {', '.join(named) or 'none'}",
                "Choose another teacher, or distillation.start 'copied' and adaptation 'full', which need none.",
            )
        found += here
    return found


def prefix_tokens(network: nn.Module) -> int:
    """How many tokens (class, distillation, registers) stand before those of the patches."""
    return family_of(network).prefix(bare(network))
