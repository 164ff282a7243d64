"""The worker's Celery application: a doorbell that wakes `run_shard`. Never imports torch.

    celery -A workers.celery_app worker -P prefork -c 1 -Q gpu

Early ack, because the lease in the database owns redelivery; no prefetch, because a shard may take hours.
"""

from __future__ import annotations

from app import doorbell
from app.settings import Settings

settings = Settings()

app = doorbell.celery(
    settings.redis,
    visibility_timeout=3600,
    socket_connect_timeout=3,
    socket_timeout=30,
    health_check_interval=15,
)
app.conf.update(
    include=["workers.tasks", "workers.watchdog"],
    task_acks_late=False,
    broker_connection_max_retries=None,  # the default gives up after 100 tries
    worker_disable_prefetch=True,
    worker_prefetch_multiplier=1,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_hijack_root_logger=False,
    worker_send_task_events=False,
    worker_soft_shutdown_timeout=0.0,
)
