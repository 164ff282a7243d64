"""The synthetic images of a job: where each comes from, what the teacher says of it, whether it is learnt from.

They are read from what the stages left, see `models.methods.fsbbt` and `models.methods.tint`; a job that makes none
has none, one that still makes them has those of its finished shards.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from PIL import Image
from sqlalchemy.orm import Session

from app.db import owned
from app.errors import Gone, NotFound
from app.jobs import service, tensors
from app.jobs.schemas import OriginView, SampleScore, SampleView
from app.jobs.tables import JobStage, Shard, StageOutput
from app.security.principal import Principal
from app.storage import BlobStore
from app.wiring import Wiring
from models.data import archive
from models.generators import Kind
from models.methods.tint import SelectionParams, Verdict

#: Classes that a sample's scores name, the surest first.
TOP = 5
_PIXELS = "images.safetensors"
_LABELS = "soft_labels.safetensors"
_VERDICTS = "selection.safetensors"


def page(
    wiring: Wiring, principal: Principal, job_id: str, limit: int, after: int
) -> tuple[list[SampleView], bool]:
    """The samples that follow number `after`, and whether more follow."""
    made = _read(wiring, principal, job_id)
    stop = min(after + limit, made.count)
    return made.views(after, stop), stop < made.count


def png(wiring: Wiring, principal: Principal, job_id: str, number: int, size: int | None) -> bytes:
    """One image as PNG, its longer side at most `size` pixels. Raises NotFound."""
    made = _read(wiring, principal, job_id)
    if not 1 <= number <= made.count:
        raise NotFound(
            f"Job {job_id} has no sample {number}; it has {made.count} so far.", code="sample_not_found"
        )
    picture = Image.fromarray(made.pixels(number - 1))
    if size is not None:
        picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


@dataclass(frozen=True)
class Made:
    """What a job has made so far: artefact -> the files (name -> digest) of its shards, from the first on."""

    blobs: BlobStore
    job_id: str
    shape: dict[str, int]
    sources: dict[str, Any]
    selection: SelectionParams
    outputs: dict[str, list[dict[str, str]]]
    selects: bool  # a stage of the job says which images are learnt from

    @cached_property
    def _starts(self) -> list[int]:
        """The position of each shard's first image, and at the end the number of images."""
        digests = [files[_PIXELS] for files in self.outputs.get("synthetic", ())]
        counts = [tensors.layout(self.blobs, digest).shape("kind")[0] for digest in digests]
        return [0, *accumulate(counts)]

    @property
    def count(self) -> int:
        return self._starts[-1]

    def pixels(self, position: int) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] of one image."""
        shard = bisect_right(self._starts, position) - 1
        row = position - self._starts[shard]
        with tensors.opened(self.blobs, self.outputs["synthetic"][shard][_PIXELS]) as file:
            return np.ascontiguousarray(file.rows("pixels", row, row + 1)[0].transpose(1, 2, 0))

    def views(self, start: int, stop: int) -> list[SampleView]:
        """The images at positions `start` to `stop`."""
        columns = self._columns(start, stop)
        classes, probabilities = self._scores(start, stop)
        verdicts = self._verdicts(start, stop)
        views = []
        for row in range(stop - start):
            about = {name: values[row] for name, values in columns.items()}
            kind = Kind(int(about["kind"]))
            label = int(about["first"]) if kind is Kind.CVAE else int(about.get("label", -1))
            given = probabilities[row]
            kept, reason = self._judged(None if verdicts is None else verdicts[row], given, label)
            number = start + row + 1
            views.append(
                SampleView(
                    object="sample",
                    id=str(number),
                    kind=kind.name.lower(),
                    label=classes[label] if 0 <= label < len(classes) else None,
                    origins=self._origins(kind, about),
                    alpha=1 - float(about["share"]) if kind is Kind.DIFFUSION else None,
                    seed=int(about["seed"]) if "seed" in about else None,
                    scores=_top(classes, given),
                    kept=kept,
                    reason=reason,
                    urls={"image": f"/v1/jobs/{self.job_id}/samples/{number}/image"},
                )
            )
        return views

    def _columns(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """All that the shards say of these images, but for the pixels."""
        parts: dict[str, list[NDArray[Any]]] = {}
        for shard, files in enumerate(self.outputs.get("synthetic", ())):
            first, last = self._starts[shard], self._starts[shard + 1]
            if start < last and first < stop:
                with tensors.opened(self.blobs, files[_PIXELS]) as file:
                    for name in ("kind", "first", "second", "share", "label", "seed"):
                        if name in file:
                            rows = file.rows(name, max(start, first) - first, stop - first)
                            parts.setdefault(name, []).append(rows)
        return {name: np.concatenate(rows) for name, rows in parts.items()}

    def _scores(self, start: int, stop: int) -> tuple[list[str], list[NDArray[np.float64] | None]]:
        """The classes, and the teacher's probabilities of each image; None where it was not asked, or not yet."""
        if "soft_labels" not in self.outputs:
            return self._classes(), [None] * (stop - start)
        (files,) = self.outputs["soft_labels"]
        classes = json.loads(_content(self.blobs, files["soft_labels.json"]))["classes"]
        real = self.shape["support"] + self.shape["unlabelled"]
        with tensors.opened(self.blobs, files[_LABELS]) as file:
            image = file.rows("image")  # ascending; of several views of an image the first shows all of it
            first, last = np.searchsorted(image, [real + start, real + stop])
            logits = file.rows("logits", int(first), int(last)).astype(np.float64)
        found: list[NDArray[np.float64] | None] = [None] * (stop - start)
        for position, row in zip(image[first:last][::-1], logits[::-1], strict=True):
            odds = np.exp(row - row.max())
            found[int(position) - real - start] = odds / odds.sum()
        return classes, found

    def _classes(self) -> list[str]:
        """The classes before the teacher has answered: those of the labelled images."""
        return list(self._index("support").classes) if "support" in self.sources else []

    def _verdicts(self, start: int, stop: int) -> NDArray[Any] | None:
        if "selection" not in self.outputs:
            return None
        (files,) = self.outputs["selection"]
        with tensors.opened(self.blobs, files[_VERDICTS]) as file:
            return file.rows("verdict", start, stop)

    def _judged(
        self, verdict: int | None, given: NDArray[np.float64] | None, label: int
    ) -> tuple[bool | None, str]:
        """Whether the image is learnt from (None: not decided yet), and why not."""
        if verdict is None and "shortened" in self.outputs:  # a network's tokens are learnt of all images
            return True, ""
        if verdict is None:
            undecided = "soft_labels" not in self.outputs or self.selects
            if undecided:
                return None, ""
            return (True, "") if given is not None else (False, "The teacher was not asked about it.")
        if verdict == Verdict.UNSURE:
            told = "nothing" if given is None else f"{given[label]:.2f}"
            return False, (
                f"By the teacher's answer and what it was made for, its class has a probability of {told}; "
                f"{self.selection.least_probability:.2f} is needed."
            )
        if verdict == Verdict.SURPLUS:
            return False, "Its class has enough images that are surer."
        return True, ""

    def _origins(self, kind: Kind, about: dict[str, Any]) -> list[OriginView]:
        """The real images that one is made of, with their shares."""
        if kind is Kind.CVAE:
            return []
        share = float(about["share"])
        made_of = [(int(about["first"]), share), (int(about["second"]), 1 - share)]
        return [self._origin(position, part) for position, part in made_of if position >= 0]

    def _origin(self, position: int, share: float) -> OriginView:
        labelled = position < self.shape["support"]
        split = "support" if labelled else "unlabelled"
        index = self._index(split)
        number = position if labelled else position - self.shape["support"]
        image = index.images[number]
        label = None if image.label is None else index.classes[image.label]
        return OriginView(split=split, index=number, name=image.name, label=label, share=share)

    def _index(self, split: str) -> archive.ArchiveIndex:
        return _archive_index(self.blobs, self.sources[split]["files"][archive.FILE_NAME])


