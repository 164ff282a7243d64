"""The rules of data sets: immutable, one for each content and tenant, all stored or nothing."""

from __future__ import annotations

import hashlib
import json
import unicodedata
import zipfile
from dataclasses import dataclass

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from app import ids, paging
from app.datasets import intake, workspace
from app.datasets.intake import Verified
from app.datasets.layout import Split
from app.datasets.members import Upload
from app.datasets.tables import Dataset, DatasetImage
from app.db import owned, read_clock
from app.errors import Finding, Invalid, NotFound
from app.security.principal import Principal
from app.storage import digest_of
from app.wiring import Wiring

log = structlog.get_logger()

MAX_NAME = 200
_CONTENT_TYPES = {"png": "image/png", "jpg": "image/jpeg"}


@dataclass(frozen=True)
class ImageFile:
    content: bytes
    content_type: str


def create(wiring: Wiring, principal: Principal, name: str, upload: Upload) -> tuple[Dataset, bool]:
    """The data set of an upload, and whether it is new: equal content of a tenant is one data set.

    Blocks for as long as decoding takes. Raises `Invalid`, `UnsupportedMedia` or `InsufficientStorage`, and then
    leaves neither rows nor files.
    """
    name = _checked_name(name)
    with workspace.no_room_is_507():
        verified = intake.verify(upload, wiring.settings)
        blobs = {split: digest_of(stored.path) for split, stored in verified.splits.items()}
        document = json.dumps([list(verified.classes), sorted(blobs.items())], ensure_ascii=False)
        digest = hashlib.sha256(document.encode()).hexdigest()
        made: list[str] = []
        try:
            for split, stored in verified.splits.items():
                if not wiring.blobs.exists(blobs[split]):
                    made.append(blobs[split])
                wiring.blobs.put(stored.path)
            return _record(wiring, principal, name, digest, blobs, verified)
        except BaseException:
            _discard(wiring, made)
            raise


def get(session: Session, principal: Principal, dataset_id: str) -> Dataset:
    """Raises `NotFound`."""
    dataset = session.scalar(owned(Dataset, principal).where(Dataset.id == dataset_id))
    if dataset is None:
        raise NotFound(
            f"There is no data set '{dataset_id[:64]}'. GET /v1/datasets lists yours.",
            code="dataset_not_found",
        )
    return dataset


def page(session: Session, principal: Principal, limit: int, after: str | None) -> tuple[list[Dataset], bool]:
    return paging.newest(session, owned(Dataset, principal), Dataset.id, limit=limit, after=after)


def images(
    session: Session, principal: Principal, dataset_id: str, split: str | None, limit: int, after: str | None
) -> tuple[list[DatasetImage], bool]:
    """Images in the order of the splits' archives: by split, class and name."""
    get(session, principal, dataset_id)
    select = sa.select(DatasetImage).where(DatasetImage.dataset_id == dataset_id)
    if split is not None:
        select = select.where(DatasetImage.split == split)
    if after is not None:
        select = select.where(DatasetImage.id > after)
    rows = list(session.scalars(select.order_by(DatasetImage.id).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def image_file(
    wiring: Wiring, principal: Principal, dataset_id: str, image_id: str, *, mask: bool = False
) -> ImageFile:
    """The image as it is kept, or its mask. Raises `NotFound`."""
    with wiring.database.reading() as session:
        dataset = get(session, principal, dataset_id)
        image = session.get(DatasetImage, image_id)
    if image is None or image.dataset_id != dataset_id:
        raise NotFound(
            f"Data set '{dataset_id}' has no image '{image_id[:64]}'. GET /v1/datasets/{dataset_id}/images lists them.",
            code="image_not_found",
        )
    file = image.mask if mask else image.file
    if file is None:
        raise NotFound(f"Image '{image_id}' of data set '{dataset_id}' has no mask.", code="mask_not_found")
    with wiring.blobs.open(dataset.splits[image.split]["digest"]) as blob, zipfile.ZipFile(blob) as archive:
        return ImageFile(archive.read(file), _CONTENT_TYPES[file.rpartition(".")[2]])


def delete(wiring: Wiring, principal: Principal, dataset_id: str) -> None:
    """Take it out of sight. Jobs that use it keep its blobs until they are let go of (`app.retention`)."""
    with wiring.database.writing() as session:
        get(session, principal, dataset_id).deleted_at = read_clock(session)


def _checked_name(name: str) -> str:
    name = " ".join(unicodedata.normalize("NFC", name).split())
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        detail = f"The data set's name must have 1 to {MAX_NAME} printable characters. Give another 'name'."
        raise Invalid(detail, code="name_invalid", findings=(Finding("name_invalid", "/name", detail),))
    return name


def _record(
    wiring: Wiring, principal: Principal, name: str, digest: str, blobs: dict[Split, str], verified: Verified
) -> tuple[Dataset, bool]:
    with wiring.database.writing() as session:
        _exclude_others(wiring, session)
        existing = session.scalar(owned(Dataset, principal).where(Dataset.digest == digest))
        for (
            split,
            blob,
        ) in blobs.items():  # another upload of the same images may have failed and taken them away
            if not wiring.blobs.keep(blob):
                wiring.blobs.put(verified.splits[split].path)
        if existing is not None:
            return existing, False
        dataset = Dataset(
            id=ids.new("ds"),
            tenant=principal.tenant,
            name=name,
            digest=digest,
            task=verified.task,
            classes=list(verified.classes),
            splits={
                split: {
                    "digest": blobs[split],
                    "images": len(stored.images),
                    "bytes": stored.path.stat().st_size,
                }
                for split, stored in verified.splits.items()
            },
            smallest_class=verified.smallest_class,
            report=verified.report,
            deleted_at=None,
        )
        session.add(dataset)
        session.flush()
        rows = [
            {"dataset_id": dataset.id, "split": split, **vars(image)}
            for split, stored in verified.splits.items()
            for image in stored.images
        ]
        in_order = sorted(ids.new("img") for _ in rows)
        session.execute(
            sa.insert(DatasetImage),
            [{"id": image_id, **row} for image_id, row in zip(in_order, rows, strict=True)],
        )
    log.info("dataset_created", dataset=dataset.id, classes=len(dataset.classes), images=len(rows))
    return dataset, True


def _discard(wiring: Wiring, made: list[str]) -> None:
    """Remove the blobs this upload brought, unless a data set has come to use them meanwhile."""
    try:
        with wiring.database.writing() as session:
            _exclude_others(wiring, session)
            for blob in made:
                used = sa.select(Dataset.id).where(sa.cast(Dataset.splits, sa.String).contains(blob)).limit(1)
                if session.scalar(used) is None:
                    wiring.blobs.delete(blob)
    except Exception as error:  # the first error is the one to tell; retention removes what stays
        log.warning("dataset_blobs_left", blobs=made, error=str(error))


def _exclude_others(wiring: Wiring, session: Session) -> None:
    """One upload at a time decides which blobs stay. SQLite's write unit holds the only write lock already."""
    if not wiring.database.sqlite:
        session.execute(sa.text("LOCK TABLE datasets IN SHARE ROW EXCLUSIVE MODE"))
