"""WeCoLoRA for segmentation: the shorter vision transformer says of each pixel what it shows. Declares only.

Blocks are left out and tokens distilled as in `wecolora`, where asked also on images that a generator makes of the
classes' names; then a linear layer on the tokens of the patches is fitted to a few images with masks, for the student
and, to compare, for the teacher. Images that are made have no masks, so that the layer learns nothing from them.

Source: Grigore et al., arXiv:2404.09326. They put a TransUNet decoder on the student and train it on many masks; of a
few only a linear layer can be fitted, as in Oquab et al. (DINOv2), arXiv:2304.07193, section 7.4.

| artefact         | files |
|---|---|
| trained_student  | what `backbone` has; `head.safetensors`, `teacher_head.safetensors`, `student.json` |
| cross_validation | `confusions.safetensors` "student", "teacher" [n, C, C], pixels by class and answer, "index" [n] |

The others are as in `wecolora` and `models.stages`.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from models import stages
from models.methods import wecolora
from models.methods.wecolora import ShorteningParams, TokenDistillationParams
from models.pipeline import JobShape, Method, Params, Stage, StageContext, TeacherOutput
from models.students import SHORTENED_VIT


class DenseHeadParams(Params):
    """The linear layer on the tokens of patches."""

    penalty: float = Field(
        1e-3, ge=0, le=100, description="Weight of the squared coefficients of standardised tokens."
    )
    mirror: bool = Field(
        True,
        description="Learn from mirror images, too. Switch off where left and right matter.",
    )
    most_patches: int = Field(
        20_000,
        ge=100,
        le=1_000_000,
        description="Patches that it is fitted to, at most, drawn from all that show a known class.",
    )


class WecoloraSegmentationParams(ShorteningParams):
    dense_head: DenseHeadParams = Field(
        DenseHeadParams(), description="The linear layer on the tokens of patches."
    )
    evaluation: stages.EvaluationParams = Field(stages.EvaluationParams(), description="The report.")


def fit_heads(context: StageContext, params: DenseHeadParams) -> None:
    from models.training import dense_head

    dense_head.fit_heads(context, params)


def cross_validate(context: StageContext, params: TokenDistillationParams) -> None:
    from models.training import dense_head

    dense_head.cross_validate(context, params)


def teacher_graph(context: StageContext, params: None) -> None:
    from models.export import segmentation_graph

    segmentation_graph.export_teacher(context)


def export(context: StageContext, params: None) -> None:
    from models.export import segmentation_graph

    segmentation_graph.export_student(context)


def evaluate(context: StageContext, params: stages.EvaluationParams) -> None:
    from models.evaluation import segmentation_report

    segmentation_report.run(context, params)


def bundle(context: StageContext, params: None) -> None:
    from models.export import segmentation_bundle

    segmentation_bundle.run(context)


def folds(shape: JobShape, params: WecoloraSegmentationParams) -> int:
    """As many as there are images, up to five."""
    return min(stages.FOLDS, shape.support)


METHOD = Method(
    name="wecolora_segmentation",
    title="Weight copy and low-rank adaptation, for segmentation",
    source="arXiv:2404.09326",
    needs=frozenset({TeacherOutput.TOKENS}),
    params=WecoloraSegmentationParams,
    student=SHORTENED_VIT,
    draws=lambda params: params.generation.images > 0,
    misfit=wecolora.too_high_a_rank,
    task="segmentation",
    stages=(
        wecolora.SHORTEN,
        wecolora.DRAW,
        wecolora.DISTILL_TOKENS.given("synthetic"),
        Stage(
            "fit_heads",
            fit_heads,
            output="trained_student",
            inputs=("support", "teacher", "backbone"),
            params="dense_head",
            weight=0.3,
            version=2,
        ),
        Stage(
            "cross_validate",
            cross_validate,
            output="cross_validation",
            inputs=("support", "teacher", "shortened", "trained_student"),
            optional=("unlabelled", "synthetic"),
            params="distillation",
            shards=folds,
            needed=lambda shape, params: shape.test == 0,
            weight=40.0,
            version=4,
        ),
        replace(stages.TEACHER_GRAPH, run=teacher_graph, inputs=("teacher", "trained_student")),
        replace(
            stages.EXPORT, run=export, inputs=(*stages.EXPORT.inputs, "support"), optional=(), params=None
        ),
        replace(
            stages.EVALUATE,
            run=evaluate,
            inputs=(*stages.EVALUATE.inputs, "teacher_onnx", "support"),
            optional=("unlabelled", "test", "cross_validation", "generator", "synthetic"),
        ),
        replace(stages.BUNDLE, run=bundle),
    ),
    presets=wecolora.METHOD.presets,
)
