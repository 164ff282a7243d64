"""Students over HTTP: what was made, its files, and one image through it."""

from __future__ import annotations

from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.types import Message

from app import downloads, uploads
from app.errors import BadRequest
from app.paging import Limit, Page
from app.problem import documented
from app.security.dependencies import Wired, allowed
from app.security.principal import Principal
from app.students import schemas, service
from app.students.predict import Predictor
from app.students.tables import Student
from app.wiring import Wiring

router = APIRouter(prefix="/v1/students", tags=["students"])

Reader = Annotated[Principal, allowed("students:read")]
Writer = Annotated[Principal, allowed("students:write")]
PrecisionQuery = Annotated[schemas.Precision, Query(description="fp32, or int8 where the job made one.")]

#: Class maps that this process makes at the same time: one of 100 classes takes a gigabyte while it is made.
_CLASS_MAPS = anyio.CapacityLimiter(2)
_ROOM_FOR_FORM = 64 * 1024
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
#: The image itself, or a form with it.
_IMAGE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": _BINARY,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}


def _file(media_type: str) -> dict[int | str, dict[str, Any]]:
    """What a download's OpenAPI entry says."""
    whole = {"description": "The file", "content": {media_type: _BINARY}}
    part = {"description": "The part that Range asks for", "content": {media_type: _BINARY}}
    return {200: whole, 206: part, 304: {"description": "What you have is this file"}, **documented(404, 416)}


@router.get("")
def index(
    wiring: Wired,
    principal: Reader,
    limit: Limit = 20,
    after: str | None = None,
    job_id: str | None = None,
    dataset_id: str | None = None,
) -> Page[schemas.StudentAnswer]:
    """Your students, newest first."""
    with wiring.database.reading() as session:
        students, more = service.page(
            session, principal, job_id=job_id, dataset_id=dataset_id, limit=limit, after=after
        )
    return Page(data=[_answer(student) for student in students], has_more=more)


@router.get("/{student_id}", responses=documented(404))
def show(student_id: str, wiring: Wired, principal: Reader) -> schemas.StudentAnswer:
    return _answer(_student(wiring, principal, student_id))


@router.delete("/{student_id}", status_code=204, responses=documented(404))
def delete(student_id: str, wiring: Wired, principal: Writer) -> None:
    """Take a student out of sight. Its files are removed when no job of yours has used them for DRAM_RETENTION_DAYS.

    The job that made it stays.
    """
    service.delete(wiring, principal, student_id)


@router.head("/{student_id}/model.onnx", include_in_schema=False)
@router.get("/{student_id}/model.onnx", response_class=Response, responses=_file("application/octet-stream"))
def model(
    student_id: str, request: Request, wiring: Wired, principal: Reader, precision: PrecisionQuery = "fp32"
) -> Response:
    """The network as one ONNX file: uint8 RGB images [batch, height, width, 3] in, probabilities out.

    Of a segmentation: `classes`, uint8 [batch, height, width], and `logits` out.
    """
    digest = service.graph(_student(wiring, principal, student_id), precision)
    name = f"{student_id}.{service.FILE_OF_PRECISION[precision]}"
    return downloads.serve(request, wiring.blobs, digest, name=name, media_type="application/octet-stream")


@router.head("/{student_id}/bundle.zip", include_in_schema=False)
@router.get("/{student_id}/bundle.zip", response_class=Response, responses=_file("application/zip"))
def bundle(student_id: str, request: Request, wiring: Wired, principal: Reader) -> Response:
    """Everything to ship: model, labels, report, model card, predict.py, checksums."""
    digest = service.file(_student(wiring, principal, student_id), service.BUNDLE)
    return downloads.serve(
        request, wiring.blobs, digest, name=f"{student_id}.{service.BUNDLE}", media_type="application/zip"
    )


