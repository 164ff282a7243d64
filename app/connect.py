"""Which service a command talks to, and with which key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

HomeFolder = Annotated[Path, typer.Option("--home", envvar="DRAM_HOME", help="Folder of the local service.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the service's answer as JSON.")]
Url = Annotated[
    str | None,
    typer.Option("--url", envvar="DRAM_URL", help="Address of the service. Empty: the one in --home."),
]
Key = Annotated[
    str | None, typer.Option("--key", envvar="DRAM_API_KEY", help="API key. Empty: the one kept in --home.")
]


@dataclass(frozen=True)
class Where:
    """What a command is told of the service; see `app.option_groups`."""

    url: Url = None
    key: Key = None
    home: HomeFolder = HERE

    @contextmanager
    def client(self) -> Iterator[Dram]:
        """Of the service that is meant: by address, else the one that runs in `home`, else the usual place.

        The key kept in `home` is sent to this machine only.
        """
        home = Home(self.home)
        running = home.running()
        address = self.url or (running.url if running else "") or DEFAULT_URL
        local = urlsplit(address).hostname in {"127.0.0.1", "localhost", "::1"}
        with Dram(address, self.key or (home.key() if local else None)) as dram:
            yield dram

    @contextmanager
    def any_client(self) -> Iterator[tuple[Dram, bool]]:
        """As `client`; where no address is given and nothing runs in `home`, of one that is started for the time.

        With it, whether the service goes on when the block has ended.
        """
        home = Home(self.home)
        if self.url is not None or home.running() is not None:
            with self.client() as dram:
                yield dram, True
            return
        console.note(f"Starting a service in {home.folder} …")
        with serving(home) as address, Dram(address, self.key or home.key()) as dram:
            yield dram, False
