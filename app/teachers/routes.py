"""Teachers over HTTP: the catalogue, and black boxes of the caller's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from app import uploads
from app.datasets import workspace
from app.datasets.members import Part, Upload
from app.datasets.one_image import ImageReader
from app.errors import Finding, Invalid, TooLarge, UnsupportedMedia
from app.paging import Limit, Page
from app.problem import documented
from app.schemas import shown_url
from app.security.dependencies import Wired, allowed
from app.security.egress import Egress
from app.security.limits import MAX_SPEC_BYTES
from app.security.principal import Principal
from app.teachers import probe, registration, service
from app.teachers.schemas import (
    BlackBoxDetail,
    HeadersOrder,
    HttpOrder,
    OnnxOrder,
    ProbeAnswer,
    ProbeReport,
    TeacherAnswer,
    TeacherDetail,
)
from app.teachers.tables import Teacher
from app.wiring import Wiring
from models.hub import Availability
from models.pipeline import TeacherOutput
from models.teachers import TeacherSpec
from models.teachers.black_box import MODEL_FILE, BlackBoxTeacher, HttpTeacher, OnnxTeacher, Pixels

router = APIRouter(prefix="/v1/teachers", tags=["teachers"])

Reader = Annotated[Principal, allowed("jobs:read")]
Writer = Annotated[Principal, allowed("teachers:write")]

#: Files that this process runs, and endpoints that it asks, at the same time; others wait.
_RUNNING = anyio.CapacityLimiter(2)
_ASKING = anyio.CapacityLimiter(16)
#: An uploaded file is on disk as sent, cut out of its form, and as a blob.
_COPIES = 3
_MODEL, _SPEC = "model", "spec"


def _schema(order: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of an order that FastAPI does not read itself, whole in one piece."""
    schema = order.model_json_schema()
    whole: dict[str, Any] = _inlined(schema, schema.pop("$defs", {}))
    return whole


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inlined(part, definitions) for part in node]
    if not isinstance(node, dict):
        return node
    meant = definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
    rest = {name: value for name, value in node.items() if name != "$ref"}
    return {name: _inlined(value, definitions) for name, value in {**meant, **rest}.items()}


_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": _schema(HttpOrder)},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [_MODEL, _SPEC],
                "properties": {
                    _MODEL: {
                        "type": "string",
                        "format": "binary",
                        "description": "One self-contained ONNX file.",
                    },
                    _SPEC: _schema(OnnxOrder),
                },
            },
            "encoding": {_SPEC: {"contentType": "application/json"}},
        },
    },
}
_IMAGE_BODY = {
    "required": False,
    "content": {
        media_type: {"schema": {"type": "string", "format": "binary"}}
        for media_type in ("image/png", "image/jpeg", "image/webp")
    },
}


@router.get("", responses=documented(503))
def index(
    wiring: Wired, principal: Reader, limit: Limit = 20, after: str | None = None
) -> Page[TeacherAnswer]:
    """First the catalogue, with licence, size and whether each can be had now; then your own, newest first."""
    with wiring.database.reading() as session:
        specs, rows, more = service.page(session, wiring.settings, principal, limit, after)
    states = service.availability(wiring, specs) if specs else {}
    listed = [TeacherAnswer(**_of_catalogue(spec, states[spec.name])) for spec in specs]
    return Page(data=[*listed, *(TeacherAnswer(**_own(row)) for row in rows)], has_more=more)


