"""A black box to ask: a plain HTTP server, as a program of its own, that counts every image it is sent.

    python black_box_server.py CLASS=CHANNEL …

It knows colours: a class's probability is the share of its channel (0 red, 1 green, 2 blue) in the image. It speaks
Dram's own contract (/dram), TorchServe's (/predictions/colours) and TensorFlow Serving's
(/v1/models/colours:predict). GET /state says what it has counted; POST /control sets what it does: keeps all requests
waiting from the image `hold_after` on, answers so many of the next with 500 (`fail`) or 429 (`busy`). An image counts
when it has arrived, whatever is answered, but for those turned away with 429.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

CHANNELS = {name: int(channel) for name, _, channel in (given.partition("=") for given in sys.argv[1:])}


@dataclass
class State:
    images: int = 0
    requests: int = 0
    waiting: int = 0
    hold_after: int | None = None
    fail: int = 0
    busy: int = 0
    authorization: str = ""  # of the newest question


state = State()
changed = threading.Condition()


def is_held(image: int) -> bool:
    return state.hold_after is not None and image > state.hold_after


def answer(pixels: np.ndarray) -> list[float]:
    """Probabilities of the classes for one image [H, W, 3] of any range above 0."""
    shares = pixels.mean((0, 1)).astype(float) + 1e-3
    chosen = np.array([shares[channel] for channel in CHANNELS.values()])
    return [float(value) for value in chosen / chosen.sum()]


def read(path: str, body: bytes) -> list[np.ndarray]:
    """The images of a request."""
    if path == "/dram":
        return [opened(base64.b64decode(text)) for text in json.loads(body)["images"]]
    if path == "/predictions/colours":
        return [opened(body)]
    return [np.array(instance) for instance in json.loads(body)["instances"]]


def opened(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def written(path: str, rows: list[list[float]]) -> Any:
    if path == "/dram":
        return {"probabilities": rows}
    if path == "/predictions/colours":
        return dict(zip(CHANNELS, rows[0], strict=True))
    return {"predictions": rows}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with changed:
            self._send(200, asdict(state))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/control":
            with changed:
                for name, value in json.loads(body).items():
                    setattr(state, name, value)
                changed.notify_all()
            self._send(200, {})
            return
        images = read(self.path, body)
        with changed:
            state.authorization = self.headers.get("Authorization", "")
            if state.busy:
                state.busy -= 1
                self._send(429, {}, {"Retry-After": "0"})
                return
            state.images += len(images)
            state.requests += 1
            failing = state.fail > 0
            state.fail -= failing
            state.waiting += 1
            arrived = state.images
            changed.wait_for(lambda: not is_held(arrived))
            state.waiting -= 1
        if failing:
            self._send(500, {"error": "on purpose"})
        else:
            self._send(200, written(self.path, [answer(image) for image in images]))

    def _send(self, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(document).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # who asked is dead

    def log_message(self, format: str, *arguments: Any) -> None:
        return


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
