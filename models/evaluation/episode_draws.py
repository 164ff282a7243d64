"""N-way K-shot episodes: small classification tasks drawn from a folder of images.

An episode has N classes of the folder, K labelled images (supports) of each, and Q other images of these classes
(queries). The draw depends on the seed and the episode's number only, so two methods, or two students, are measured
on the same episodes; and more queries keep the supports and the queries so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models.data import fewshot
from models.errors import DataError
from models.runtime import generator

#: Fewest queries of each class: from a single one the flips within a class cannot be told from the class.
FEWEST_QUERIES = 2
_MEND = "Ask for fewer shots or queries, add images to the class, or remove it."


@dataclass(frozen=True)
class Pool:
    """What episodes are drawn from: image files by class.

    Queries come from `test/`, where the folder has one, else from the class folders, less the supports.
    `unlabelled` images are given to every episode.
    """

    root: Path
    supports: Mapping[str, tuple[Path, ...]]
    queries: Mapping[str, tuple[Path, ...]] | None
    unlabelled: tuple[Path, ...]

    def queries_left(self, name: str, shots: int) -> int:
        """How many images of a class can be asked about after `shots` have been drawn from it."""
        if self.queries is not None:
            return len(self.queries[name])
        return len(self.supports[name]) - shots

    def most_queries(self, ways: int, shots: int) -> int:
        """The largest Q that any `ways` of the classes can give."""
        return ways * min(self.queries_left(name, shots) for name in self.supports)


@dataclass(frozen=True)
class Episode:
    """One draw. Query q is of class `classes[q % N]`, so any first part of the queries is balanced."""

    number: int
    classes: tuple[str, ...]  # in the order of their draw
    supports: tuple[Path, ...]  # K of the first class, then K of the second, ...
    queries: tuple[Path, ...]


def read_pool(root: Path) -> Pool:
    """The images below `root`: class folders, with optional `test/` (class folders) and `unlabelled/`."""
    if not root.is_dir():
        raise DataError(f"there is no folder '{root}'", "Name a folder with one folder of images a class.")
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = [name for name in names if name not in ("test", "unlabelled")]
    return Pool(
        root,
        {name: _files(root / name) for name in classes},
        {name: _files(root / "test" / name) for name in classes} if "test" in names else None,
        _files(root / "unlabelled"),
    )


def check(pool: Pool, ways: int, shots: int, queries: int) -> None:
    """Raise `DataError` unless every episode of that shape can be drawn."""
    if ways < 2 or shots < 1:
        raise DataError(
            f"{ways}-way {shots}-shot is no task: it takes 2 classes and 1 labelled image of each"
        )
    if queries < FEWEST_QUERIES * ways:
        raise DataError(
            f"{queries} queries are too few for {ways} classes",
            f"Ask {FEWEST_QUERIES} of each class at least: {FEWEST_QUERIES * ways} queries.",
        )
    if len(pool.supports) < ways:
        raise DataError(
            f"'{pool.root}' has {len(pool.supports)} class folders; {ways}-way episodes need {ways}",
            "Ask for fewer ways, or add classes.",
        )
    each = -(-queries // ways)
    for name, files in pool.supports.items():
        if len(files) < shots:
            raise DataError(f"class '{name}' has {len(files)} images; {shots} are to be drawn", _MEND)
        if pool.queries_left(name, shots) < each:
            raise DataError(
                f"class '{name}' has {pool.queries_left(name, shots)} images"
                f"{' in test/' if pool.queries is not None else f' beside its {shots} supports'};"
                f" {queries} queries need {each} of each class",
                _MEND,
            )


def draw(pool: Pool, ways: int, shots: int, queries: int, seed: int, number: int) -> Episode:
    """Episode `number` of a seed; no image is both support and query, and none is asked about twice."""
    names = tuple(pool.supports)
    order = torch.randperm(len(names), generator=generator(seed, "episode", number))
    classes = tuple(names[at] for at in order[:ways].tolist())
    supports: list[Path] = []
    asked: list[list[Path]] = []
    for name in classes:
        files = _shuffled(pool.supports[name], seed, number, "supports", name)
        supports += files[:shots]
        asked.append(
            files[shots:]
            if pool.queries is None
            else _shuffled(pool.queries[name], seed, number, "queries", name)
        )
    in_turn = tuple(asked[place % ways][place // ways] for place in range(queries))
    return Episode(number, classes, tuple(supports), in_turn)


def _shuffled(files: Sequence[Path], seed: int, number: int, *path: str) -> list[Path]:
    order = torch.randperm(len(files), generator=generator(seed, "episode", number, *path))
    return [files[at] for at in order.tolist()]


def _files(folder: Path) -> tuple[Path, ...]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in fewshot.IMAGE_SUFFIXES)
    return tuple(sorted(found)) if folder.is_dir() else ()
