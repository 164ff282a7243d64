"""Knowledge distillation from a few-shot teacher: the baseline method. Declares only.

The teacher is a frozen network with a head fitted to the few labelled images. It labels the labelled images
and, where there are any, the unlabelled ones; the student learns those labels.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, section 2.
"""

from __future__ import annotations

from pydantic import Field

from models import stages
from models.pipeline import Method, Params, TeacherOutput


class KdParams(Params):
    teacher: stages.TeacherParams = Field(stages.TeacherParams(), description="What the teacher is shown.")
    head: stages.HeadParams = Field(stages.HeadParams(), description="The teacher's few-shot classifier.")
    distillation: stages.DistillationParams = Field(
        stages.DistillationParams(), description="How the student is trained."
    )
    export: stages.ExportParams = Field(stages.ExportParams(), description="The student's file.")
    evaluation: stages.EvaluationParams = Field(stages.EvaluationParams(), description="The report.")


METHOD = Method(
    name="kd",
    title="Knowledge distillation",
    source="arXiv:1503.02531",
    needs=frozenset({TeacherOutput.FEATURES}),
    params=KdParams,
    stages=(
        stages.ASK,
        stages.LABEL,
        stages.DISTILL,
        stages.CROSS_VALIDATE,
        stages.EXAMINE,
        stages.TEACHER_GRAPH,
        stages.EXPORT,
        stages.EVALUATE.given("teacher_onnx", "cross_validation"),
        stages.BUNDLE,
    ),
    presets={
        "draft": {"distillation": {"steps": 600}, "evaluation": {"latency_runs": 20}},
        "balanced": {},
        "best": {"distillation": {"steps": 10_000, "ema_decay": 0.999}},
    },
)
