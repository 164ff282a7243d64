"""A real HTTP server on loopback that answers as a test tells it to, well or badly."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from app.security.egress import Egress


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    path: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes


class Exchange(BaseHTTPRequestHandler):
    """One connection; a behaviour writes with `say`, or to `wfile` what it likes."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def say(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        server: Server = self.server.owner  # type: ignore[attr-defined]
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length) if server.reads else b""
        asked = Asked(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        with server.lock:
            server.asked.append(asked)
        with suppress(OSError):  # the client may hang up
            server.behave(self, asked)

    def finish(self) -> None:
        super().finish()
        self.server.owner.ended += 1  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        """Silent."""


Behaviour = Callable[[Exchange, Asked], None]


@dataclass
class Server:
    """`connections` counts those accepted, `ended` those gone; `reads`: whether it reads bodies at all."""

    behave: Behaviour
    port: int = 0
    reads: bool = True
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    ended: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}/predict"

    def egress(self) -> Egress:
        """Outbound requests as an operator allows them to this server."""
        return Egress([self.address])


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    owner: Server

    def get_request(self):  # type: ignore[no-untyped-def]
        self.owner.connections += 1
        return super().get_request()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no error here."""


@contextmanager
def serving(behave: Behaviour, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    listener = _Listener(("127.0.0.1", 0), Exchange)
    listener.owner = Server(behave, listener.server_port)
    if tls:
        listener.socket = tls.wrap_socket(listener.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield listener.owner
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
