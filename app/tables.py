"""Every table, so that `Base.metadata` is complete: what Alembic compares."""

from app.datasets.tables import Dataset, DatasetImage
from app.db import Base
from app.jobs.tables import (
    IdempotencyKey,
    Job,
    JobEvent,
    JobMetric,
    JobStage,
    Shard,
    StageOutput,
    TeacherAnswer,
    Worker,
)
from app.keys.tables import ApiKey
from app.students.tables import Student
from app.teachers.tables import Teacher
from app.webhooks.tables import Webhook, WebhookDelivery

__all__ = [
    "ApiKey", "Base", "Dataset", "DatasetImage", "IdempotencyKey", "Job", "JobEvent", "JobMetric", "JobStage",
    "Shard", "StageOutput", "Student", "Teacher", "TeacherAnswer", "Webhook", "WebhookDelivery",
    "Worker",
]  # fmt: skip
