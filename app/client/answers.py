"""What the service answers, typed. Members that a newer service adds are kept as further attributes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

#: A job in one of these does not change any more, unless it is retried.
FINISHED = frozenset({"succeeded", "failed", "cancelled"})


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


Item = TypeVar("Item", bound=Answer)


class Page(Answer, Generic[Item]):
    """One page of a list. When `has_more`, ask again with `after` = the id of the last item."""

    data: Sequence[Item]
    has_more: bool = False


class Dataset(Answer):
    id: str
    name: str
    task: str = "classification"
    classes: list[Any]
    splits: dict[str, Any] = {}
    report: dict[str, Any] = {}


class Progress(Answer):
    """`percent` never falls. `eta`: when the job is expected to end, as far as known."""

    percent: float = 0.0
    stage: str | None = None
    step: int | None = None
    total_steps: int | None = None
    eta: datetime | None = None


class Stage(Answer):
    name: str
    status: str
    percent: float = 0.0
    shards: int = 1


class Failure(Answer):
    """Why a job failed, and what to do about it."""

    code: str
    detail: str
    stage: str | None = None
    hint: str | None = None
    retryable: bool = False


class Queries(Answer):
    """Questions put to a black-box teacher: `spent` never passes `budget`; `cached` ones cost nothing."""

    budget: int | None = None
    planned: int | None = None
    spent: int = 0
    cached: int = 0


class Job(Answer):
    id: str
    status: str
    dataset_id: str
    teacher_id: str
    method: str
    student: str
    generator_id: str | None = None
    attempt: int = 1
    progress: Progress = Progress()
    stages: list[Stage] = []
    error: Failure | None = None
    student_id: str | None = None
    queries: Queries = Queries()

    @property
    def finished(self) -> bool:
        return self.status in FINISHED


class PlannedStage(Answer):
    """`reused`: all of its shards were made by earlier jobs."""

    name: str
    shards: int = 1
    reused: bool = False


class Plan(Answer):
    """What a job would do. `queries_planned`: most questions to its teacher; None: it is no black box."""

    stages: list[PlannedStage] = []
    queries_planned: int | None = None


class JobEvent(Answer):
    """Something that happened to a job; `id` counts from 1 without gaps."""

    id: int
    type: str
    data: dict[str, Any] = {}

    @property
    def final(self) -> bool:
        return self.type in {f"job.{status}" for status in FINISHED}


class Metric(Answer):
    """A point of a training curve."""

    stage: str
    shard: int
    name: str
    step: int
    value: float


class Score(Answer):
    label: str
    score: float


class Origin(Answer):
    """A real image that a synthetic one is made of."""

    split: str
    index: int
    name: str
    label: str | None = None
    share: float = 0.0


class Sample(Answer):
    """A synthetic image that a job has made. `kept`: whether the student learns from it; None: not decided yet."""

    id: str
    kind: str
    label: str | None = None
    origins: list[Origin] = []
    alpha: float | None = None
    seed: int | None = None
    scores: list[Score] = []
    kept: bool | None = None
    reason: str = ""


class Student(Answer):
    id: str
    job_id: str
    teacher: str
    method: str
    architecture: str
    classes: list[Any]
    summary: dict[str, Any] = {}


class Prediction(Answer):
    """Labels and scores of one image, the most likely first."""

    predictions: list[Score] = []


class Teacher(Answer):
    """`black_box`: how a teacher of your own is asked; None of the catalogue's."""

    id: str
    title: str = ""
    kind: str = ""
    available: bool = True
    reason: str = ""
    offers: list[str] = []
    black_box: dict[str, Any] | None = None

    @property
    def is_own(self) -> bool:
        """A black box of yours, of which only answers are known."""
        return self.kind in {"onnx", "http"}


class ClassScore(Answer):
    name: str
    score: float


class Probe(Answer):
    """What came of asking a teacher about one image. `problems`: what is wrong with it, in words."""

    teacher_id: str
    ok: bool
    latency_ms: float | None = None
    shape: list[int] | None = None
    top: list[ClassScore] = []
    problems: list[str] = []
    hint: str = ""


class Webhook(Answer):
    """`secret`: signs the messages; only in the answer that made it. `disabled_at`: its address answered 410 Gone."""

    id: str
    title: str = ""
    url: str = ""
    events: list[str] = []
    secret: str | None = None
    old_secret_until: datetime | None = None
    disabled_at: datetime | None = None


class WebhookTest(Answer):
    """What came of a test message. `http_status` None: there was no answer."""

    ok: bool
    http_status: int | None = None
    reason: str = ""


class WebhookDelivery(Answer):
    """A message to a webhook: pending, succeeded or failed. `reason`: why the last attempt failed."""

    id: str
    event: str
    job_id: str
    status: str
    attempts: int = 0
    next_attempt_at: datetime | None = None
    http_status: int | None = None
    reason: str = ""


class Method(Answer):
    """`needs`: what it asks of a teacher, whose `offers` must include it. `student`: the only one it makes, if so."""

    id: str
    title: str = ""
    task: str = "classification"
    needs: list[str] = []
    student: str | None = None


class Architecture(Answer):
    id: str


class Generator(Answer):
    """A text-to-image model that methods such as tint make images with."""

    id: str
    title: str = ""
    available: bool = True
    reason: str = ""
