"""The Python client of a Dram service.

    from app.client import Dram

    with Dram("http://127.0.0.1:8700", key="dram_…") as dram:
        dataset = dram.datasets.create("photos/")
        job = dram.jobs.create(dataset_id=dataset.id, teacher_id="efficientnet_lite0", student="conv4")
        job = dram.jobs.wait(job.id)
        dram.students.download(job.student_id, "student.onnx")

`AsyncDram` has the same methods, to be awaited. Neither imports the server.
"""

from app.client.answers import (
    Architecture,
    Dataset,
    Generator,
    Job,
    JobEvent,
    Method,
    Metric,
    Page,
    Plan,
    PlannedStage,
    Prediction,
    Probe,
    Sample,
    Student,
    Teacher,
    Webhook,
    WebhookDelivery,
    WebhookTest,
)
from app.client.asynchronous import AsyncDram
from app.client.errors import (
    ClientError,
    DamagedDownloadError,
    DramApiError,
    JobTimeoutError,
    UnreachableError,
)
from app.client.synchronous import Dram

__all__ = [
    "Architecture",
    "AsyncDram",
    "ClientError",
    "DamagedDownloadError",
    "Dataset",
    "Dram",
    "DramApiError",
    "Generator",
    "Job",
    "JobEvent",
    "JobTimeoutError",
    "Method",
    "Metric",
    "Page",
    "Plan",
    "PlannedStage",
    "Prediction",
    "Probe",
    "Sample",
    "Student",
    "Teacher",
    "UnreachableError",
    "Webhook",
    "WebhookDelivery",
    "WebhookTest",
]
