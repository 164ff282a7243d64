"""Device, number format, threads and seeds: what a computation runs on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch

_bfloat16_on_cpu = False


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda:N` as a device; `auto` takes the first GPU if there is one."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def use_threads(count: int) -> None:
    """Let one computation use `count` CPU threads."""
    torch.set_num_threads(max(1, count))


@contextlib.contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    """bfloat16 on CUDA, where it is fast and needs no loss scaling; float32 elsewhere."""
    if device.type == "cuda":
        with torch.autocast("cuda", dtype=torch.bfloat16):
            yield
    else:
        yield


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without, it would be slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def use_bfloat16_on_cpu(wanted: bool = True) -> None:
    """Let this process train in bfloat16 on a CPU that has it: convolutions are about 1.5 times faster.

    Off by default, because the numbers then depend on the machine.
    """
    global _bfloat16_on_cpu
    _bfloat16_on_cpu = wanted and cpu_has_bfloat16()


@contextlib.contextmanager
def training_autocast(device: torch.device) -> Iterator[None]:
    """As `autocast`, and bfloat16 on the CPU where `use_bfloat16_on_cpu` asked for it."""
    if device.type == "cpu" and _bfloat16_on_cpu:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    else:
        with autocast(device):
            yield


def generator(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator whose numbers depend on `seed` and `path` only, e.g. `generator(seed, "batch", step)`.

    Training draws every step's numbers from the step's own generator: nothing of the past is needed to go on
    from a checkpoint, and the numbers are the same on every device.
    """
    text = "/".join(str(part) for part in (seed, *path))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
    return torch.Generator().manual_seed(number)


def seed_weights(seed: int, *path: int | str) -> None:
    """Seed torch's global generators, from which modules draw their first weights."""
    torch.manual_seed(generator(seed, *path).initial_seed())
