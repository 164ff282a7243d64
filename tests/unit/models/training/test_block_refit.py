"""A shortened network's blocks come nearer to the wanted tokens, whatever family it is of."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from models.runtime import generator
from models.students import vit_families
from models.students.shortened_vit import TokenTap
from models.training import block_refit
from tests import vit_networks
from tests.vit_networks import DEPTH, NETWORKS, SIDE

IMAGES = torch.rand(24, 3, SIDE, SIDE, generator=generator(0))


@torch.no_grad()
def tokens(network: nn.Module) -> Tensor:
    """[24, blocks, T, D]"""
    with TokenTap(network, range(DEPTH)) as tap:
        return torch.stack(tap(IMAGES), 1)


def last_layers(network: nn.Module) -> list[nn.Linear]:
    return [layer for layer, roles in vit_families.linears_of(network) if roles == ("fc2",)]


def with_other_last_layers(network: nn.Module) -> nn.Module:
    other = copy.deepcopy(network)
    random = generator(1)
    for layer in last_layers(other):
        layer.weight.data += 0.5 * layer.weight.std() * torch.randn(layer.weight.shape, generator=random)
        if layer.bias is not None:
            layer.bias.data += 0.1
    return other


def refit(network: nn.Module, wanted: Tensor) -> list[int]:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(IMAGES.split(8), wanted.split(8), strict=True)

    fitted: list[int] = []
    block_refit.refit(network, batches, fitted.append)
    return fitted


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_of_every_family_come_near_to_wanted_tokens(name: str) -> None:
    network = vit_networks.a_network(name)
    wanted = tokens(with_other_last_layers(network))
    before = (tokens(network) - wanted).abs().mean((0, 2, 3))
    assert refit(network, wanted) == [1, 2, 3, 4]
    after = (tokens(network) - wanted).abs().mean((0, 2, 3))
    assert (after < before / 3).all(), (before, after)


def test_only_the_last_layers_of_blocks_change() -> None:
    network = vit_networks.a_network("timm ViT")
    first = {name: value.clone() for name, value in network.state_dict().items()}
    refit(network, tokens(with_other_last_layers(network)))
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, first[name])}
    assert changed == {
        f"blocks.{block}.mlp.fc2.{kind}" for block in range(DEPTH) for kind in ("weight", "bias")
    }


def test_a_network_that_gives_the_wanted_tokens_stays_as_it_is() -> None:
    network = vit_networks.a_network("timm EVA-02")
    first = {name: value.clone() for name, value in network.state_dict().items()}
    refit(network, tokens(network))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, first[name], rtol=1e-4, atol=1e-5)


def test_a_channel_that_the_layer_cannot_reach_keeps_its_weights() -> None:
    network = vit_networks.a_network("timm DINOv2, registers")
    wanted = tokens(with_other_last_layers(network))
    scale = vit_families.blocks_of(network)[0].ls2.gamma
    scale.data[3] = 0
    first = last_layers(network)[0].weight.clone()
    refit(network, wanted)
    same = (last_layers(network)[0].weight == first).all(1)
    assert same.nonzero()[:, 0].tolist() == [3]
    assert all(value.isfinite().all() for value in network.state_dict().values())