@router.post(
    "",
    status_code=201,
    openapi_extra={"requestBody": _BODY},
    responses=documented(400, 408, 413, 415, 422, 503, 507),
)
async def create(request: Request, response: Response, wiring: Wired, principal: Writer) -> TeacherDetail:
    """Add a black box: an HTTP endpoint as JSON, or an ONNX file as a form. Probe it before you use it."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json":
        row = await _create_http(request, wiring, principal)
    elif media_type == "multipart/form-data":
        row = await _create_onnx(request, wiring, principal)
    else:
        raise UnsupportedMedia(
            f"A teacher cannot be sent as '{media_type[:100]}'. Send an endpoint as application/json, an ONNX file as "
            f"multipart/form-data with the parts '{_MODEL}' and '{_SPEC}'."
        )
    response.headers["Location"] = f"/v1/teachers/{row.id}"
    return _detail(row)


@router.get("/{teacher_id}", responses=documented(404, 503))
def show(teacher_id: str, wiring: Wired, principal: Reader) -> TeacherDetail:
    """One teacher; of a black box of yours also its classes, how it is asked, and its newest probe."""
    known = service.catalogue(wiring.settings)
    if teacher_id in known:
        spec = known[teacher_id]
        state = service.availability(wiring, [spec])[teacher_id]
        return TeacherDetail(**_of_catalogue(spec, state), black_box=None)
    with wiring.database.reading() as session:
        return _detail(service.get(session, principal, teacher_id))


@router.delete("/{teacher_id}", status_code=204, responses=documented(404, 409))
def delete(teacher_id: str, wiring: Wired, principal: Writer) -> None:
    """Take a teacher of yours away, with its secrets. Refused while an unfinished job asks it."""
    _refuse_catalogue(wiring, teacher_id, "deleted")
    service.delete(wiring, principal, teacher_id)


@router.put("/{teacher_id}/headers", responses=documented(404, 503))
def replace_headers(teacher_id: str, order: HeadersOrder, wiring: Wired, principal: Writer) -> TeacherDetail:
    """Put new secret headers in place of all old ones. Running jobs use them from their next stage on."""
    _refuse_catalogue(wiring, teacher_id, "changed")
    headers = {name: value.get_secret_value() for name, value in order.headers.items()}
    return _detail(service.replace_headers(wiring, principal, teacher_id, headers))


@router.post(
    "/{teacher_id}/probe",
    openapi_extra={"requestBody": _IMAGE_BODY},
    responses=documented(400, 404, 413, 415, 503),
)
async def try_out(teacher_id: str, request: Request, wiring: Wired, principal: Writer) -> ProbeAnswer:
    """Ask a teacher about one image, the body's or a test pattern, and say what came of it.

    What is wrong with the teacher stands in `problems`; of the catalogue's it is told whether they can be had.
    """
    content = await uploads.in_memory(request, wiring.settings.max_image_bytes, "The image")
    reader: ImageReader = request.app.state.images
    image = await anyio.to_thread.run_sync(reader.pixels, content) if content else None
    known = service.catalogue(wiring.settings)
    if teacher_id in known:
        report = await anyio.to_thread.run_sync(_had, wiring, known[teacher_id])
    else:
        row, headers = await anyio.to_thread.run_sync(_with_headers, wiring, principal, teacher_id)
        limiter = _RUNNING if row.kind == "onnx" else _ASKING
        report = await anyio.to_thread.run_sync(
            _asked, wiring, principal, row, headers, image, limiter=limiter
        )
    return ProbeAnswer(object="probe", teacher_id=teacher_id, **report.model_dump())


def _had(wiring: Wiring, spec: TeacherSpec) -> ProbeReport:
    state = service.availability(wiring, [spec])[spec.name]
    problems, hint = ([], "") if state.available else ([state.reason], "Choose another teacher.")
    return ProbeReport(ok=state.available, latency_ms=None, shape=None, top=[], problems=problems, hint=hint)


def _with_headers(wiring: Wiring, principal: Principal, teacher_id: str) -> tuple[Teacher, dict[str, str]]:
    with wiring.database.reading() as session:
        row = service.get(session, principal, teacher_id)
        return row, service.headers(session, wiring.settings, principal.tenant, teacher_id)


def _asked(
    wiring: Wiring, principal: Principal, row: Teacher, headers: dict[str, str], image: Pixels | None
) -> ProbeReport:
    report = probe.probe(service.spec_of(row), row.files, headers, image, wiring.settings, wiring.blobs)
    service.record_probe(wiring, principal, row.id, report.model_dump())
    return report


async def _create_http(request: Request, wiring: Wiring, principal: Principal) -> Teacher:
    content = await uploads.in_memory(request, MAX_SPEC_BYTES, "The description")
    return await anyio.to_thread.run_sync(
        _http, wiring, principal, content, limiter=_ASKING
    )  # looks its name up


def _http(wiring: Wiring, principal: Principal, content: bytes) -> Teacher:
    with_network = Egress(wiring.settings.egress_allow)
    order = registration.read_order(HttpOrder, content, what="The body", egress=with_network)
    spec = registration.http_teacher(order, service.new_id())
    headers = {name: value.get_secret_value() for name, value in order.headers.items()}
    return service.create(wiring, principal, spec, {}, headers)


async def _create_onnx(request: Request, wiring: Wiring, principal: Principal) -> Teacher:
    async with uploads.on_disk(
        request, wiring.settings, copies=_COPIES, max_files=8, max_field_bytes=MAX_SPEC_BYTES
    ) as upload:
        return await anyio.to_thread.run_sync(_onnx, wiring, principal, upload, limiter=_RUNNING)


def _onnx(wiring: Wiring, principal: Principal, upload: Upload) -> Teacher:
    model, described = _parts(upload, wiring.settings.max_model_bytes)
    with workspace.no_room_is_507():
        path = _cut_out(upload, model)
        order, facts = registration.read_upload(described, path, wiring.settings)
        spec = registration.onnx_teacher(order, service.new_id(), facts)
        return service.create(wiring, principal, spec, {MODEL_FILE: wiring.blobs.put(path)}, {})


def _parts(upload: Upload, most: int) -> tuple[Part, bytes]:
    """The model's part, and the description's text, which may come as a field or as a file."""
    files = {part.field: part for part in upload.parts}
    texts = dict.fromkeys(upload.fields)
    unknown = sorted({*files, *texts} - {_MODEL, _SPEC})
    missing = [
        name for name in (_MODEL, _SPEC) if name not in files and (name == _MODEL or name not in texts)
    ]
    problems = [("unknown_field", name, f"There is no part '{name[:64]}' in this form.") for name in unknown]
    if _MODEL in texts:
        problems.append(("file_expected", _MODEL, f"The part '{_MODEL}' must be a file, with a filename."))
    elif _MODEL in missing:
        problems.append(("missing", _MODEL, f"The part '{_MODEL}' with the ONNX file is missing."))
    if _SPEC in missing:
        problems.append(("missing", _SPEC, f"The part '{_SPEC}' with the description as JSON is missing."))
    if problems:
        findings = tuple(Finding(code, f"/{name[:64]}", detail) for code, name, detail in problems)
        raise Invalid(" ".join(finding.detail for finding in findings), findings=findings)
    model = files[_MODEL]
    if model.size > most:
        raise TooLarge(f"The ONNX file has {model.size:,} bytes; at most {most:,} are accepted.")
    if _SPEC in files and files[_SPEC].size > MAX_SPEC_BYTES:
        raise TooLarge(f"The description has more than {MAX_SPEC_BYTES:,} bytes.")
    text = upload.content(files[_SPEC]) if _SPEC in files else upload.fields[_SPEC].encode()
    return model, text


def _cut_out(upload: Upload, part: Part) -> Path:
    """The part as a file of its own."""
    target = upload.folder / MODEL_FILE
    with upload.path.open("rb") as source, target.open("wb") as file:
        source.seek(part.offset)
        left = part.size
        while left and (piece := source.read(min(left, 2**20))):
            left -= file.write(piece)
    return target


def _refuse_catalogue(wiring: Wiring, teacher_id: str, what: str) -> None:
    if teacher_id in service.catalogue(wiring.settings):
        raise Invalid(
            f"Teacher '{teacher_id}' belongs to the catalogue and cannot be {what}.", code="teacher_not_yours"
        )


def _of_catalogue(spec: TeacherSpec, state: Availability) -> dict[str, Any]:
    return {
        "object": "teacher",
        "id": spec.name,
        "source": "local" if spec.is_local else spec.source,
        "available": state.available,
        "reason": state.reason,
        "created_at": None,
        "offers": _offers(spec.offers),
        **{name: getattr(spec, name) for name in ("title", "kind", "revision", "input_size", "parameters")},
        **{name: getattr(spec, name) for name in ("embedding_dim", "licence", "licence_url", "resident_mib")},
    }


def _own(row: Teacher) -> dict[str, Any]:
    spec = service.spec_of(row)
    state = service.availability_of(row)
    return {
        "object": "teacher",
        "id": row.id,
        "title": row.title,
        "kind": row.kind,
        "source": shown_url(spec.source) if isinstance(spec, HttpTeacher) else spec.source,
        "revision": None,
        "input_size": spec.input_size,
        "parameters": spec.parameters if isinstance(spec, OnnxTeacher) else None,
        "embedding_dim": None,
        "offers": _offers(spec.offers),
        "licence": spec.licence,
        "licence_url": spec.licence_url,
        "resident_mib": None,
        "available": state.available,
        "reason": state.reason,
        "created_at": row.created_at,
    }


def _detail(row: Teacher) -> TeacherDetail:
    return TeacherDetail(**_own(row), black_box=_black_box(row, service.spec_of(row)))


def _black_box(row: Teacher, spec: BlackBoxTeacher) -> BlackBoxDetail:
    asked = ("protocol", "batch_size", "concurrency", "timeout_s", "retries", "bytes")  # of one kind only
    return BlackBoxDetail.model_validate(
        {
            "classes": list(spec.classes),
            "input": spec.input,
            "answers": spec.answers,
            "input_name": spec.input_name,
            "output_name": spec.output_name,
            "headers": row.header_names,
            "probe": row.probe,
            **{name: getattr(spec, name, None) for name in asked},
        }
    )


def _offers(outputs: frozenset[TeacherOutput]) -> list[str]:
    return sorted(str(output) for output in outputs)
