"""Celery as a doorbell: two queues, JSON ids, early ack, no results. Why each setting: ARCHITECTURE.md. No torch."""

from __future__ import annotations

from typing import Any

from celery import Celery

from app.settings import Settings

TASK = "workers.tasks.run_shard"
QUEUES = ("gpu", "cpu")
_KEY_PREFIX = "dram:"


def make(redis_url: str, **publisher: Any) -> Celery:
    """The Celery application. `publisher`: further transport options of a process that only sends."""
    celery = Celery("dram", broker=redis_url, include=[])
    celery.conf.update(
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        task_acks_late=False,  # the lease in the database owns redelivery, not Redis
        task_default_queue="gpu",
        task_create_missing_queues=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": 3600,
            "socket_keepalive": True,
            "socket_connect_timeout": 3,
            "socket_timeout": 30,
            "health_check_interval": 15,
            "global_keyprefix": _KEY_PREFIX,
            **publisher,
        },
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
    )
    return celery


def from_environment() -> Celery:
    return make(Settings().redis)
