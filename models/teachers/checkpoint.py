"""Whether the weights of a checkpoint are those of the network that its configuration describes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from models.errors import TeacherError

#: Parts of a backbone that serve pretraining only, as the mask token and Inception's second classifier.
_ONLY_TO_TRAIN = ("mask_token", "AuxLogits")
_HINT = "Give the config.json and the model.safetensors of one checkpoint."

#: Shape in the network and shape in the file, by name.
Misshapen = Mapping[str, tuple[Sequence[int], Sequence[int]]]


def refuse_misfits(
    teacher: str,
    network: nn.Module,
    *,
    missing: Iterable[str],
    left_over: Iterable[str],
    misshapen: Misshapen,
    heads: Collection[str],
) -> None:
    """Raise `TeacherError` where weights of `network` are missing, are of other shapes, or are left over.

    Left over may be whole parts that the network lacks, as a decoder or a text tower, and those named in `heads`. More
    of a part that it has means that another network was trained, a deeper one perhaps.
    """
    if misshapen:
        name = min(misshapen)
        own, found = misshapen[name]
        raise TeacherError(
            f"teacher '{teacher}': '{name}' is {list(own)} by its config.json, in the file {list(found)}",
            _HINT,
        )
    if absent := sorted(missing):
        raise TeacherError(f"teacher '{teacher}': weights are missing: {_first_of(absent)}", _HINT)
    computed = {name for name, _ in network.named_buffers()}
    unplaced = sorted(
        name
        for name in left_over
        if name not in computed
        and (part := name.split(".")[0]) not in heads
        and hasattr(network, part)
        and not any(only in name for only in _ONLY_TO_TRAIN)
    )
    if unplaced:
        raise TeacherError(
            f"teacher '{teacher}': its file has weights that its config.json has no place for:"
            f" {_first_of(unplaced)}",
            _HINT,
        )


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
