"""The asynchronous client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from app.client import calls
from app.client.answers import (
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
from app.client.calls import Call, Flow
from app.client.packing import Source, packed
from app.client.streams import Download, EventFeed
from app.client.transport import Connection, Outcome, checked

Result = TypeVar("Result")


class AsyncDram:
    """A Dram service. Raises DramApiError where it refuses, UnreachableError where it does not answer.

    Requests that may be repeated safely are tried again when the connection is lost (`retries` times).
    `timeout_s`: longest silence of the network; operations that take longer wait longer by themselves.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8700",
        key: str | None = None,
        *,
        timeout_s: float = 30,
        retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._connection = Connection(url.rstrip("/"), key, timeout_s, retries)
        self._http = httpx.AsyncClient(transport=transport, **self._connection.options())
        self.datasets = AsyncDatasets(self)
        self.teachers = AsyncTeachers(self)
        self.jobs = AsyncJobs(self)
        self.students = AsyncStudents(self)
        self.webhooks = AsyncWebhooks(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def methods(self) -> Page[Method]:
        return await self.run(calls.list_methods())

    async def architectures(self) -> Page[Architecture]:
        return await self.run(calls.list_architectures())

    async def generators(self) -> Page[Generator]:
        return await self.run(calls.list_generators())

    async def ready(self) -> dict[str, Any]:
        return await self.run(calls.ready())

    async def run(self, flow: Flow[Result]) -> Result:
        """Carry out an operation: send what it asks for until it has its result."""
        try:
            call = next(flow)
            while True:
                call = flow.send(checked(await self._send(call)))
        except StopIteration as stop:
            result: Result = stop.value
            return result

    async def _send(self, call: Call) -> httpx.Response:
        await asyncio.sleep(call.pause_s)
        tries = 0
        while True:
            tries += 1
            try:
                outcome: Outcome = await self._http.request(**self._connection.request(call))
            except httpx.TransportError as error:
                outcome = error
            pause = self._connection.pause_before_retry(call, tries, outcome)
            if pause is not None:
                await asyncio.sleep(pause)
            elif isinstance(outcome, httpx.Response):
                return outcome
            else:
                raise self._connection.unreachable(outcome) from outcome

    async def download(self, path: str, target: Path) -> Path:
        """Fetch a file, resuming after a lost connection. Raises DamagedDownloadError."""
        call = Call("GET", path, repeatable=True)
        download = Download(target)
        tries = 0
        while True:
            try:
                async with self._http.stream("GET", path, headers=download.headers()) as response:
                    if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                        download.restart()
                        continue
                    if not response.is_success:
                        await response.aread()
                    else:
                        download.begin(response)
                        async for chunk in response.aiter_raw():
                            download.write(chunk)
                            tries = 0
                        if download.finish(response.headers):
                            return target
                        continue
                outcome: Outcome = response
            except httpx.TransportError as error:
                outcome = error
            tries += 1
            pause = self._connection.pause_before_retry(call, tries, outcome)
            if pause is not None:
                await asyncio.sleep(pause)
            elif isinstance(outcome, httpx.Response):
                checked(outcome)
            else:
                raise self._connection.unreachable(outcome) from outcome

    async def follow(self, job_id: str, after: int) -> AsyncIterator[JobEvent]:
        """Events as they happen, until the job is finished; goes on by itself after a lost connection."""
        path = f"/v1/jobs/{job_id}/events"
        call = Call("GET", path, repeatable=True)
        feed = EventFeed(after)
        tries = 0
        while not feed.finished:
            outcome: Outcome
            try:
                async with self._http.stream("GET", path, headers=feed.headers()) as outcome:
                    if not outcome.is_success:
                        await outcome.aread()
                    else:
                        async for line in outcome.aiter_lines():
                            event = feed.line(line)
                            if event is not None:
                                tries = 0
                                yield event
            except httpx.TransportError as error:
                outcome = error
            if feed.finished:
                return
            tries += 1
            pause = self._connection.pause_before_retry(call, tries, outcome)
            if pause is not None:
                await asyncio.sleep(pause)
            elif isinstance(outcome, httpx.Response) and not outcome.is_success:
                checked(outcome)
            elif isinstance(outcome, httpx.Response):  # the stream ended in good order, the job perhaps not
                if (await self.jobs.get(job_id)).finished:
                    return
                await asyncio.sleep(1)
            else:
                raise self._connection.unreachable(outcome) from outcome


class AsyncDatasets:
    def __init__(self, dram: AsyncDram) -> None:
        self._dram = dram

    async def create(self, source: Source, name: str | None = None) -> Dataset:
        """Upload a folder of class folders, a zip of them, or pairs of ("class/file", path or bytes).

        A folder `test` beside the classes holds class folders of images that only measure, a folder
        `unlabelled` images without a class. For segmentation the folders are `images` and `masks`, with PNG masks of
        their images' names.
        """
        with packed(source) as (own_name, archive):
            return await self._dram.run(calls.create_dataset(name or own_name, archive))

    async def get(self, dataset_id: str) -> Dataset:
        return await self._dram.run(calls.get_dataset(dataset_id))

    async def list(self, *, limit: int | None = None, after: str | None = None) -> Page[Dataset]:
        return await self._dram.run(calls.list_datasets(limit, after))

    async def delete(self, dataset_id: str) -> None:
        await self._dram.run(calls.delete_dataset(dataset_id))


class AsyncTeachers:
    def __init__(self, dram: AsyncDram) -> None:
        self._dram = dram

    async def list(self, *, limit: int | None = None, after: str | None = None) -> Page[Teacher]:
        """First the catalogue, then your own, newest first."""
        return await self._dram.run(calls.list_teachers(limit, after))

    async def get(self, teacher_id: str) -> Teacher:
        return await self._dram.run(calls.get_teacher(teacher_id))

    async def add_http(
        self,
        *,
        title: str,
        url: str,
        classes: Sequence[str],
        input: dict[str, Any],
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> Teacher:
        """Add an endpoint. `input`: height, width and the like; `more`: protocol, answers, batch_size, …

        `headers` are secrets: the service encrypts them and never shows them again.
        """
        order = {
            "title": title,
            "url": url,
            "classes": [*classes],
            "input": input,
            "headers": headers,
            **more,
        }
        return await self._dram.run(calls.create_http_teacher(order))

    async def add_onnx(
        self, model: str | Path, *, classes: Sequence[str], title: str | None = None, **more: Any
    ) -> Teacher:
        """Add an ONNX file. `more`: what the file does not say: input, answers, output_name, …"""
        path = Path(model)
        order = {"title": title or path.stem, "classes": [*classes], **more}
        with path.open("rb") as file:
            return await self._dram.run(calls.create_onnx_teacher(file, order))

    async def probe(self, teacher_id: str, image: str | Path | bytes | None = None) -> Probe:
        """Ask about one image (None: a test pattern) and see what is wrong, if anything is."""
        content = Path(image) if isinstance(image, str) else image
        return await self._dram.run(calls.probe_teacher(teacher_id, content))

    async def replace_headers(self, teacher_id: str, headers: dict[str, str]) -> Teacher:
        """Put these secret headers in place of all old ones."""
        return await self._dram.run(calls.replace_teacher_headers(teacher_id, headers))

    async def delete(self, teacher_id: str) -> None:
        """Take a teacher of yours away. Refused (409) while an unfinished job asks it."""
        await self._dram.run(calls.delete_teacher(teacher_id))


class AsyncJobs:
    def __init__(self, dram: AsyncDram) -> None:
        self._dram = dram

    async def create(
        self,
        *,
        dataset_id: str,
        teacher_id: str,
        student: str,
        generator_id: str | None = None,
        method: str | None = None,
        preset: str | None = None,
        params: dict[str, Any] | None = None,
        seed: int | None = None,
        precision: str | None = None,
        query_budget: int | None = None,
        metadata: dict[str, str] | None = None,
        cancel_after_s: float | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Order a student. What is left out takes the service's default."""
        order = {
            "dataset_id": dataset_id,
            "teacher_id": teacher_id,
            "method": method,
            "student": student,
            "generator_id": generator_id,
            "preset": preset,
            "params": params,
            "seed": seed,
            "precision": precision,
            "query_budget": query_budget,
            "metadata": metadata,
            "cancel_after_s": cancel_after_s,
        }
        return await self._dram.run(calls.create_job(order, idempotency_key))

    async def plan(self, **order: Any) -> Plan:
        """What `create` with the same arguments would do, without doing it."""
        return await self._dram.run(calls.plan_job(order))

    async def get(self, job_id: str) -> Job:
        return await self._dram.run(calls.get_job(job_id))

    async def list(self, *, limit: int | None = None, after: str | None = None) -> Page[Job]:
        return await self._dram.run(calls.list_jobs(limit, after))

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job when it has finished, well or not. Raises JobTimeoutError."""
        return await self._dram.run(calls.wait_for_job(job_id, timeout_s))

    async def cancel(self, job_id: str) -> Job:
        return await self._dram.run(calls.cancel_job(job_id))

    async def retry(self, job_id: str) -> Job:
        """Let a failed or cancelled job go on where it stopped."""
        return await self._dram.run(calls.retry_job(job_id))

    async def delete(self, job_id: str) -> None:
        """Delete a finished job, but not the student that it made."""
        await self._dram.run(calls.delete_job(job_id))

    def events(self, job_id: str, *, after: int = 0) -> AsyncIterator[JobEvent]:
        """Events after number `after` as they happen, until the job is finished."""
        return self._dram.follow(job_id, after)

    async def history(
        self, job_id: str, *, limit: int | None = None, after: int | None = None
    ) -> Page[JobEvent]:
        """Events so far."""
        return await self._dram.run(calls.list_events(job_id, limit, after))

    async def metrics(self, job_id: str) -> Page[Metric]:
        return await self._dram.run(calls.job_metrics(job_id))

    async def samples(
        self, job_id: str, *, limit: int | None = None, after: int | None = None
    ) -> Page[Sample]:
        """The synthetic images so far, in the order they are numbered."""
        return await self._dram.run(calls.list_samples(job_id, limit, after))

    async def sample_image(self, job_id: str, sample_id: str, *, size: int | None = None) -> bytes:
        """One of them as PNG, its longer side at most `size` pixels."""
        return await self._dram.run(calls.sample_image(job_id, sample_id, size))


class AsyncStudents:
    def __init__(self, dram: AsyncDram) -> None:
        self._dram = dram

    async def get(self, student_id: str) -> Student:
        return await self._dram.run(calls.get_student(student_id))

    async def list(self, *, limit: int | None = None, after: str | None = None) -> Page[Student]:
        return await self._dram.run(calls.list_students(limit, after))

    async def delete(self, student_id: str) -> None:
        await self._dram.run(calls.delete_student(student_id))

    async def report(self, student_id: str) -> dict[str, Any]:
        return await self._dram.run(calls.student_report(student_id))

    async def download(self, student_id: str, target: str | Path, precision: str = "fp32") -> Path:
        """Fetch the ONNX file to `target`, checked against its sha-256."""
        path = f"/v1/students/{student_id}/model.onnx?precision={precision}"
        return await self._dram.download(path, Path(target))

    async def download_bundle(self, student_id: str, target: str | Path) -> Path:
        """Fetch the zip with everything to ship to `target`, checked against its sha-256."""
        return await self._dram.download(f"/v1/students/{student_id}/bundle.zip", Path(target))

    async def predict(
        self, student_id: str, image: Path | bytes, *, precision: str | None = None, top: int | None = None
    ) -> Prediction:
        """What the student sees in an image (JPEG, PNG or WebP)."""
        return await self._dram.run(calls.predict(student_id, image, precision, top))

    async def class_map(self, student_id: str, image: Path | bytes) -> bytes:
        """What each pixel of an image (JPEG, PNG or WebP) shows: a grey PNG whose values are numbers of classes.

        Of an image over 1,024 pixels a side it is a map of the image scaled down to that.
        """
        return await self._dram.run(calls.class_map(student_id, image))


class AsyncWebhooks:
    def __init__(self, dram: AsyncDram) -> None:
        self._dram = dram

    async def create(
        self, url: str, *, events: Sequence[str] | None = None, title: str | None = None
    ) -> Webhook:
        """Be told of events of your jobs, such as job.failed; left out: of their ends. Keep its `secret`."""
        order = {"url": url, "events": None if events is None else [*events], "title": title}
        return await self._dram.run(calls.create_webhook(order))

    async def get(self, webhook_id: str) -> Webhook:
        return await self._dram.run(calls.get_webhook(webhook_id))

    async def list(self, *, limit: int | None = None, after: str | None = None) -> Page[Webhook]:
        return await self._dram.run(calls.list_webhooks(limit, after))

    async def delete(self, webhook_id: str) -> None:
        await self._dram.run(calls.delete_webhook(webhook_id))

    async def replace_secret(self, webhook_id: str, *, overlap_s: float = 86400) -> Webhook:
        """Make a new `secret`. For `overlap_s` messages are signed with the old one, too; 0: not any more."""
        return await self._dram.run(calls.replace_webhook_secret(webhook_id, overlap_s))

    async def test(self, webhook_id: str) -> WebhookTest:
        """Send a message of type webhook.test now, and see what comes back."""
        return await self._dram.run(calls.test_webhook(webhook_id))

    async def deliveries(
        self, webhook_id: str, *, limit: int | None = None, after: str | None = None
    ) -> Page[WebhookDelivery]:
        """The messages to it, newest first, and what became of them."""
        return await self._dram.run(calls.list_deliveries(webhook_id, limit, after))

    async def send_again(self, webhook_id: str, delivery_id: str) -> WebhookDelivery:
        return await self._dram.run(calls.send_again(webhook_id, delivery_id))
