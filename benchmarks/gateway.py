"""How fast the gateway answers, beside a do-nothing FastAPI route, and how soon a job's first stage runs.

    python -m benchmarks.gateway [--quick]

One uvicorn process each for the gateway and for the bare application, the same options; rounds alternate, so that
both see the same machine. The load comes from another process over keep-alive connections.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import sqlalchemy as sa
from fastapi import FastAPI
from PIL import Image

from app import migrate, redis_server
from app.jobs.tables import JobStage
from app.keys import service as keys
from app.settings import Settings
from app.wiring import Wiring
from benchmarks import record

CONNECTIONS = 16
ORDER = {"teacher_id": "efficientnet_lite0", "student": "conv4", "preset": "draft"}


def nothing() -> FastAPI:
    """What the gateway is measured against: one route, no middleware."""
    app = FastAPI(openapi_url=None)

    @app.get("/nothing")
    async def nothing_at_all() -> dict[str, str]:
        return {"object": "nothing"}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small version in under a minute")
    parser.add_argument("--load", nargs=2, metavar=("SECONDS", "REQUESTS_JSON"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        print(json.dumps(asyncio.run(_load(float(given.load[0]), json.loads(given.load[1])))))
        return
    rounds, seconds, jobs = (2, 1.0, 5) if given.quick else (5, 4.0, 30)
    with tempfile.TemporaryDirectory(prefix="dram-bench-") as folder:
        throughput, delays = measure(Path(folder), rounds, seconds, jobs)
    report(throughput, delays, quick=given.quick)


def measure(
    home: Path, rounds: int, seconds: float, job_count: int
) -> tuple[dict[str, list[float]], list[float]]:
    """Requests a second in each round by route, and seconds from POST job to its first stage running."""
    socket = redis_server.socket_path(home)
    environment = {
        "DRAM_HOME": str(home),
        "DRAM_REDIS_URL": redis_server.url(socket),
        "DRAM_MAX_ACTIVE_JOBS": "1000000",
        "DRAM_LOG_LEVEL": "WARNING",
        "DRAM_HEARTBEAT_S": "0.2",
    }
    os.environ.update(environment)
    wiring = Wiring.build(Settings())
    migrate.to_head(wiring.database)
    key = keys.ensure_first_key(wiring)
    redis = list(redis_server.program(redis_server.find(), home / "redis", socket).command)
    headers = {"Authorization": f"Bearer {key}"}
    with (
        _process(redis, home),
        _server("app.main:from_environment", home) as gateway,
        _server("benchmarks.gateway:nothing", home) as bare,
        httpx.Client(base_url=gateway, headers=headers, timeout=60) as http,
    ):
        dataset = http.post("/v1/datasets", files=_images()).raise_for_status().json()["id"]
        order = ORDER | {"dataset_id": dataset}
        jobs = [
            http.post("/v1/jobs", json=order | {"seed": seed}).raise_for_status().json() for seed in range(20)
        ]
        requests = {
            "nothing": (bare, "GET", ["/nothing"], None),
            "GET job": (gateway, "GET", [f"/v1/jobs/{job['id']}" for job in jobs], None),
            "list jobs": (gateway, "GET", ["/v1/jobs?limit=20"], None),
            "POST job": (gateway, "POST", ["/v1/jobs"], order),
        }
        throughput: dict[str, list[float]] = {name: [] for name in requests}
        for name in list(requests) * rounds:
            throughput[name].append(_drive(seconds, requests[name], headers))
        _forget_jobs(http)
        with _worker(home, http):
            delays = [_delay(http, wiring, order | {"seed": 10_000 + number}) for number in range(job_count)]
    wiring.close()
    return throughput, delays


def report(throughput: dict[str, list[float]], delays: list[float], *, quick: bool) -> None:
    base = statistics.median(throughput["nothing"])
    rows = [
        {
            "route": name,
            "requests_per_s": round(statistics.median(values), 1),
            "lowest": round(min(values), 1),
            "highest": round(max(values), 1),
            "of_nothing": round(statistics.median(values) / base, 3),
        }
        for name, values in throughput.items()
    ]
    shares = [
        job / nothing for job, nothing in zip(throughput["GET job"], throughput["nothing"], strict=True)
    ]
    delay = statistics.median(delays)
    rows.append({"route": "POST job to first stage running", "median_ms": round(delay * 1000, 1),
                 "p95_ms": round(float(np.percentile(delays, 95)) * 1000, 1), "jobs": len(delays)})  # fmt: skip
    checks = [
        record.check("GET job, share of a do-nothing route", statistics.median(shares), (min(shares), max(shares)),
                     at_least=0.35),
        record.check("POST job to first stage running, median s", delay, (min(delays), max(delays)), at_most=0.3),
    ]  # fmt: skip
    record.write("gateway", rows=rows, checks=checks, seeds=[], quick=quick)


async def _load(seconds: float, request: dict[str, Any]) -> float:
    """Send the request over and over on keep-alive connections; answers a second. A non-2xx answer is an error."""
    done = 0
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection(request["host"], request["port"])
        sent = 0
        while time.perf_counter() < end:
            writer.write(_message(request, number + sent, f"{number}-{sent}"))
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 2"):
                raise RuntimeError(head.decode())
            length = int(head.lower().split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            await reader.readexactly(length)
            sent += 1
            done += 1
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(CONNECTIONS)))
    return done / (time.perf_counter() - started)


def _message(request: dict[str, Any], turn: int, unique: str) -> bytes:
    path = request["paths"][turn % len(request["paths"])]
    body = (
        b"" if request["body"] is None else json.dumps(request["body"] | {"metadata": {"n": unique}}).encode()
    )
    lines = [
        f"{request['method']} {path} HTTP/1.1",
        f"Host: {request['host']}",
        f"Content-Length: {len(body)}",
    ]
    lines += [f"{name}: {value}" for name, value in request["headers"].items()]
    if body:
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, "", ""]).encode() + body


def _drive(seconds: float, request: tuple[str, str, list[str], Any], headers: dict[str, str]) -> float:
    base, method, paths, body = request
    url = httpx.URL(base)
    document = {
        "host": url.host,
        "port": url.port,
        "method": method,
        "paths": paths,
        "body": body,
        "headers": headers,
    }
    command = [sys.executable, "-m", "benchmarks.gateway", "--load", str(seconds), json.dumps(document)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _delay(http: httpx.Client, wiring: Wiring, order: dict[str, Any]) -> float:
    """Seconds from sending the order to its first stage running, both by this machine's clock."""
    sent = time.time()
    job = http.post("/v1/jobs", json=order).raise_for_status().json()["id"]
    first = sa.select(sa.func.min(JobStage.started_at)).where(JobStage.job_id == job)
    started = None
    while started is None:
        time.sleep(0.01)
        with wiring.database.reading() as session:
            started = session.scalar(first)
    http.post(f"/v1/jobs/{job}/cancel").raise_for_status()
    while http.get(f"/v1/jobs/{job}").json()["status"] != "cancelled":
        time.sleep(0.05)
    time.sleep(0.2)  # the worker is idle again
    return float(started - sent)


