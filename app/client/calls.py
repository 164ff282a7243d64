"""Every operation of the API as a generator: it yields the request to send and is sent the answer.

`Dram` and `AsyncDram` differ only in how they carry a request; what is asked and how the answer is read
is written once, here.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Generator as Steps
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import httpx

from app.client.answers import (
    Answer,
    Architecture,
    Dataset,
    Generator,
    Job,
    JobEvent,
    Method,
    Metric,
    Page,
    Plan,
    Prediction,
    Probe,
    Sample,
    Student,
    Teacher,
    Webhook,
    WebhookDelivery,
    WebhookTest,
)
from app.client.errors import JobTimeoutError

#: Longest single wait that a job's state is asked with.
LONG_POLL_S = 30
#: The service decodes every image before it answers an upload.
UPLOAD_ANSWER_S = 900
#: It loads a teacher's file and tries it.
MODEL_ANSWER_S = 300


@dataclass(frozen=True)
class Call:
    """One request. `repeatable`: sending it twice does no harm, so a lost connection is tried again."""

    method: str
    path: str
    query: Mapping[str, Any] | None = None
    json: Any = None
    content: bytes | None = None
    form: Mapping[str, str] | None = None
    files: Mapping[str, tuple[str, IO[bytes], str]] | None = None
    headers: Mapping[str, str] | None = None
    answer_s: float | None = None  # how long the answer may take; None: the client's own timeout
    pause_s: float = 0.0  # wait before sending
    repeatable: bool = False


Result = TypeVar("Result")
Item = TypeVar("Item", bound=Answer)
Flow = Steps[Call, httpx.Response, Result]


def _get(path: str, answer: type[Item]) -> Flow[Item]:
    response = yield Call("GET", path, repeatable=True)
    return answer.model_validate(response.json())


def _list(path: str, item: type[Item], limit: int | None, after: str | int | None) -> Flow[Page[Item]]:
    response = yield Call("GET", path, query=_given({"limit": limit, "after": after}), repeatable=True)
    return Page[item].model_validate(response.json())  # type: ignore[valid-type]


def _given(order: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller gave; the rest is left to the service's defaults."""
    return {name: value for name, value in order.items() if value is not None}


def create_dataset(name: str, archive: IO[bytes]) -> Flow[Dataset]:
    response = yield Call(
        "POST",
        "/v1/datasets",
        form={"name": name},
        files={"archive": ("images.zip", archive, "application/zip")},
        answer_s=UPLOAD_ANSWER_S,
    )
    return Dataset.model_validate(response.json())


def get_dataset(dataset_id: str) -> Flow[Dataset]:
    return _get(f"/v1/datasets/{dataset_id}", Dataset)


def list_datasets(limit: int | None, after: str | None) -> Flow[Page[Dataset]]:
    return _list("/v1/datasets", Dataset, limit, after)


def delete_dataset(dataset_id: str) -> Flow[None]:
    yield Call("DELETE", f"/v1/datasets/{dataset_id}")


def list_teachers(limit: int | None, after: str | None) -> Flow[Page[Teacher]]:
    return _list("/v1/teachers", Teacher, limit, after)


def get_teacher(teacher_id: str) -> Flow[Teacher]:
    return _get(f"/v1/teachers/{teacher_id}", Teacher)


def create_http_teacher(order: Mapping[str, Any]) -> Flow[Teacher]:
    response = yield Call("POST", "/v1/teachers", json={**_given(order), "kind": "http"})
    return Teacher.model_validate(response.json())


def create_onnx_teacher(model: IO[bytes], order: Mapping[str, Any]) -> Flow[Teacher]:
    response = yield Call(
        "POST",
        "/v1/teachers",
        form={"spec": json.dumps({**_given(order), "kind": "onnx"})},
        files={"model": ("model.onnx", model, "application/octet-stream")},
        answer_s=MODEL_ANSWER_S,
    )
    return Teacher.model_validate(response.json())


def probe_teacher(teacher_id: str, image: Path | bytes | None) -> Flow[Probe]:
    """Not repeated by itself: a question may cost something."""
    response = yield Call(
        "POST",
        f"/v1/teachers/{teacher_id}/probe",
        content=image.read_bytes() if isinstance(image, Path) else image,
        headers={"Content-Type": "application/octet-stream"},
        answer_s=MODEL_ANSWER_S,
    )
    return Probe.model_validate(response.json())


def replace_teacher_headers(teacher_id: str, headers: Mapping[str, str]) -> Flow[Teacher]:
    path = f"/v1/teachers/{teacher_id}/headers"
    response = yield Call("PUT", path, json={"headers": dict(headers)}, repeatable=True)
    return Teacher.model_validate(response.json())


def delete_teacher(teacher_id: str) -> Flow[None]:
    yield Call("DELETE", f"/v1/teachers/{teacher_id}")


def list_methods() -> Flow[Page[Method]]:
    return _list("/v1/methods", Method, None, None)


def list_architectures() -> Flow[Page[Architecture]]:
    return _list("/v1/architectures", Architecture, None, None)


def list_generators() -> Flow[Page[Generator]]:
    return _list("/v1/generators", Generator, None, None)


def create_job(order: Mapping[str, Any], idempotency_key: str | None) -> Flow[Job]:
    """The key makes the request safe to repeat: the service makes one job of it."""
    response = yield Call(
        "POST",
        "/v1/jobs",
        json=_given(order),
        headers={"Idempotency-Key": idempotency_key or uuid.uuid4().hex},
        repeatable=True,
    )
    return Job.model_validate(response.json())


def plan_job(order: Mapping[str, Any]) -> Flow[Plan]:
    response = yield Call("POST", "/v1/jobs", json={**_given(order), "dry_run": True})
    return Plan.model_validate(response.json())


