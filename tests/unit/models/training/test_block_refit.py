"""A shortened network's blocks come nearer to the wanted tokens, whatever family it is of."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from models.errors import TrainingError
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


def refit(network: nn.Module, wanted: Tensor) -> None:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(IMAGES.split(8), wanted.split(8), strict=True)

    block_refit.refit(network, batches)


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_of_every_family_come_near_to_wanted_tokens(name: str) -> None:
    network = vit_networks.a_network(name)
    wanted = tokens(with_other_last_layers(network))
    before = (tokens(network) - wanted).abs().mean((0, 2, 3))
    refit(network, wanted)
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


def test_a_last_layer_without_bias_is_fitted_too() -> None:
    network = vit_networks.a_network("timm ViT")
    for layer in last_layers(network):
        layer.bias = None
    wanted = tokens(with_other_last_layers(network))
    before = (tokens(network) - wanted).abs().mean()
    refit(network, wanted)
    assert (tokens(network) - wanted).abs().mean() < before / 3


def test_layer_scales_of_a_hundred_thousandth_are_read_rightly() -> None:
    network = vit_networks.a_network("timm DINOv2, registers")
    for block in vit_families.blocks_of(network):
        block.ls2.gamma.data.fill_(1e-5)
    wanted = tokens(with_other_last_layers(network))
    first = [layer.weight.clone() for layer in last_layers(network)]
    refit(network, wanted)
    for layer, weight in zip(last_layers(network), first, strict=True):
        assert (layer.weight - weight).abs().max() < 10 * weight.abs().max()


def test_blocks_that_normalise_what_their_mlp_gives_are_refused() -> None:
    torch.manual_seed(0)
    network = vit_networks.of_timm("vit_tiny_patch16_224", block_fn=ResPostBlock)
    with pytest.raises(TrainingError, match="normalise what their MLPs give"):
        refit(network.eval(), torch.zeros(24, DEPTH, 17, 24))


def test_tokens_that_are_no_numbers_are_refused_and_change_nothing() -> None:
    network = vit_networks.a_network("timm ViT")
    first = {name: value.clone() for name, value in network.state_dict().items()}
    wanted = tokens(network)
    wanted[3, 0, 0, 0] = torch.inf
    with pytest.raises(TrainingError, match="after block 0 are no finite numbers"):
        refit(network, wanted)
    assert all(torch.equal(value, first[name]) for name, value in network.state_dict().items())
