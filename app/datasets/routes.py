"""Data sets over HTTP. An upload's body is read here, after its key was checked, and never by FastAPI."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from app import uploads
from app.datasets import schemas, service
from app.datasets.members import Upload
from app.datasets.report import MIN_UNLABELLED
from app.datasets.tables import Dataset, DatasetImage
from app.errors import Finding, Invalid
from app.paging import Limit, Page
from app.problem import documented
from app.security.dependencies import Wired, allowed
from app.security.principal import Principal
from models.data.archive import IGNORED

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

Reader = Annotated[Principal, allowed("datasets:read")]
Writer = Annotated[Principal, allowed("datasets:write")]

#: Uploads of this process that are decoded at the same time; others wait, on disk.
_DECODING = anyio.CapacityLimiter(2)
#: An upload is on disk once as sent, once decoded, once in its archives.
_COPIES = 3

_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": service.MAX_NAME},
                    "archive": {
                        "type": "string",
                        "format": "binary",
                        "description": "One zip of class folders: CLASS/IMAGE, with optional test/CLASS/IMAGE and "
                        "unlabelled/IMAGE. A train/ folder around the classes, or one folder around all, is fine. "
                        f"unlabelled/ alone, with at least {MIN_UNLABELLED} images, fits methods that need no labels. "
                        "For segmentation: images/NAME.jpg with masks/NAME.png, optionally test/images/ with "
                        "test/masks/, unlabelled/, and classes.txt with a class a line. A mask is a grey or palette "
                        f"PNG of its image's size; values are 0 for the first class, and so on; {IGNORED}: not known.",
                    },
                    "files": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "description": "Instead of the zip: images whose filename is CLASS/IMAGE, test/CLASS/IMAGE or "
                        "unlabelled/IMAGE.",
                    },
                },
            }
        },
        "application/zip": {"schema": {"type": "string", "format": "binary"}},
    },
}


@router.post(
    "",
    status_code=201,
    openapi_extra={"requestBody": _BODY},
    responses={
        200: {"description": "The same content was here already"},
        **documented(400, 408, 413, 415, 422, 507),
    },
)
async def create(
    request: Request,
    response: Response,
    wiring: Wired,
    principal: Writer,
    name: Annotated[str | None, Query(description="Where the body has no field 'name'.")] = None,
) -> schemas.DatasetAnswer:
    """Check and store a data set: JPEG, PNG or WebP images in class folders. The same content twice is one data set.

    Images are turned upright, freed of metadata and scaled down to 1024 pixels. One bad image is reported and left
    out; a class left with too few images refuses the upload, with everything that was found in `errors`. So does a mask
    that is missing, of another size than its image, or with a value that is no class.
    """
    max_files = 2 * wiring.settings.max_images + 1000
    async with uploads.on_disk(request, wiring.settings, copies=_COPIES, max_files=max_files) as upload:
        dataset, created = await anyio.to_thread.run_sync(
            service.create, wiring, principal, _name(upload, name), upload, limiter=_DECODING
        )
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/v1/datasets/{dataset.id}"
    return _answer(dataset)


@router.get("")
def index(
    wiring: Wired, principal: Reader, limit: Limit = 20, after: str | None = None
) -> Page[schemas.DatasetSummary]:
    """Data sets, newest first."""
    with wiring.database.reading() as session:
        rows, more = service.page(session, principal, limit, after)
    return Page(data=[schemas.DatasetSummary.model_validate(_fields(row)) for row in rows], has_more=more)


@router.get("/{dataset_id}", responses=documented(404))
def show(dataset_id: str, wiring: Wired, principal: Reader) -> schemas.DatasetAnswer:
    """One data set with its report."""
    with wiring.database.reading() as session:
        return _answer(service.get(session, principal, dataset_id))


@router.get("/{dataset_id}/images", responses=documented(404))
def images(
    dataset_id: str,
    wiring: Wired,
    principal: Reader,
    split: schemas.SplitName | None = None,
    limit: Limit = 20,
    after: str | None = None,
) -> Page[schemas.ImageAnswer]:
    """Images by split, class and name."""
    with wiring.database.reading() as session:
        rows, more = service.images(session, principal, dataset_id, split, limit, after)
    return Page(data=[_image(row) for row in rows], has_more=more)


@router.get(
    "/{dataset_id}/images/{image_id}",
    response_class=Response,
    responses={200: {"content": {"image/png": {}, "image/jpeg": {}}}, **documented(404)},
)
def image(dataset_id: str, image_id: str, wiring: Wired, principal: Reader) -> Response:
    """The image as it is stored: upright, without metadata."""
    file = service.image_file(wiring, principal, dataset_id, image_id)
    return _picture(file, image_id)


@router.get(
    "/{dataset_id}/images/{image_id}/mask",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **documented(404)},
)
def mask(dataset_id: str, image_id: str, wiring: Wired, principal: Reader) -> Response:
    """The classes of the image's pixels as they are stored: an 8-bit grey PNG of the image's size."""
    file = service.image_file(wiring, principal, dataset_id, image_id, mask=True)
    return _picture(file, f"{image_id}-mask")


@router.delete("/{dataset_id}", status_code=204, responses=documented(404))
def delete(dataset_id: str, wiring: Wired, principal: Writer) -> None:
    """Take a data set out of sight. Jobs that were ordered with it go on.

    Its images are removed when no job needs them: at the latest DRAM_RETENTION_DAYS after the end of the last one.
    Images that a student was checked with are in its bundle too: DELETE /v1/students/{student_id}.
    """
    service.delete(wiring, principal, dataset_id)


def _picture(file: service.ImageFile, tag: str) -> Response:
    headers = {
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Cache-Control": "private, max-age=86400, immutable",
        "ETag": f'"{tag}"',
    }
    return Response(file.content, media_type=file.content_type, headers=headers)


def _name(upload: Upload, in_query: str | None) -> str:
    unknown = sorted(set(upload.fields) - {"name"})
    if unknown:
        detail = f"Unknown field '{unknown[0][:64]}'. The form's text fields are: name."
        raise Invalid(detail, code="unknown_field", findings=(Finding("unknown_field", "/", detail),))
    given = upload.fields.get("name", in_query)
    if given is not None:
        return given
    file_name = upload.parts[0].name.decode("utf-8", "replace") if len(upload.parts) == 1 else ""
    stem = PurePosixPath(file_name).stem if "/" not in file_name else ""
    return stem if stem.isprintable() and stem.strip() else "data set"


def _fields(dataset: Dataset) -> dict[str, Any]:
    return {**vars(dataset), "object": "dataset"}


def _answer(dataset: Dataset) -> schemas.DatasetAnswer:
    return schemas.DatasetAnswer.model_validate(_fields(dataset))


def _image(row: DatasetImage) -> schemas.ImageAnswer:
    url = f"/v1/datasets/{row.dataset_id}/images/{row.id}"
    more = {"object": "image", "url": url, "mask_url": f"{url}/mask" if row.mask else None}
    return schemas.ImageAnswer.model_validate({**vars(row), **more})
