"""The conditional variational auto-encoder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from models.generators import cvae
from models.methods.fsbbt import CvaeParams
from models.training.loop import NoCheckpoints


@pytest.mark.parametrize("side", [28, 31, 32, 45, 64, 100, 128])
def test_every_side_from_28_to_128_is_encoded_and_decoded(side: int) -> None:
    network = cvae.build(4, side, 3, 2, seed=0)
    label = torch.eye(4)[[0, 3]]
    with torch.no_grad():
        mean, log_variance = network.encode(torch.rand(2, 3, side, side), label)
        assert mean.shape == log_variance.shape == (2, 2)
        assert network.decode(mean, label).shape == (2, 3, side, side)


def test_the_networks_are_those_of_the_paper() -> None:
    dense = cvae.build(10, 28, 1, 2, seed=0)
    assert isinstance(dense, cvae.DenseCvae)
    assert [tuple(layer.weight.shape) for layer in dense.encoder if isinstance(layer, torch.nn.Linear)] == [
        (256, 794),
        (128, 256),
        (64, 128),
        (4, 64),
    ]
    convolutional = cvae.build(10, 32, 3, 2, seed=0)
    assert isinstance(convolutional, cvae.ConvolutionalCvae)
    convolutions = [layer for layer in convolutional.down if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [32, 64, 128, 256, 512]
    assert {(layer.kernel_size, layer.stride) for layer in convolutions} == {((4, 4), (2, 2))}


def test_the_loss_is_the_negative_evidence_bound() -> None:
    """Against torch.distributions."""
    network = cvae.build(3, 28, 1, 2, seed=0)
    images, label, noise = torch.rand(5, 1, 28, 28).round(), torch.eye(3)[[0, 1, 2, 0, 1]], torch.randn(5, 2)
    with torch.no_grad():
        loss = cvae.negative_bound(network, images, label, noise)
        mean, log_variance = network.encode(images, label)
        posterior = Normal(mean, (log_variance / 2).exp())
        code = mean + posterior.stddev * noise
        likelihood = Bernoulli(logits=network.decode(code, label)).log_prob(images).sum()
    divergence = kl_divergence(posterior, Normal(torch.zeros(5, 2), torch.ones(5, 2))).sum()
    assert float(loss) == pytest.approx(float(divergence - likelihood) / 5, rel=1e-5)


def small_set() -> tuple[torch.Tensor, torch.Tensor]:
    """Dark images of class 0, bright ones of class 2."""
    labels = torch.tensor([0, 2]).repeat(32)
    pixels = (labels * 100 + 20).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 28, 28)
    return pixels, labels


@pytest.fixture(scope="module")
def generator() -> cvae.Generator:
    pixels, labels = small_set()
    network = cvae.build(3, 28, 1, 2, seed=0)
    context = SimpleNamespace(seed=0, report=lambda *args, **metrics: None, checkpoints=NoCheckpoints())
    params = CvaeParams(epochs=80, batch_size=16, lr=4e-3)
    cvae.train(network, pixels, labels, 3, params, context)  # type: ignore[arg-type]
    return cvae.Generator(network.eval(), latent=2, classes=3, seen=(0, 2), outside=0.0, seed=0)


def test_it_makes_images_of_the_class_it_is_asked_for(generator: cvae.Generator) -> None:
    images = generator.images(list(range(10)))
    assert images.shape == (10, 3, 28, 28)
    assert images.dtype == torch.uint8
    brightness = images.float().mean((1, 2, 3))
    assert [generator.label_at(index) for index in range(10)] == [0, 2] * 5
    assert float(brightness[::2].max()) < 80
    assert float(brightness[1::2].min()) > 160


def test_an_image_depends_on_its_position_and_not_on_its_neighbours(generator: cvae.Generator) -> None:
    together = generator.images([3, 4, 5])
    assert int((together[1].int() - generator.images([4])[0].int()).abs().max()) <= 1


def test_a_share_of_the_codes_comes_from_outside_of_the_prior() -> None:
    """U[-3, 3] has the variance 3, the prior 1, and half of each 2; only the prior leaves [-3, 3]."""
    for outside, variance in ((0.0, 1.0), (0.5, 2.0), (1.0, 3.0)):
        network = cvae.build(2, 28, 1, 2, seed=0)
        generator = cvae.Generator(network, latent=2, classes=2, seen=(0, 1), outside=outside, seed=1)
        codes = torch.stack([generator._code(index) for index in range(3000)])
        assert float(codes.var()) == pytest.approx(variance, rel=0.08)
        assert float(codes.mean()) == pytest.approx(0.0, abs=0.1)
