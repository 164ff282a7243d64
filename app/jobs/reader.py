"""Answers GET job. Whoever asks while a query is under way shares the next one.

Polling is what a gateway does most. A query and a change of thread cost more than all else in such a request, so
they are paid once for everybody who waits; a single caller does not wait at all.
"""

from __future__ import annotations

import asyncio
from itertools import groupby

import sqlalchemy as sa
from fastapi.concurrency import run_in_threadpool

from app.jobs import service
from app.jobs.service import Reading
from app.wiring import Wiring

_Key = tuple[str, str]  # tenant, job
#: The database answers nobody at present; to ask again for each caller would only make all wait longer.
_AWAY = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)


class JobReader:
    """Use it from one event loop."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._asked: dict[_Key, asyncio.Future[Reading | None]] = {}
        self._answering: asyncio.Task[None] | None = None

    async def read(self, tenant: str, job_id: str) -> Reading:
        """The job as it is now, not as it was before this call. Raises NotFound."""
        future = self._asked.get((tenant, job_id))
        if future is None:
            future = self._asked[tenant, job_id] = asyncio.get_running_loop().create_future()
            if self._answering is None:
                self._answering = asyncio.create_task(self._answer())
        reading = await asyncio.shield(future)  # others may wait for it too
        if reading is None:
            raise service.no_job(job_id)
        return reading

    async def _answer(self) -> None:
        while self._asked:
            asked, self._asked = self._asked, {}
            found: dict[_Key, Reading | Exception]
            try:
                found = await run_in_threadpool(self._look, sorted(asked))
            except Exception as error:
                found = dict.fromkeys(asked, error)
            for key, future in asked.items():
                answer = found.get(key)
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        self._answering = None

    def _look(self, keys: list[_Key]) -> dict[_Key, Reading | Exception]:
        """What exists of these. Where they cannot be read together each is read alone: one caller's trouble is not
        the others'."""
        found: dict[_Key, Reading | Exception] = {}
        try:
            for tenant, group in groupby(keys, key=lambda key: key[0]):
                readings = service.read(self._wiring, tenant, [job_id for _, job_id in group])
                found |= {(tenant, job_id): reading for job_id, reading in readings.items()}
        except _AWAY:
            raise
        except Exception as error:
            if len(keys) == 1:
                return {keys[0]: error}
            for key in keys:
                found |= self._look([key])
        return found
