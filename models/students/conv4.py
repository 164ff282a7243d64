"""Conv4-64, the classic few-shot network (Snell et al., arXiv:1703.05175, section 3.1)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

WIDTH = 64
BLOCKS = 4


def build(classes: int, input_size: int) -> nn.Module:
    """[N, 3, S, S] normalised -> logits [N, classes]; the last feature map is flattened, so S is fixed."""
    blocks = [_block(3 if index == 0 else WIDTH) for index in range(BLOCKS)]
    side = input_size // 2**BLOCKS
    classifier = nn.Linear(WIDTH * side * side, classes)
    return nn.Sequential(
        OrderedDict(blocks=nn.Sequential(*blocks), flatten=nn.Flatten(), classifier=classifier)
    )


def _block(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, WIDTH, 3, padding=1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),  # after the pooling: the same function and gradient on a quarter of the values
    )
