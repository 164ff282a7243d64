"""Jobs over HTTP."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, cast

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event

from app.errors import BadRequest
from app.jobs import samples as sampling
from app.jobs import service
from app.jobs.events import TERMINAL
from app.jobs.reader import JobReader
from app.jobs.schemas import (
    LARGEST_NUMBER,
    CurvePoint,
    EventView,
    JobOrder,
    JobView,
    PlanView,
    SampleView,
    Status,
)
from app.paging import Limit, Page
from app.problem import documented
from app.security.dependencies import Wired, allowed, caller
from app.security.principal import Principal
from app.wiring import Wiring

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

Reader = Annotated[Principal, allowed("jobs:read")]
Writer = Annotated[Principal, allowed("jobs:write")]

LONGEST_WAIT_S = 60.0
_EVENT_NUMBER = re.compile("[0-9]{1,15}")  # below LARGEST_NUMBER
_POLL_S = 0.25
_PING_S = 15.0


@router.get(
    "/{job_id}",
    response_model=JobView,
    responses=documented(404),
    openapi_extra={
        "parameters": [
            {"name": "job_id", "in": "path", "required": True, "schema": {"type": "string"}},
            {
                "name": "Prefer",
                "in": "header",
                "schema": {"type": "string"},
                "description": "`wait=30` holds the answer until the job has ended, or for 30 seconds.",
            },
        ]
    },
)
async def show(request: Request) -> Response:
    """One job with its stages. The `ETag` is the number of its newest event; `If-None-Match` answers 304."""
    # The route asked most often, so it stands first and takes the request as it is: FastAPI's parameters and
    # dependencies would cost as much as the answer.
    principal = await caller(request, "jobs:read")
    job_id = request.path_params["job_id"]
    reader = _reader(request)
    reading = await reader.read(principal.tenant, job_id)
    until = time.monotonic() + _wait(request.headers.get("prefer"))
    while not reading.finished and time.monotonic() < until:
        await asyncio.sleep(_POLL_S)
        reading = await reader.read(principal.tenant, job_id)
    etag = f'"{reading.version}"'
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers={"ETag": etag})
    return Response(reading.document, media_type="application/json", headers={"ETag": etag})


@router.post(
    "",
    status_code=201,
    response_model=JobView,
    responses={200: {"model": PlanView, "description": "The plan of a dry run."}, **documented(404, 429)},
)
def create(
    order: JobOrder,
    wired: Wired,
    principal: Writer,
    response: Response,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> Response | JobView:
    """Order a distillation. With an `Idempotency-Key`, sending the same order again answers the same job, also if it
    was deleted since."""
    if order.dry_run:
        return _json(service.dry_run(wired, principal, order).model_dump_json())
    key = idempotency_key.strip('"') if idempotency_key else None
    submitted = service.submit(wired, principal, order, key)
    response.headers["Location"] = submitted.job.urls["self"]
    if submitted.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return submitted.job


@router.get("", response_model=Page[JobView])
def index(
    wired: Wired,
    principal: Reader,
    limit: Limit = 20,
    after: str | None = None,
    status: Annotated[Status | None, Query(description="Only jobs in this state.")] = None,
    dataset_id: str | None = None,
) -> Response:
    """Your jobs, newest first."""
    documents, has_more = service.page(
        wired, principal, limit=limit, after=after, status=status, dataset_id=dataset_id
    )
    more = b"true" if has_more else b"false"
    page = b'{"object":"list","data":[%b],"has_more":%b}' % (b",".join(documents), more)
    return _json(page)


@router.post("/{job_id}/cancel", response_model=JobView, status_code=202, responses=documented(404, 409))
def cancel(job_id: str, wired: Wired, principal: Writer) -> JobView:
    """Stop a job. A running stage stops within seconds; 409 when the job has ended."""
    return service.cancel(wired, principal, job_id)


@router.post("/{job_id}/retry", response_model=JobView, status_code=202, responses=documented(404, 409, 410))
def retry(job_id: str, wired: Wired, principal: Writer) -> JobView:
    """Continue a failed or cancelled job from what it had finished; 409 for any other.

    410 when its data set was deleted and the job ended longer ago than DRAM_RETENTION_DAYS: its images are gone.
    """
    return service.retry(wired, principal, job_id)


@router.delete("/{job_id}", status_code=204, responses=documented(404, 409))
def delete(job_id: str, wired: Wired, principal: Writer) -> None:
    """Delete a job that has ended, with its events, curves and checkpoints; 409 while it has not. Its student stays."""
    service.delete(wired, principal, job_id)


@router.get(
    "/{job_id}/events",
    response_model=Page[EventView],
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **documented(404)},
)
async def events(
    job_id: str,
    request: Request,
    wired: Wired,
    principal: Reader,
    limit: Limit = 100,
    after: Annotated[int, Query(ge=0, le=LARGEST_NUMBER, description="Number of the last event seen.")] = 0,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """What happened to the job, oldest first. `Accept: text/event-stream` follows it until it ends."""
    if last_event_id is not None:
        if not _EVENT_NUMBER.fullmatch(last_event_id):
            raise BadRequest(f"Last-Event-ID must be the number of an event, not '{last_event_id[:40]}'.")
        after = int(last_event_id)
    found = await run_in_threadpool(service.events_after, wired, principal, job_id, after, limit + 1)
    if "text/event-stream" in request.headers.get("accept", ""):
        stream = _follow(request, wired, principal, job_id, after)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return EventSourceResponse(stream, headers=headers)
    return _json(Page[EventView](data=found[:limit], has_more=len(found) > limit).model_dump_json())


@router.get("/{job_id}/metrics", response_model=Page[CurvePoint], responses=documented(404))
def metrics(job_id: str, wired: Wired, principal: Reader) -> Response:
    """The training curves, all points."""
    points = service.metrics(wired, principal, job_id)
    return _json(Page[CurvePoint](data=points, has_more=False).model_dump_json())


@router.get("/{job_id}/samples", responses=documented(404, 410))
def samples(
    job_id: str,
    wired: Wired,
    principal: Reader,
    limit: Limit = 20,
    after: Annotated[int, Query(ge=0, le=LARGEST_NUMBER, description="Number of the last sample seen.")] = 0,
) -> Page[SampleView]:
    """The synthetic images of a job, as far as it has made them, with what the teacher says of each."""
    found, has_more = sampling.page(wired, principal, job_id, limit, after)
    return Page(data=found, has_more=has_more)


@router.get(
    "/{job_id}/samples/{sample_id}/image",
    response_class=Response,
    responses={
        200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
        **documented(404, 410),
    },
)
def sample_image(
    job_id: str,
    sample_id: int,
    wired: Wired,
    principal: Reader,
    size: Annotated[int | None, Query(ge=16, le=256, description="Longest side of a thumbnail.")] = None,
) -> Response:
    """A synthetic image as PNG."""
    content = sampling.png(wired, principal, job_id, sample_id, size)
    return Response(content, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})


async def _follow(
    request: Request, wired: Wiring, principal: Principal, job_id: str, after: int
) -> AsyncIterator[bytes]:
    """Server-sent events from `after` on. Ends after the event that ends the job."""
    quiet_since = time.monotonic()
    while not await request.is_disconnected():
        found = await run_in_threadpool(service.events_after, wired, principal, job_id, after, 100)
        for event in found:
            after = event.id
            yield format_sse_event(data_str=event.model_dump_json(), event=event.type, id=str(event.id))
        if found and found[-1].type in TERMINAL:
            return
        if not found and (await _reader(request).read(principal.tenant, job_id)).finished:
            return
        if found:
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since > _PING_S:
            quiet_since = time.monotonic()
            yield KEEPALIVE_COMMENT
        await asyncio.sleep(_POLL_S)


def _reader(request: Request) -> JobReader:
    return cast(JobReader, request.app.state.job_reader)


def _wait(prefer: str | None) -> float:
    match = re.search(r"\bwait\s*=\s*(\d+)", prefer or "")
    return min(float(match.group(1)), LONGEST_WAIT_S) if match else 0.0


def _json(document: str | bytes) -> Response:
    """A document that is already rendered; the route's response_model only documents it."""
    return Response(document, media_type="application/json")
