"""Device, number format, threads and seeds: what a computation runs on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch


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
