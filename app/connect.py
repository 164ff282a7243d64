"""Which service a command talks to, and with which key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from app import console
from app.client import Dram
from app.embedded import serving
from app.home import Home

DEFAULT_URL = "http://127.0.0.1:8700"
HERE = Path(".dram")

Url = Annotated[
    str | None,
    typer.Option("--url", envvar="DRAM_URL", help="Address of the service. Empty: the one in --home."),
]
Key = Annotated[
    str | None, typer.Option("--key", envvar="DRAM_API_KEY", help="API key. Empty: the one kept in --home.")
]
HomeFolder = Annotated[Path, typer.Option("--home", envvar="DRAM_HOME", help="Folder of the local service.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the service's answer as JSON.")]


@contextmanager
def service(url: str | None, key: str | None, home: Home) -> Iterator[Dram]:
    """The service that is meant: by address, else the one that runs in `home`, else the usual place.

    The key kept in `home` is sent to this machine only.
    """
    running = home.running()
    address = url or (running.url if running else "") or DEFAULT_URL
    local = urlsplit(address).hostname in {"127.0.0.1", "localhost", "::1"}
    with Dram(address, key or (home.key() if local else None)) as dram:
        yield dram


@contextmanager
def any_service(url: str | None, key: str | None, home: Home) -> Iterator[tuple[Dram, bool]]:
    """As `service`; where no address is given and nothing runs in `home`, one that is started for the time.

    With it, whether it goes on when the block has ended.
    """
    if url is not None or home.running() is not None:
        with service(url, key, home) as dram:
            yield dram, True
        return
    console.note(f"Starting a service in {home.folder} …")
    with serving(home) as address, Dram(address, key or home.key()) as dram:
        yield dram, False
