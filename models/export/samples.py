"""Real images that the export looks at: golden ones, which travel in the bundle, and those that calibrate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    """`pixels` uint8 [height, width, 3], upright RGB; `name` as uploaded.

    `label` is its position in the data set's classes, or in those that were asked for; None if it has none there.
    """

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


def stream(
    folder: Path, positions: Collection[int] | None = None, classes: Sequence[str] | None = None
) -> Iterator[Sample]:
    """The images of a split at `positions` (all, if None), decoded one by one, in the order of the archive.

    With `classes`, labels are positions in them, matched by name.
    """
    path = folder / archive.FILE_NAME
    wanted = None if positions is None else set(positions)
    label_of = labelled_as(archive.read_index(path).classes, classes)
    for position, (image, content) in enumerate(archive.contents(path)):
        if wanted is None or position in wanted:
            label = None if image.label is None else label_of[image.label]
            yield Sample(image.name, label, pixels(content, image.name))


def labelled_as(own: Sequence[str], classes: Sequence[str] | None) -> list[int | None]:
    """Where each of the classes `own` stands in `classes`; None: nowhere."""
    numbers = {name: number for number, name in enumerate(own if classes is None else classes)}
    return [numbers.get(name) for name in own]


def in_a_row(folders: Sequence[Path], positions: Sequence[int], classes: Sequence[str]) -> Iterator[Sample]:
    """The images at `positions`, ascending, of splits that are counted through; labels are positions in `classes`."""
    first = 0
    for folder in folders:
        count = len(archive.read_index(folder / archive.FILE_NAME).images)
        inside = [position - first for position in positions if first <= position < first + count]
        if inside:
            yield from stream(folder, inside, classes)
        first += count


def pixels(content: bytes, name: str) -> NDArray[np.uint8]:
    """uint8 [height, width, 3] of an encoded image, decoded as in training."""
    decoded: NDArray[np.uint8] = images.decode(content, name).permute(1, 2, 0).contiguous().numpy()
    return decoded


def stratified(
    folder: Path, count: int, classes: Sequence[str] | None = None, left_out: Collection[int] = ()
) -> list[Sample]:
    """At most `count` images of a split, one of each class in turn, none of those at the positions `left_out`.

    Labels are positions in `classes`, if given.
    """
    images = archive.read_index(folder / archive.FILE_NAME).images
    left = _remaining(len(images), left_out)
    chosen = [left[at] for at in round_robin([images[position].label for position in left], count)]
    found = dict(zip(sorted(chosen), stream(folder, chosen, classes), strict=True))
    return [found[position] for position in chosen]


def learned_from(inputs: Mapping[str, tuple[Path, ...]]) -> tuple[Path, ...]:
    """The splits that a student learns from: the labelled images, then the unlabelled ones, as far as there are any."""
    return tuple(folder for name in ("support", "unlabelled") for folder in inputs.get(name, ()))


def calibration(
    support: Path | None, unlabelled: Path | None, count: int, left_out: Collection[int] = ()
) -> list[NDArray[np.uint8]]:
    """At most `count` images, half of them unlabelled where there are both: what the student will meet.

    None is at the positions `left_out`, which count the labelled images and then the unlabelled ones.
    """
    labelled = stratified(support, count // 2 if unlabelled else count, left_out=left_out) if support else []
    if unlabelled is None:
        return [sample.pixels for sample in labelled]
    first = len(archive.read_index(support / archive.FILE_NAME).images) if support else 0
    total = len(archive.read_index(unlabelled / archive.FILE_NAME).images)
    left = _remaining(total, [position - first for position in left_out])
    rest = min(count - len(labelled), len(left))
    spread = np.linspace(0, len(left) - 1, rest).round().astype(int).tolist() if rest else []
    chosen = stream(unlabelled, [left[at] for at in spread])
    return [sample.pixels for sample in (*labelled, *chosen)]


def _remaining(count: int, left_out: Collection[int]) -> list[int]:
    """The positions below `count` that are not left out."""
    unwanted = set(left_out)
    return [position for position in range(count) if position not in unwanted]


def shrunk(sample: Sample, side: int = GOLDEN_SIDE) -> Sample:
    """The sample with no side longer than `side` pixels."""
    image = Image.fromarray(sample.pixels)
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    return Sample(sample.name, sample.label, np.array(image))
