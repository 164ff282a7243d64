"""What a job looks like from outside."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.schemas import Answer, Order, Time
from models.pipeline import Preset

Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
StageStatus = Literal["waiting", "ready", "running", "succeeded", "reused", "failed", "cancelled"]

#: Of counts and positions in a request: the largest that every JSON reader keeps, and both databases.
LARGEST_NUMBER = 2**53 - 1


class JobOrder(Order):
    """What to distil, with which teacher, into which student."""

    dataset_id: str = Field(description="From POST /v1/datasets.", examples=["ds_01k…"])
    teacher_id: str = Field(description="From GET /v1/teachers.", examples=["efficientnet_lite0"])
    method: str = Field("kd", description="From GET /v1/methods.")
    student: str = Field(
        description="From GET /v1/architectures; of a method that makes one of its teacher, that `student`.",
        examples=["mobilenetv3_small_050"],
    )
    generator_id: str | None = Field(
        None, description="From GET /v1/generators; for methods that read one. Left out: 'embedded'."
    )
    preset: Preset = Field("balanced", description="How much time to spend.")
    params: dict[str, Any] = Field({}, description="Overrides of the method's parameters, grouped by stage.")
    seed: int = Field(0, ge=0, lt=2**31)
    precision: Literal["fp32", "int8"] = Field(
        "fp32", description="int8 adds a quantised graph if accuracy holds."
    )
    query_budget: int | None = Field(
        None,
        ge=0,
        le=LARGEST_NUMBER,
        description="Most questions that the job may put to its teacher, repeated ones included.",
    )
    metadata: dict[str, str] = Field({}, max_length=16, description="Your own labels, returned as they are.")
    cancel_after_s: float | None = Field(
        None, gt=0, le=30 * 86400, description="Cancel the job after this time."
    )
    dry_run: bool = Field(
        False, description="Check and plan only; answers 200 with the plan and writes nothing."
    )


class Progress(Answer):
    percent: float = Field(description="0 to 100; never falls.")
    stage: str | None
    step: int | None
    total_steps: int | None
    eta: Time | None


class StageView(Answer):
    name: str
    status: StageStatus = Field(description="'reused': an earlier job made the same output.")
    percent: float
    shards: int
    queue: str
    started_at: Time | None
    finished_at: Time | None


class Queries(Answer):
    """Questions to the teacher. One is one image, each time that it is sent."""

    budget: int | None = Field(description="The order's query_budget; null: no limit.")
    planned: int | None = Field(
        description="Most that the job asks if none was answered before and none must be repeated; null: the method "
        "asks no black box."
    )
    spent: int = Field(description="Sent so far; the budget is never passed.")
    cached: int = Field(
        description="Answers that finished stages took from earlier jobs instead. A reused stage counts none."
    )


class JobErrorView(Answer):
    code: str
    detail: str
    stage: str | None
    hint: str
    retryable: bool


class JobView(Answer):
    object: Literal["job"]
    id: str
    status: Status
    attempt: int = Field(description="1, and one more for each time that work was lost or retried.")
    dataset_id: str
    teacher_id: str
    method: str
    student: str
    generator_id: str | None = Field(description="null: the method reads none.")
    preset: str
    params: dict[str, Any]
    seed: int
    progress: Progress
    stages: list[StageView]
    queries: Queries
    error: JobErrorView | None
    student_id: str | None
    metadata: dict[str, str]
    urls: dict[str, str]
    created_at: Time
    started_at: Time | None
    finished_at: Time | None


class PlannedStageView(Answer):
    name: str
    key: str
    shards: int
    reused: bool


class PlanView(Answer):
    """Answer to a dry run."""

    object: Literal["plan"]
    params: dict[str, Any]
    stages: list[PlannedStageView]
    queries_planned: int | None = Field(
        description="Most questions to the teacher; null: it is no black box."
    )


class EventView(Answer):
    id: int = Field(description="Number within the job, from 1, without gaps.")
    type: str
    data: dict[str, Any]
    created_at: Time


class CurvePoint(Answer):
    stage: str
    shard: int
    name: str
    step: int
    value: float


class OriginView(Answer):
    """A real image that a synthetic one is made of."""

    split: Literal["support", "unlabelled"]
    index: int = Field(description="Number of the image in its split, from 0.")
    name: str = Field(description="As uploaded.")
    label: str | None
    share: float = Field(description="0 to 1; of a diffusion model's image that of the inverted latent.")


class SampleScore(Answer):
    label: str
    score: float


class SampleView(Answer):
    """A synthetic image that a job has made."""

    object: Literal["sample"]
    id: str = Field(description="Number within the job, from 1.")
    kind: Literal["mixup", "cutmix", "cvae", "diffusion"]
    label: str | None = Field(description="The class it was made for; null: a mix has none.")
    origins: list[OriginView]
    alpha: float | None = Field(
        description="Of a diffusion model's image: the share of new noise in its start."
    )
    seed: int | None = Field(description="Of a diffusion model's image: the seed of its noise.")
    scores: list[SampleScore] = Field(
        description="What the teacher says, the surest classes first, with the weight of the class that the image was "
        "made for (`head.intended`), where it was for one; empty where it has not answered."
    )
    kept: bool | None = Field(description="Whether the student learns from it; null: not decided yet.")
    reason: str = Field(description="Why it is not kept; else empty.")
    urls: dict[str, str]