def _forget_jobs(http: httpx.Client) -> None:
    """Cancel every queued job, so that the worker is idle."""
    while jobs := http.get("/v1/jobs?status=queued&limit=100").json()["data"]:
        for job in jobs:
            http.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status()


def _images() -> list[tuple[str, tuple[str, bytes]]]:
    files = []
    for label in "ab":
        for number in range(2):
            with tempfile.SpooledTemporaryFile() as file:
                Image.effect_noise((32, 32), 50 + ord(label) + number).convert("RGB").save(file, "PNG")
                file.seek(0)
                files.append(("files", (f"{label}/{number}.png", file.read())))
    return files


@contextmanager
def _process(command: list[str], home: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (home / f"{Path(command[0]).name}-{time.time_ns()}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _server(factory: str, home: Path) -> Iterator[str]:
    port = record.free_port()
    command = [sys.executable, "-m", "uvicorn", factory, "--factory", "--port", str(port), "--no-access-log"]
    with _process(command, home):
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 60
        while True:
            try:
                httpx.get(url)
                break
            except httpx.TransportError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield url


@contextmanager
def _worker(home: Path, http: httpx.Client) -> Iterator[None]:
    command = [sys.executable, "-m", "celery", "-A", "workers.celery_app", "worker", "-P", "prefork", "-c", "1",
               "-Q", "gpu,cpu", "--without-gossip", "--without-mingle"]  # fmt: skip
    with _process(command, home):
        while not http.get("/readyz").json()["checks"]["worker"]["ok"]:
            time.sleep(0.2)
        yield


if __name__ == "__main__":
    main()
