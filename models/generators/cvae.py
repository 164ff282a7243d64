"""TRAIN_CVAE: a conditional variational auto-encoder of the real images and the classes that the teacher saw.

The two networks are those of Nguyen et al., arXiv:2207.12106, appendix: dense layers below 32 pixels, strided
convolutions from there on, as many as bring the side to 1. Loss: Kingma & Welling, arXiv:1312.6114, equation 10,
with a Bernoulli decoder; conditioned on a class as in Sohn et al., NIPS 2015, equation 3.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from models.arrays import Images, Labels, Pixels
from models.data import images as image_tensors
from models.errors import DataError
from models.methods.fsbbt import CvaeParams
from models.pipeline import StageContext
from models.runtime import generator, resolve_device, seed_weights
from models.teachers import black_box_questions
from models.training.loop import Schedule, fit

#: From this side on the convolutional network is used.
CONVOLUTIONAL_FROM = 32
#: The paper's passes over the images: MNIST's, CIFAR-10's.
_DENSE_EPOCHS, _CONVOLUTIONAL_EPOCHS = 100, 600
_DENSE_UNITS = (256, 128, 64)
_FIRST_WIDTH, _WIDEST = 32, 512
_BOTTLENECK = (32, 16)
_FARTHEST = 3.0  # codes out of distribution are drawn from U[-3, 3]


class DenseCvae(nn.Module):
    """For images [N, P, S, S] of few pixels: encoder [pixels, class] 256-128-64, mirrored decoder."""

    def __init__(self, classes: int, side: int, planes: int, latent: int) -> None:
        super().__init__()
        self.side, self.planes = side, planes
        pixels = planes * side * side
        self.encoder = nn.Sequential(*_dense(pixels + classes, *_DENSE_UNITS), nn.Linear(64, 2 * latent))
        self.decoder = nn.Sequential(*_dense(latent + classes, *_DENSE_UNITS[::-1]), nn.Linear(256, pixels))

    def encode(self, images: Images, label: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [N, Z] of the codes of images [N, P, S, S] with one-hot classes [N, C]."""
        mean, log_variance = self.encoder(torch.cat([images.flatten(1), label], 1)).chunk(2, 1)
        return mean, log_variance

    def decode(self, code: Tensor, label: Tensor) -> Tensor:
        """Logits [N, P, S, S] of pixels in 0..1 for codes [N, Z] and one-hot classes [N, C]."""
        logits: Tensor = self.decoder(torch.cat([code, label], 1))
        return logits.view(-1, self.planes, self.side, self.side)