def _read(wiring: Wiring, principal: Principal, job_id: str) -> Made:
    with wiring.database.reading() as session:
        job = service.find(session, principal, job_id)
        if not job.sources:
            raise Gone(
                f"The images of job {job_id} are gone: its data set was deleted, and the job ended long ago.",
                code="images_gone",
            )
        select = sa.select(JobStage.params).where(JobStage.job_id == job_id, JobStage.output == "selection")
        selection = session.scalar(select)
        outputs = {
            name: _shards(session, principal, job_id, name)
            for name in ("synthetic", "soft_labels", "selection", "shortened")
        }
    return Made(
        blobs=wiring.blobs,
        job_id=job_id,
        shape=job.shape,
        sources=job.sources,
        selection=SelectionParams.model_validate(selection or {}),
        outputs={name: shards for name, shards in outputs.items() if shards},
        selects=selection is not None,
    )


def _shards(session: Session, principal: Principal, job_id: str, output: str) -> list[dict[str, str]]:
    """The files of an artefact's shards, up to the first that is not there."""
    select = (
        owned(StageOutput, principal)
        .join(Shard, Shard.key == StageOutput.key)
        .join(JobStage, Shard.stage_id == JobStage.id)
        .where(JobStage.job_id == job_id, JobStage.output == output)
        .order_by(Shard.position)
        .with_only_columns(Shard.position, StageOutput.files)
    )
    found = enumerate(session.execute(select).all())
    return [row.files for expected, row in found if row.position == expected]


def _top(classes: list[str], given: NDArray[np.float64] | None) -> list[SampleScore]:
    if given is None:
        return []
    best = np.argsort(-given, kind="stable")[:TOP]
    return [SampleScore(label=classes[at], score=round(float(given[at]), 6)) for at in best]


@lru_cache(maxsize=64)
def _content(blobs: BlobStore, digest: str) -> bytes:
    """A small blob."""
    with blobs.open(digest) as file:
        return file.read()


@lru_cache(maxsize=16)
def _archive_index(blobs: BlobStore, digest: str) -> archive.ArchiveIndex:
    with blobs.open(digest) as file:
        return archive.read_index(file)
