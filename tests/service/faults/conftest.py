from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from app.jobs.tables import Job
from tests.service.stack import FINISHED, Stack, until

PARTS = ("redis", "gateway", "worker", "maintenance")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A whole service on SQLite, which the tests of a file share: to start one takes as long as a small test."""
    made = Stack(tmp_path_factory.mktemp("faults") / "home")
    try:
        made.start_all()
        yield made
    finally:
        made.stop()


@pytest.fixture
def stack(service: Stack) -> Stack:
    """The service, whole and idle again: with what the test before has ended, and without what it has left.

    What earlier tests computed is there too. A test that must see a stage run gives a seed or images of its own.
    """
    for name in set(service.processes) - set(PARTS):
        service.kill(name)
    ended = [
        name for name in PARTS if name not in service.processes or service.processes[name].poll() is not None
    ]
    service.start(*ended)
    until(lambda: service.http.get("/readyz").status_code == 200, 60, "readiness")
    with service.database.reading() as session:
        left = list(session.scalars(sa.select(Job.id).where(Job.status.not_in(FINISHED))))
    for job_id in left:  # of a test that failed
        service.http.post(f"/v1/jobs/{job_id}/cancel")
        service.finished(job_id, seconds=30)
    return service