class ConvolutionalCvae(nn.Module):
    """For images [N, P, S, S]: the class is one more plane; 4x4 convolutions of stride 2, 32-64-128-256-512-512...,
    until the side is 1; dense 32-16; mirrored decoder.
    """

    def __init__(self, classes: int, side: int, planes: int, latent: int) -> None:
        super().__init__()
        sides = [side // 2**stage for stage in range(side.bit_length())]  # the last is 1
        widths = [min(_WIDEST, _FIRST_WIDTH * 2**stage) for stage in range(len(sides) - 1)]
        self.side, self.planes = side, planes
        self.plane = nn.Linear(classes, side * side)
        down: list[nn.Module] = []
        for before, after in zip([planes + 1, *widths], widths, strict=False):
            down += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU(inplace=True)]
        self.down = nn.Sequential(*down, nn.Flatten())
        self.encoder = nn.Sequential(*_dense(widths[-1], *_BOTTLENECK), nn.Linear(16, 2 * latent))
        self.decoder = nn.Sequential(*_dense(latent + classes, *_BOTTLENECK[::-1], widths[-1]))
        up: list[nn.Module] = []
        for before, after, target in zip(widths[::-1], [*widths[-2::-1], planes], sides[-2::-1], strict=True):
            up += [
                nn.ConvTranspose2d(before, after, 4, 2, 1, output_padding=target % 2),
                nn.ReLU(inplace=True),
            ]
        self.up = nn.Sequential(*up[:-1])

    def encode(self, images: Images, label: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [N, Z] of the codes of images [N, P, S, S] with one-hot classes [N, C]."""
        plane = self.plane(label).view(-1, 1, self.side, self.side)
        seen = torch.cat([images, plane], 1).contiguous(memory_format=torch.channels_last)
        mean, log_variance = self.encoder(self.down(seen)).chunk(2, 1)
        return mean, log_variance

    def decode(self, code: Tensor, label: Tensor) -> Tensor:
        """Logits [N, P, S, S] of pixels in 0..1 for codes [N, Z] and one-hot classes [N, C]."""
        start = self.decoder(torch.cat([code, label], 1))[:, :, None, None]
        logits: Tensor = self.up(start.contiguous(memory_format=torch.channels_last))
        return logits


@dataclass(frozen=True)
class Generator:
    """A trained decoder. `seen` are the classes it knows; `outside` of its codes are out of distribution."""

    network: DenseCvae | ConvolutionalCvae
    latent: int
    classes: int
    seen: tuple[int, ...]
    outside: float
    seed: int

    def label_at(self, index: int) -> int:
        """The class of the image at position `index`: each in its turn."""
        return self.seen[index % len(self.seen)]

    @torch.inference_mode()
    def images(self, index: list[int]) -> Pixels:
        """uint8 [m, 3, S, S]: the images at positions `index`, each from a code of its own."""
        device = next(self.network.parameters()).device
        codes = torch.stack([self._code(at) for at in index]).to(device)
        labels = torch.tensor([self.label_at(at) for at in index])
        planes = self.network.decode(codes, _one_hot(labels, self.classes).to(device)).sigmoid()
        return image_tensors.to_pixels(planes.cpu()).expand(-1, 3, -1, -1).contiguous()

    def _code(self, index: int) -> Tensor:
        random = generator(self.seed, "code", index)
        if float(torch.rand(1, generator=random)) < self.outside:
            return _FARTHEST * (2 * torch.rand(self.latent, generator=random) - 1)
        return torch.randn(self.latent, generator=random)


def run(context: StageContext, params: CvaeParams) -> None:
    """Train on the real images that are not held out. Writes the weights, `cvae.json` and `history.json`."""
    introduction = black_box_questions.read(context.folder("black_box"))
    kept = introduction.kept(context.shape.support + context.shape.unlabelled)
    answers = black_box_questions.read_real(context.inputs["real_answers"])
    labels = introduction.probabilities(answers[kept]).argmax(1)
    pixels = black_box_questions.real_pixels(context, introduction.size)[kept]
    if len(pixels) < 2:
        raise DataError(f"there is {len(pixels)} real image to learn from; 2 are needed", "Add images.")
    grey = bool((pixels == pixels[:, :1]).all())
    network = build(
        len(introduction.classes), introduction.size, 1 if grey else 3, params.latent, context.seed
    )
    ready = network.to(device=resolve_device(context.device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained, history = train(ready, pixels, labels, len(introduction.classes), params, context)
    weights = {name: value.cpu().contiguous() for name, value in trained.state_dict().items()}
    save_file(weights, context.output / "weights.safetensors")
    document = {
        "classes": len(introduction.classes),
        "side": introduction.size,
        "planes": 1 if grey else 3,
        "latent": params.latent,
        "seen": torch.unique(labels).tolist(),
        "outside": params.outside,
    }
    (context.output / "cvae.json").write_text(json.dumps(document))
    (context.output / "history.json").write_text(json.dumps(history))


def build(classes: int, side: int, planes: int, latent: int, seed: int) -> DenseCvae | ConvolutionalCvae:
    """A new network for images [N, planes, side, side], its weights drawn from `seed`."""
    seed_weights(seed, "weights", "cvae")
    family = DenseCvae if side < CONVOLUTIONAL_FROM else ConvolutionalCvae
    return family(classes, side, planes, latent)


def train(
    network: DenseCvae | ConvolutionalCvae,
    pixels: Pixels,
    labels: Labels,
    classes: int,
    params: CvaeParams,
    context: StageContext,
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train `network` on images [N, 3, S, S] with classes [N]; returns it and the training curve."""
    device = next(network.parameters()).device
    papers = _DENSE_EPOCHS if isinstance(network, DenseCvae) else _CONVOLUTIONAL_EPOCHS
    epochs = params.epochs or papers
    batch_size = min(params.batch_size, len(pixels))
    batches = len(pixels) // batch_size
    shown, known = pixels[:, : network.planes].to(device), _one_hot(labels, classes).to(device)

    def loss_at(step: int) -> Tensor:
        order = torch.randperm(len(pixels), generator=generator(context.seed, "epoch", step // batches))
        batch = order[step % batches * batch_size :][:batch_size].to(device)
        noise = torch.randn(len(batch), params.latent, generator=generator(context.seed, "noise", step))
        return negative_bound(network, shown[batch].float() / 255, known[batch], noise.to(device))

    schedule = Schedule(epochs * batches, params.lr, weight_decay=0.0, ema_decay=0.0)
    return fit(network, loss_at, schedule, context.report, context.checkpoints)


def negative_bound(
    network: DenseCvae | ConvolutionalCvae, images: Images, label: Tensor, noise: Tensor
) -> Tensor:
    """Mean over images of summed binary cross-entropy + KL(q(z|x,y) || N(0, I)), with one draw `noise` [N, Z]."""
    mean, log_variance = network.encode(images, label)
    code = mean + noise * (0.5 * log_variance).exp()
    logits = network.decode(code, label).float()
    error = functional.binary_cross_entropy_with_logits(logits, images, reduction="sum")
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).float().sum()
    return (error + divergence) / len(images)


def load(folder: Path, seed: int, device: torch.device) -> Generator:
    """The generator that TRAIN_CVAE left in `folder`; the codes it draws depend on `seed`."""
    document = json.loads((folder / "cvae.json").read_text())
    network = build(document["classes"], document["side"], document["planes"], document["latent"], seed)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    return Generator(
        network=network.eval().to(device),
        latent=document["latent"],
        classes=document["classes"],
        seen=tuple(document["seen"]),
        outside=document["outside"],
        seed=seed,
    )


def _dense(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return layers


def _one_hot(labels: Labels, classes: int) -> Tensor:
    return functional.one_hot(labels, classes).float()
