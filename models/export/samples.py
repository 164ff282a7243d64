"""Real images that the export looks at: golden ones, which travel in the bundle, and those that calibrate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.data import archive, images

#: Golden images are shrunk to this side, so that a bundle of a large student's photographs stays small.
GOLDEN_SIDE = 256


@dataclass(frozen=True)
class Sample:
    """`pixels` uint8 [height, width, 3], upright RGB; `label` None if unlabelled; `name` as uploaded."""

    name: str
    label: int | None
    pixels: NDArray[np.uint8]


def round_robin(labels: Sequence[int | None], count: int) -> list[int]:
    """At most `count` positions: the first of every label, then the second of every label, and so on."""
    members: dict[int | None, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        members[label].append(position)
    turns = max((len(positions) for positions in members.values()), default=0)
    order = sorted(members, key=lambda label: -1 if label is None else label)
    dealt = [members[label][turn] for turn in range(turns) for label in order if turn < len(members[label])]
    return dealt[:count]


def stream(folder: Path, positions: Collection[int] | None = None) -> Iterator[Sample]:
    """The images of a split at `positions` (all, if None), decoded one by one, in the order of the archive."""
    wanted = None if positions is None else set(positions)
    for position, (image, content) in enumerate(archive.contents(folder / archive.FILE_NAME)):
        if wanted is None or position in wanted:
            yield Sample(image.name, image.label, pixels(content, image.name))


def pixels(content: bytes, name: str) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] of an encoded image, decoded as in training."""
    decoded: NDArray[np.uint8] = images.decode(content, name).permute(1, 2, 0).contiguous().numpy()
    return decoded


def stratified(folder: Path, count: int) -> list[Sample]:
    """At most `count` images of a split, one of each class in turn."""
    index = archive.read_index(folder / archive.FILE_NAME)
    chosen = round_robin([image.label for image in index.images], count)
    found = dict(zip(sorted(chosen), stream(folder, chosen), strict=True))
    return [found[position] for position in chosen]


def calibration(support: Path, unlabelled: Path | None, count: int) -> list[NDArray[np.uint8]]:
    """At most `count` images, half of them unlabelled where there are any: what the student will meet."""
    labelled = stratified(support, count // 2 if unlabelled else count)
    if unlabelled is None:
        return [sample.pixels for sample in labelled]
    total = len(archive.read_index(unlabelled / archive.FILE_NAME).images)
    rest = min(count - len(labelled), total)
    spread = np.linspace(0, total - 1, rest).round().astype(int).tolist() if rest else []
    return [sample.pixels for sample in (*labelled, *stream(unlabelled, spread))]


def shrunk(sample: Sample, side: int = GOLDEN_SIDE) -> Sample:
    """The sample with no side longer than `side` pixels."""
    image = Image.fromarray(sample.pixels)
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    return Sample(sample.name, sample.label, np.array(image))
