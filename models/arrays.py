"""Names for the shapes of arrays, for readers and signatures. All are `torch.Tensor`; the name says the shape.

N images, C classes, S the side in pixels, H and W height and width, D the length of a feature vector, V views.
"""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

Pixels: TypeAlias = Tensor  # uint8 [N, 3, S, S], RGB
Images: TypeAlias = Tensor  # float [N, 3, S, S], RGB in 0..1
Labels: TypeAlias = Tensor  # int64 [N], index of the class; -1: unlabelled
Features: TypeAlias = Tensor  # float [N, D]
Logits: TypeAlias = Tensor  # float [N, C]
Probabilities: TypeAlias = Tensor  # float [N, C], rows sum to 1
Views: TypeAlias = Tensor  # float [N, 5]: left, top, width, height as shares of the image, then 1 if mirrored
Mask: TypeAlias = Tensor  # uint8 [H, W], index of each pixel's class; 255: not known
