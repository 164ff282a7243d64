"""LeNet-5 with ReLU and max pooling, as FS-BBT trains it (Nguyen et al., arXiv:2207.12106, section 4.1).

After LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 86(11), 1998. The half one
has half the channels and all of the dense units (Nayak et al., ZSKD, arXiv:1905.08114, section 4.1).
"""

from __future__ import annotations

from torch import Tensor, nn

CHANNELS = (6, 16)
UNITS = (120, 84)
KERNEL = 5


class LeNet5(nn.Module):
    def __init__(self, classes: int, input_size: int, channels: tuple[int, int] = CHANNELS) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels[0], KERNEL),
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels[0], channels[1], KERNEL, padding=KERNEL // 2),
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        )
        side = (input_size - KERNEL + 1) // 2 // 2
        self.classifier = nn.Sequential(
            nn.Linear(channels[1] * side * side, UNITS[0]),
            nn.ReLU(inplace=True),
            nn.Linear(UNITS[0], UNITS[1]),
            nn.ReLU(inplace=True),
            nn.Linear(UNITS[1], classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean(1, keepdim=True)
        logits: Tensor = self.classifier(self.features(grey))
        return logits


def build(classes: int, input_size: int, *, half: bool = False) -> nn.Module:
    """[N, 3, S, S] normalised, averaged to one channel -> logits [N, classes]; S is fixed by the dense layers."""
    channels = (CHANNELS[0] // 2, CHANNELS[1] // 2) if half else CHANNELS
    return LeNet5(classes, input_size, channels)
