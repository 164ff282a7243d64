"""ResNet-12 as few-shot papers use it (Lee et al., MetaOptNet, arXiv:1904.03758, section 4.1), without DropBlock."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (64, 160, 320, 640)
SLOPE = 0.1  # of the leaky ReLU


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions and a 1x1 shortcut, then 2x2 max pooling."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *_convolution(channels, width),
            nn.LeakyReLU(SLOPE, inplace=True),
            *_convolution(width, width),
            nn.LeakyReLU(SLOPE, inplace=True),
            *_convolution(width, width),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, images: Tensor) -> Tensor:
        joined = functional.leaky_relu(self.path(images) + self.shortcut(images), SLOPE)
        return functional.max_pool2d(joined, 2)


class ResNet12(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        channels = (3, *WIDTHS[:-1])
        self.blocks = nn.Sequential(*(ResidualBlock(c, w) for c, w in zip(channels, WIDTHS, strict=True)))
        self.classifier = nn.Linear(WIDTHS[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE, nonlinearity="leaky_relu")

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(images).mean((2, 3))
        logits: Tensor = self.classifier(features)
        return logits


def build(classes: int, input_size: int) -> nn.Module:
    """[N, 3, S, S] normalised -> logits [N, classes]; any S of at least 16."""
    return ResNet12(classes)


def _convolution(channels: int, width: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
