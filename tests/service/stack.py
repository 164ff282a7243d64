"""A whole service as separate processes that a test may kill, and the checks that must hold after any fault."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import sqlalchemy as sa
from PIL import Image

from app import migrate, redis_server, storage
from app.db import Database
from app.jobs.tables import Job, JobEvent, Shard, StageOutput
from app.keys import service as keys
from app.settings import HANDED_ON, Settings
from app.students.tables import Student
from app.wiring import Wiring

#: Distillation takes some ten seconds on two cores, so there is time to break it.
ORDER = {
    "teacher_id": "efficientnet_lite0",
    "student": "conv4",
    "method": "kd",
    "preset": "draft",
    "params": {
        "teacher": {"input_size": 64, "views": 1},
        "distillation": {"steps": 400, "batch_size": 16, "input_size": 32},
        "evaluation": {"latency_runs": 5},
    },
}
FINISHED = ("succeeded", "failed", "cancelled")


def until(check: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for a true value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := check():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {seconds:g} s")


class Stack:
    """Redis, gateway, worker and maintenance as processes of their own, on one database and one blob folder."""

    def __init__(self, home: Path, database_url: str = "", **environment: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self.socket = redis_server.socket_path(home)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.environment = {
            "DRAM_HOME": str(home),
            "DRAM_DATABASE_URL": database_url,
            "DRAM_REDIS_URL": redis_server.url(self.socket),
            "DRAM_PORT": str(self.port),
            "DRAM_LEASE_TTL_S": "4",
            "DRAM_HEARTBEAT_S": "0.5",
            "DRAM_REAP_S": "0.5",
            "DRAM_RING_AGAIN_S": "1",
            "DRAM_CHECKPOINT_S": "0.5",
            "DRAM_DEVICE": "cpu",
            "DRAM_EGRESS_ALLOW": "127.0.0.1",  # where the black boxes of the tests listen
            **environment,
        }
        names = {
            name.removeprefix("DRAM_").lower(): value for name, value in self.environment.items() if value
        }
        self.environment["OMP_NUM_THREADS"] = "1"  # two workers at once share two cores
        self.settings = Settings(**names)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.wiring = Wiring.build(self.settings)
        migrate.to_head(self.wiring.database)
        token = keys.ensure_first_key(self.wiring)
        assert token is not None
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers={"Authorization": f"Bearer {token}"}, timeout=60
        )

    @property
    def database(self) -> Database:
        return self.wiring.database

    def start(self, *names: str) -> None:
        for name in names:
            with (self.home / f"{name}.log").open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    self._command(name.split("-")[0]),
                    env={**os.environ, **self.environment},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            if name == "redis":
                until(lambda: redis_server.answers(self.socket), 10, "redis answering")
            if name == "gateway":
                until(self._gateway_answers, 30, "the gateway answering")

    def start_all(self) -> None:
        self.start("redis", "gateway", "worker", "maintenance")
        until(lambda: self.http.get("/readyz").status_code == 200, 60, "readiness")

    def kill(self, name: str) -> None:
        """kill -9, with no chance to tidy up."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def compute_processes(self) -> list[psutil.Process]:
        """The compute children of this stack that are alive."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ", "status"]):
            is_compute = "workers.compute" in (process.info["cmdline"] or [])
            mine = is_compute and str(self.home) in (process.info["environ"] or {}).get(HANDED_ON, "")
            if mine and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def stop(self) -> None:
        for process in self.processes.values():
            for child in (
                psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            ):
                child.kill()
            process.kill()
            process.wait()
        self.http.close()
        self.wiring.close()

    def _command(self, name: str) -> list[str]:
        python = sys.executable
        if name == "redis":
            return list(redis_server.program(redis_server.find(), self.home / "redis", self.socket).command)
        if name == "gateway":
            return [
                python,
                "-m",
                "uvicorn",
                "app.main:from_environment",
                "--factory",
                "--port",
                str(self.port),
            ]
        if name == "worker":
            return [
                *(python, "-m", "celery", "-A", "workers.celery_app", "worker", "-P", "prefork", "-c", "1"),
                *("-Q", "gpu,cpu", "--without-gossip", "--without-mingle", "-n", f"w{time.time_ns()}@%h"),
            ]
        return [python, "-m", "workers.maintenance"]

    def _gateway_answers(self) -> bool:
        try:
            return self.http.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    # ---- what a user does ----

    def upload(self, seed: int = 0) -> str:
        answer = self.http.post(
            "/v1/datasets", files={"archive": ("set.zip", few_shot_zip(seed), "application/zip")}
        )
        assert answer.status_code in (200, 201), answer.text
        return str(answer.json()["id"])

    def submit(self, dataset_id: str, **changes: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/jobs", json={**ORDER, "dataset_id": dataset_id, **changes})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.http.get(f"/v1/jobs/{job_id}").json())

    def step_of(self, job_id: str, stage: str) -> int:
        """How far a running stage is, by the database."""
        with self.database.reading() as session:
            select = sa.select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == "stage.progress")
            steps = [event.data["step"] for event in session.scalars(select) if event.data["stage"] == stage]
        return max(steps, default=0)

    def wait_for_step(self, job_id: str, step: int, stage: str = "distill", seconds: float = 90) -> None:
        until(lambda: self.step_of(job_id, stage) >= step, seconds, f"step {step} of {stage}")

    def finished(self, job_id: str, seconds: float = 120) -> dict[str, Any]:
        def status() -> dict[str, Any] | None:
            with self.database.reading() as session:
                ended = session.get_one(Job, job_id).status in FINISHED
            return self.job(job_id) if ended else None

        return dict(until(status, seconds, f"the end of {job_id}"))

    # ---- what must hold after any fault ----

    def check_history(self, job_id: str) -> list[JobEvent]:
        """Gap-free events, one end, one student with whole files, no attempt over the cap. Returns the events."""
        with self.database.reading() as session:
            job = session.get_one(Job, job_id)
            select = sa.select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.number)
            events = list(session.scalars(select))
            students = list(session.scalars(sa.select(Student).where(Student.job_id == job_id)))
            shards = list(session.scalars(sa.select(Shard).where(Shard.job_id == job_id)))
            made = list(
                session.scalars(sa.select(StageOutput).where(StageOutput.key.in_([s.key for s in shards])))
            )
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        types = [event.type for event in events]
        assert types[-1] == f"job.{job.status}"
        assert sum(kind in ("job.succeeded", "job.failed", "job.cancelled") for kind in types) == 1
        ended = [event.data["stage"] for event in events if event.type in ("stage.succeeded", "stage.reused")]
        assert len(ended) == len(set(ended))
        assert all(shard.attempt <= self.settings.max_attempts for shard in shards)
        assert len(students) == (job.status == "succeeded")
        if job.status == "succeeded":
            assert {shard.key for shard in shards} == {output.key for output in made}
        for files in [output.files for output in made] + [student.files for student in students]:
            for digest in files.values():
                path = storage.LocalStore(self.home / "blobs").path(digest)
                assert storage.digest_of(path) == digest
        return events


def few_shot_zip(seed: int = 0, classes: int = 3, shots: int = 4) -> bytes:
    """Small noisy colour fields: enough to train on, nothing to learn from."""
    random = np.random.default_rng(seed)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for label in range(classes):
            for index in range(shots + 4):
                pixels = random.integers(0, 90, (40, 40, 3)) + np.eye(3, dtype=int)[label % 3] * 150
                encoded = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(encoded, "PNG")
                folder = f"class{label}" if index < shots else f"test/class{label}"
                archive.writestr(f"{folder}/{index}.png", encoded.getvalue())
    return packed.getvalue()
