"""ResNet-8: the residual network of fast CIFAR-10 training, narrow and pooled from the first layer on.

After Page's ResNet-9 (How to train your ResNet, 2019; first in Coleman et al., DAWNBench, 2017): convolutions that are
pooled, two of them followed by a residual block, a global maximum at the end. His third convolution is left out, and
the first is pooled too, which makes it about twelve times cheaper.
"""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (16, 64, 128)


class ResidualBlock(nn.Module):
    """The input plus two 3x3 convolutions of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.path = nn.Sequential(*_convolution(width, width), *_convolution(width, width))

    def forward(self, images: Tensor) -> Tensor:
        joined: Tensor = images + self.path(images)
        return joined


class ResNet8(nn.Module):
    def __init__(self, classes: int, widths: tuple[int, int, int] = WIDTHS) -> None:
        super().__init__()
        stem, middle, last = widths
        self.features = nn.Sequential(
            *_convolution(3, stem, pool=True),
            *_convolution(stem, middle, pool=True),
            ResidualBlock(middle),
            *_convolution(middle, last, pool=True),
            ResidualBlock(last),
        )
        self.classifier = nn.Linear(last, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).amax((2, 3)))
        return logits


def build(classes: int, input_size: int, *, half: bool = False) -> nn.Module:
    """[N, 3, S, S] normalised -> logits [N, classes]; any S of at least 8. `half`: half the channels."""
    stem, middle, last = WIDTHS
    return ResNet8(classes, (stem // 2, middle // 2, last // 2) if half else WIDTHS)


def _convolution(channels: int, width: int, *, pool: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return [*layers, nn.ReLU(inplace=True)]  # after the pooling: the same function on a quarter of the values