@router.head("/{student_id}/report", include_in_schema=False)
@router.get("/{student_id}/report", response_class=Response, responses=_file("application/json"))
def report(student_id: str, request: Request, wiring: Wired, principal: Reader) -> Response:
    """How good the student is, beside its teacher, with intervals."""
    digest = service.file(_student(wiring, principal, student_id), service.REPORT)
    name = f"{student_id}.{service.REPORT}"
    return downloads.serve(
        request, wiring.blobs, digest, name=name, media_type="application/json", inline=True
    )


@router.post(
    "/{student_id}/predict",
    responses=documented(400, 404, 409, 413, 415),
    openapi_extra=_IMAGE_BODY,
)
async def predict(
    student_id: str,
    request: Request,
    wiring: Wired,
    principal: Reader,
    precision: PrecisionQuery = "fp32",
    top: Annotated[int, Query(ge=1, le=1000, description="How many labels to answer.")] = 5,
) -> schemas.PredictionAnswer:
    """Labels and scores of one JPEG, PNG or WebP image: the body itself, or the form's file `image`.

    Not of students that answer with class maps, which have /class-map, or features.
    """
    student = await run_in_threadpool(_student, wiring, principal, student_id)
    service.require_task(student, "classification")
    digest = service.graph(student, precision)
    content = await _image(request, wiring.settings.max_image_bytes)
    predictor: Predictor = request.app.state.predictor
    scores = await run_in_threadpool(predictor.predict, digest, content)
    return schemas.PredictionAnswer(
        object="prediction",
        student_id=student_id,
        precision=precision,
        predictions=[schemas.ScoreAnswer(label=score.label, score=score.score) for score in scores[:top]],
    )


@router.post(
    "/{student_id}/class-map",
    response_class=Response,
    responses={200: {"content": {"image/png": _BINARY}}, **documented(400, 404, 409, 413, 415)},
    openapi_extra=_IMAGE_BODY,
)
async def class_map(student_id: str, request: Request, wiring: Wired, principal: Reader) -> Response:
    """What each pixel of one JPEG, PNG or WebP image shows, by a student of a segmentation.

    An 8-bit grey PNG like the masks that it learned from: a pixel's value is the number of its class in the student's
    `classes`. It has the image's size, turned upright; images of more than 1024 pixels a side are scaled down before.
    """
    student = await run_in_threadpool(_student, wiring, principal, student_id)
    service.require_task(student, "segmentation")
    digest = service.graph(student, "fp32")
    content = await _image(request, wiring.settings.max_image_bytes)
    predictor: Predictor = request.app.state.predictor
    picture = await anyio.to_thread.run_sync(predictor.class_map, digest, content, limiter=_CLASS_MAPS)
    return Response(picture, media_type="image/png")


async def _image(request: Request, most: int) -> bytes:
    """The image's file content. Never holds more than `most` bytes and a form's frame around them."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await uploads.in_memory(request, most, "The image")
    form = await uploads.in_memory(request, most + _ROOM_FOR_FORM, "The form with the image")
    return await _form_image(request, form)


async def _form_image(request: Request, body: bytes) -> bytes:
    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async with Request(request.scope, replay).form(max_files=1, max_fields=8, max_part_size=4096) as form:
        file = form.get("image")
        if not isinstance(file, UploadFile):
            raise BadRequest("The form has no file named 'image'.", code="image_missing")
        return await file.read()


def _student(wiring: Wiring, principal: Principal, student_id: str) -> Student:
    with wiring.database.reading() as session:
        return service.get(session, principal, student_id)


def _answer(student: Student) -> schemas.StudentAnswer:
    routes = {
        **{file: f"model.onnx?precision={name}" for name, file in service.FILE_OF_PRECISION.items()},
        service.BUNDLE: service.BUNDLE,
        service.REPORT: "report",
    }
    files = [
        {"name": name, "sha256": digest, "url": _url(student.id, routes.get(name))}
        for name, digest in sorted(student.files.items())
    ]
    return schemas.StudentAnswer.model_validate({**vars(student), "object": "student", "files": files})


def _url(student_id: str, route: str | None) -> str | None:
    return None if route is None else f"/v1/students/{student_id}/{route}"