def get_job(job_id: str) -> Flow[Job]:
    return _get(f"/v1/jobs/{job_id}", Job)


def list_jobs(limit: int | None, after: str | None) -> Flow[Page[Job]]:
    return _list("/v1/jobs", Job, limit, after)


def wait_for_job(job_id: str, timeout_s: float | None) -> Flow[Job]:
    """The finished job. Raises JobTimeoutError where it takes longer than `timeout_s`."""
    end = None if timeout_s is None else time.monotonic() + timeout_s
    pause = 0.0
    while True:
        left = LONG_POLL_S if end is None else max(0.0, min(LONG_POLL_S, end - time.monotonic()))
        asked = time.monotonic()
        response = yield Call(
            "GET",
            f"/v1/jobs/{job_id}",
            headers={"Prefer": f"wait={int(left)}"},
            answer_s=left + 30,
            pause_s=pause,
            repeatable=True,
        )
        job = Job.model_validate(response.json())
        if job.finished:
            return job
        if end is not None and time.monotonic() >= end:
            raise JobTimeoutError(
                f"{job_id} is {job.status} at {job.progress.percent:.0f} % after {timeout_s:g} s"
            )
        pause = 0.0 if time.monotonic() - asked > 1 else 0.5  # a service that answers at once is not hammered


def cancel_job(job_id: str) -> Flow[Job]:
    response = yield Call("POST", f"/v1/jobs/{job_id}/cancel", repeatable=True)
    return Job.model_validate(response.json())


def retry_job(job_id: str) -> Flow[Job]:
    response = yield Call("POST", f"/v1/jobs/{job_id}/retry")
    return Job.model_validate(response.json())


def delete_job(job_id: str) -> Flow[None]:
    yield Call("DELETE", f"/v1/jobs/{job_id}")


def list_events(job_id: str, limit: int | None, after: int | None) -> Flow[Page[JobEvent]]:
    return _list(f"/v1/jobs/{job_id}/events", JobEvent, limit, after)


def job_metrics(job_id: str) -> Flow[Page[Metric]]:
    return _list(f"/v1/jobs/{job_id}/metrics", Metric, None, None)


def list_samples(job_id: str, limit: int | None, after: int | None) -> Flow[Page[Sample]]:
    return _list(f"/v1/jobs/{job_id}/samples", Sample, limit, after)


def sample_image(job_id: str, sample_id: str, size: int | None) -> Flow[bytes]:
    path = f"/v1/jobs/{job_id}/samples/{sample_id}/image"
    response = yield Call("GET", path, query=_given({"size": size}), repeatable=True)
    return response.content


def get_student(student_id: str) -> Flow[Student]:
    return _get(f"/v1/students/{student_id}", Student)


def list_students(limit: int | None, after: str | None) -> Flow[Page[Student]]:
    return _list("/v1/students", Student, limit, after)


def delete_student(student_id: str) -> Flow[None]:
    yield Call("DELETE", f"/v1/students/{student_id}")


def student_report(student_id: str) -> Flow[dict[str, Any]]:
    response = yield Call("GET", f"/v1/students/{student_id}/report", repeatable=True)
    report: dict[str, Any] = response.json()
    return report


def predict(student_id: str, image: Path | bytes, precision: str | None, top: int | None) -> Flow[Prediction]:
    response = yield Call(
        "POST",
        f"/v1/students/{student_id}/predict",
        query=_given({"precision": precision, "top": top}),
        content=image if isinstance(image, bytes) else image.read_bytes(),
        headers={"Content-Type": "application/octet-stream"},
        repeatable=True,
    )
    return Prediction.model_validate(response.json())


def class_map(student_id: str, image: Path | bytes) -> Flow[bytes]:
    response = yield Call(
        "POST",
        f"/v1/students/{student_id}/class-map",
        content=image if isinstance(image, bytes) else image.read_bytes(),
        headers={"Content-Type": "application/octet-stream"},
        repeatable=True,
    )
    return response.content


def create_webhook(order: Mapping[str, Any]) -> Flow[Webhook]:
    response = yield Call("POST", "/v1/webhooks", json=_given(order))
    return Webhook.model_validate(response.json())


def get_webhook(webhook_id: str) -> Flow[Webhook]:
    return _get(f"/v1/webhooks/{webhook_id}", Webhook)


def list_webhooks(limit: int | None, after: str | None) -> Flow[Page[Webhook]]:
    return _list("/v1/webhooks", Webhook, limit, after)


def delete_webhook(webhook_id: str) -> Flow[None]:
    yield Call("DELETE", f"/v1/webhooks/{webhook_id}")


def replace_webhook_secret(webhook_id: str, overlap_s: float) -> Flow[Webhook]:
    response = yield Call("POST", f"/v1/webhooks/{webhook_id}/secret", query={"overlap_s": overlap_s})
    return Webhook.model_validate(response.json())


def test_webhook(webhook_id: str) -> Flow[WebhookTest]:
    response = yield Call("POST", f"/v1/webhooks/{webhook_id}/test")
    return WebhookTest.model_validate(response.json())


def list_deliveries(webhook_id: str, limit: int | None, after: str | None) -> Flow[Page[WebhookDelivery]]:
    return _list(f"/v1/webhooks/{webhook_id}/deliveries", WebhookDelivery, limit, after)


def send_again(webhook_id: str, delivery_id: str) -> Flow[WebhookDelivery]:
    path = f"/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/retry"
    response = yield Call("POST", path)
    return WebhookDelivery.model_validate(response.json())


def ready() -> Flow[dict[str, Any]]:
    """Readiness. Raises DramApiError (503) where a part is missing."""
    response = yield Call("GET", "/readyz")
    state: dict[str, Any] = response.json()
    return state
