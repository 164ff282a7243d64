"""WeCoLoRA without a head: a shorter vision transformer that gives features, for search, clustering or a head of one's
own. Declares only.

Blocks are left out and tokens distilled as in `wecolora`. No image needs a label; those that have one serve for the
report.

Source: Grigore et al., arXiv:2404.09326, section 3.

| artefact        | files |
|---|---|
| trained_student | `weights.safetensors`, `backbone.json`, `student.json` (without classes), `history.json` |

The others are as in `wecolora` and `models.stages`.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from models import stages
from models.methods import wecolora
from models.methods.wecolora import ShorteningParams
from models.pipeline import Method, Stage, StageContext, TeacherOutput
from models.students import SHORTENED_VIT


class FeatureEvaluationParams(stages.EvaluationParams):
    images: int = Field(
        2000, ge=2, le=20_000, description="Images whose features are compared with the teacher's, at most."
    )


class WecoloraFeaturesParams(ShorteningParams):
    evaluation: FeatureEvaluationParams = Field(FeatureEvaluationParams(), description="The report.")


def without_head(context: StageContext, params: None) -> None:
    from models.training import student_head

    student_head.without_head(context)


def teacher_graph(context: StageContext, params: None) -> None:
    from models.export import feature_graph

    feature_graph.export_teacher(context)


def export(context: StageContext, params: None) -> None:
    from models.export import feature_graph

    feature_graph.export_student(context)


def evaluate(context: StageContext, params: FeatureEvaluationParams) -> None:
    from models.evaluation import feature_report

    feature_report.run(context, params)


def bundle(context: StageContext, params: None) -> None:
    from models.export import feature_bundle

    feature_bundle.run(context)


METHOD = Method(
    name="wecolora_features",
    title="Weight copy and low-rank adaptation, for features",
    source="arXiv:2404.09326",
    needs=frozenset({TeacherOutput.FEATURES, TeacherOutput.TOKENS}),
    params=WecoloraFeaturesParams,
    student=SHORTENED_VIT,
    draws=lambda params: params.generation.images > 0,
    misfit=wecolora.too_high_a_rank,
    task="features",
    stages=(
        wecolora.SHORTEN,
        wecolora.DRAW,
        wecolora.DISTILL_TOKENS.given("synthetic"),
        Stage(
            "without_head",
            without_head,
            output="trained_student",
            inputs=("backbone",),
            queue="cpu",
            seeded=False,
            weight=0.1,
            version=2,
        ),
        replace(stages.TEACHER_GRAPH, run=teacher_graph, inputs=("teacher", "trained_student")),
        replace(stages.EXPORT, run=export, params=None),
        replace(
            stages.EVALUATE,
            run=evaluate,
            inputs=(*stages.EVALUATE.inputs, "teacher_onnx"),
            optional=("support", "unlabelled", "test", "generator", "synthetic"),
        ),
        replace(stages.BUNDLE, run=bundle),
    ),
    presets=wecolora.METHOD.presets,
)
