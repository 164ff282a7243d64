"""Keeps a worker's claim on a shard alive, and says when it must stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from app.jobs import claims
from app.jobs.claims import Claim, LeaseLost
from app.wiring import Wiring

log = structlog.get_logger()
Result = TypeVar("Result")
Verdict = claims.Verdict | Literal["lost"]

_PAUSE_S = 0.5


class Lease:
    """One claim. A database that does not answer is borne until the lease would have ended."""

    def __init__(self, wiring: Wiring, claim: Claim) -> None:
        self.claim = claim
        self._database = wiring.database
        self._settings = wiring.settings
        self._step: int | None = None  # until the stage speaks it is where it was
        self._total, self._alive = 0, False
        self._points: dict[tuple[int, str], float] = {}
        self._renewed = self._tried = time.monotonic()

    def progress(self, step: int, total: int, metrics: dict[str, float]) -> None:
        """Note progress; the next renewal writes it. A point is a finite number, and there is one of a name and step:
        a database may refuse anything else, and the lease would be lost with it."""
        self._step, self._total, self._alive = step, total, True
        self._points |= {(step, name): value for name, value in metrics.items() if math.isfinite(value)}

    def keep(self) -> Verdict:
        """Renew when due."""
        if time.monotonic() - self._tried < self._settings.heartbeat_s:
            return "go on"
        return self.renew()

    def renew(self) -> Verdict:
        """Renew now, and write the progress noted since."""
        self._tried = time.monotonic()
        points = [(step, name, value) for (step, name), value in self._points.items()]
        try:
            with self._database.writing() as session:
                verdict = claims.renew(
                    session, self.claim, self._settings, self._step, self._total, points, alive=self._alive
                )
        except LeaseLost:
            return "lost"
        except sa.exc.DBAPIError as error:
            log.warning("renewal_failed", shard=self.claim.shard_id, error=str(error.orig))
            return "lost" if time.monotonic() - self._renewed > self._settings.lease_ttl_s else "go on"
        self._renewed = time.monotonic()
        self._points, self._alive = {}, False
        return verdict

    def once(self, write: Callable[[Session], object]) -> None:
        """Run a write unit that must not be done twice: at most once, also where the database is lost on the way.
        Raises LeaseLost."""
        try:
            with self._database.writing() as session:
                write(session)
        except sa.exc.OperationalError as error:
            log.warning("write_dropped", shard=self.claim.shard_id, error=str(error.orig))

    def finish(self, write: Callable[[Session], Result]) -> Result:
        """Run the write unit that ends the claim. Tried again while the database is away. Raises LeaseLost."""
        until = time.monotonic() + self._settings.lease_ttl_s
        while True:
            try:
                with self._database.writing() as session:
                    return write(session)
            except sa.exc.OperationalError:
                if time.monotonic() > until:
                    raise LeaseLost(self.claim.shard_id) from None
                time.sleep(_PAUSE_S)
