"""Synthetic images in shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.generators import Kind, shards, synthesis
from models.methods.fsbbt import SynthesisParams

PIXELS = torch.arange(12 * 3 * 28 * 28).remainder(256).to(torch.uint8).view(12, 3, 28, 28)
KEPT = torch.arange(12) * 2


def made(index: range, **params: object) -> shards.Synthetic:
    chosen = SynthesisParams(**params)  # type: ignore[arg-type]
    mixes = [synthesis.plan(at, len(PIXELS), 28, chosen, seed=0) for at in index]
    return synthesis.make(index, mixes, PIXELS, KEPT, None)


def test_a_part_made_alone_is_the_same_as_made_with_the_others() -> None:
    everything, part = made(range(40), maker="mixup_cutmix"), made(range(17, 29), maker="mixup_cutmix")
    for name, value in vars(part).items():
        assert torch.equal(value, getattr(everything, name)[17:29])


def test_mixes_name_the_real_images_that_they_were_made_of() -> None:
    synthetic = made(range(30), maker="mixup")
    for row in range(30):
        first, second = PIXELS[synthetic.first[row] // 2], PIXELS[synthetic.second[row] // 2]
        share = float(synthetic.share[row])
        wanted = share * first.double() + (1 - share) * second.double()
        assert float((synthetic.pixels[row].double() - wanted).abs().max()) <= 0.501


def test_the_cvae_makes_as_many_images_as_mixes_are_dropped() -> None:
    """A share in hundredths of 0..0.05 or 0.95..1: 11 % of a uniform one."""
    params = SynthesisParams(maker="mixup_cvae")
    plans = [synthesis.plan(index, 50, 32, params, seed=0) for index in range(4000)]
    assert sum(plan is None for plan in plans) / 4000 == pytest.approx(0.11, abs=0.02)
    assert all(plan is None or 0.05 < plan.share < 0.95 for plan in plans)


def test_half_of_the_mixes_are_of_each_kind() -> None:
    kinds = made(range(10), maker="mixup_cutmix").kind
    assert kinds.tolist() == [Kind.MIXUP, Kind.CUTMIX] * 5


def test_images_are_read_back_by_position_over_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHUNK", 10)
    folders = [tmp_path / str(shard) for shard in range(3)]
    for shard, folder in enumerate(folders):
        folder.mkdir()
        made(shards.positions(shard, 24), maker="cutmix").save(folder)
    everything = made(range(24), maker="cutmix").pixels
    index = torch.tensor([0, 3, 9, 10, 21, 23])
    assert shards.count(folders) == 24
    assert torch.equal(shards.pixels_at(folders, index), everything[index])
