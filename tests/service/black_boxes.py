"""Black boxes as processes of their own, and orders that put questions to them."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.service.stack import Stack, until

#: The classes of `stack.few_shot_zip`, not in its order, and the channel that each is about.
CHANNELS = {"class1": 1, "class2": 2, "class0": 0}
FORMAT = {"height": 32, "width": 32}
#: Images of `stack.few_shot_zip`: 3 classes with 4 to learn from and 4 to test on.
REAL = 24
SYNTHETIC = 200
#: A whole job that asks 224 questions, in seconds.
ORDER: dict[str, Any] = {
    "method": "fsbbt",
    "preset": "draft",
    "params": {
        "synthesis": {"images": SYNTHETIC, "maker": "mixup_cvae"},
        "cvae": {"epochs": 2},
        "distillation": {"steps": 30, "batch_size": 16, "input_size": 32},
        "evaluation": {"latency_runs": 5},
    },
}
#: A virtual environment with MLServer; `make install` makes it.
MLSERVER = Path(os.environ.get("DRAM_TEST_MLSERVER") or Path(__file__).parents[2] / ".venv-mlserver")


@dataclass(frozen=True)
class PlainServer:
    """`black_box_server.py`, running."""

    url: str

    def state(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/state").json())

    def control(self, **settings: Any) -> None:
        httpx.post(f"{self.url}/control", json=settings).raise_for_status()

    @property
    def counted(self) -> int:
        """Images that it was asked about."""
        return int(self.state()["images"])


@contextmanager
def plain_server(channels: Mapping[str, int] = CHANNELS) -> Iterator[PlainServer]:
    program = Path(__file__).with_name("black_box_server.py")
    classes = [f"{name}={channel}" for name, channel in channels.items()]
    with subprocess.Popen([sys.executable, str(program), *classes], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield PlainServer(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()


@contextmanager
def kserve_server(folder: Path) -> Iterator[str]:
    """MLServer with `kserve_runtime.Colours` as the model `colours`, which counts in `folder`; its URL."""
    ports = [_free_port() for _ in range(3)]
    settings = {
        "host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1], "metrics_port": ports[2],
        "parallel_workers": 0, "environments_dir": str(folder / "environments"),
    }  # fmt: skip
    model = {
        "name": "colours", "implementation": "kserve_runtime.Colours",
        "parameters": {"uri": str(folder / "counted"), "extra": {"channels": list(CHANNELS.values())}},
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(model))
    path = os.pathsep.join([str(MLSERVER / "bin"), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PATH": path}
    url = f"http://127.0.0.1:{ports[0]}"

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/v2/models/colours/ready").status_code == 200
        except httpx.TransportError:
            return False

    with (folder / "log").open("wb") as log:
        command = [str(MLSERVER / "bin" / "python"), "-m", "mlserver.cli.main", "start", str(folder)]
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
        try:
            until(ready, 60, f"MLServer answering (its log: {folder / 'log'})")
            yield url
        finally:
            process.kill()
            process.wait()


def add_teacher(stack: Stack, url: str, protocol: str = "dram", **more: Any) -> str:
    """Registers the endpoint; the teacher's id."""
    order = {
        "kind": "http", "title": "Colours", "protocol": protocol, "url": url, "classes": list(CHANNELS),
        "input": FORMAT, **more,
    }  # fmt: skip
    answer = stack.http.post("/v1/teachers", json=order)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def unlabelled_zip(images: int) -> bytes:
    """Small noisy colour fields in `unlabelled/`, and nothing else."""
    random = np.random.default_rng(3)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for index in range(images):
            pixels = random.integers(0, 90, (40, 40, 3)) + np.eye(3, dtype=int)[index % 3] * 150
            encoded = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(encoded, "PNG")
            archive.writestr(f"unlabelled/{index}.png", encoded.getvalue())
    return packed.getvalue()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
