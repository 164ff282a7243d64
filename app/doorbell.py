"""The one place that sends a Celery message. A message carries an id and is a best effort: the row is the promise."""

from __future__ import annotations

from typing import Any

import structlog
from celery import Celery
from kombu.exceptions import OperationalError

log = structlog.get_logger()

TASK = "workers.tasks.run_shard"


def celery(redis_url: str, **transport: Any) -> Celery:
    """A Celery application that speaks to our workers: JSON ids only, no results. `transport`: broker options."""
    application = Celery("dram", broker=redis_url)
    application.conf.update(
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue="gpu",
        broker_connection_retry_on_startup=True,
        broker_transport_options={"global_keyprefix": "dram:", "socket_keepalive": True} | transport,
    )
    return application


class Doorbell:
    """Rings for ready shards. Gives up within about a second, so that no request hangs on Redis."""

    def __init__(self, redis_url: str) -> None:
        self._celery = celery(
            redis_url, socket_connect_timeout=1, socket_timeout=1,
            max_retries=1, interval_start=0, interval_step=0.2, interval_max=0.5,
        )  # fmt: skip

    def ring(self, shard_id: str, queue: str) -> bool:
        """Tell the workers of `queue` that a shard is ready. False where Redis did not take it."""
        try:
            self._celery.send_task(TASK, args=[shard_id], queue=queue, ignore_result=True, retry=False)
        except (OperationalError, OSError) as error:
            log.warning("doorbell_failed", shard=shard_id, error=str(error))
            return False
        return True

    def close(self) -> None:
        self._celery.close()
