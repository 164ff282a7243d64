"""The stages that methods share, and their parameters. Declares only: torch is imported inside the bodies.

An artefact is a folder; what lies in it:

| artefact         | files |
|---|---|
| teacher_answers  | `answers.safetensors` "features" [n, D], "image" [n], "view" [n, 5]; `answers.json` |
| soft_labels      | `soft_labels.safetensors` (logits), `soft_labels.json` (classes); `head.safetensors`, `head.json` |
| trained_student  | `student.json`, `weights.safetensors`, `history.json` |
| cross_validation | `predictions.safetensors` "student", "teacher" [n, C] probabilities, "labels", "index" [n] |
| teacher_on_test  | `probabilities.safetensors` "probabilities" [n, C], "labels" [n] |
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from models.pipeline import JobShape, Params, Stage, StageContext

#: Images that one shard of ASK or EXAMINE shows to the teacher.
CHUNK = 1024
#: Folds of the cross-validation, where every class has that many images.
FOLDS = 5


class TeacherParams(Params):
    """What the teacher is shown."""

    input_size: int | None = Field(
        None,
        ge=32,
        le=1024,
        description="Side in pixels of the images the teacher sees. Empty: its own size.",
    )
    views: int = Field(
        8,
        ge=1,
        le=64,
        description="Views of each labelled image that the teacher labels: as it is, mirrored, then random crops.",
    )
    unlabelled_views: int = Field(
        1, ge=1, le=16, description="Views of each unlabelled image that the teacher labels."
    )


class HeadParams(Params):
    """The classifier that is fitted to the teacher's features of the labelled images."""

    head: Literal["ridge", "prototypes"] = Field(
        "ridge", description="Ridge regression, or the class means (prototypes), on normalised features."
    )
    ridge_lambda: float = Field(1.0, gt=0, le=100, description="Strength of the ridge penalty.")
    logit_scale: float = Field(12.0, gt=0, le=100, description="Factor from the head's scores to logits.")
    rounds: int = Field(
        6,
        ge=0,
        le=100,
        description="Rounds of self-training, where there are unlabelled images: the head is fitted again to the "
        "labelled images and to its own soft labels of the unlabelled ones. 0: labelled images only.",
    )
    unlabelled_weight: float = Field(
        3.0,
        gt=0,
        le=100,
        description="Weight of all unlabelled images together in those rounds; all labelled ones weigh 1.",
    )
    intended: float = Field(
        6.0,
        ge=0,
        le=50,
        description="Added to the logit of the class that a synthetic image was made for: it is that more often than "
        "not. 0: the teacher alone decides.",
    )


class DistillationParams(Params):
    """How the student is trained."""

    input_size: int | None = Field(
        None,
        ge=28,
        le=224,
        description="Side in pixels of the student's images. Empty: the student's own size.",
    )
    views: int = Field(
        2,
        ge=1,
        le=64,
        description="Views of each image that the student is shown, the first of those that the teacher labels. "
        "The first two show all of the image; crops from the third on help the head more than a small student.",
    )
    steps: int = Field(3000, ge=1, le=200_000, description="Optimiser steps.")
    batch_size: int = Field(64, ge=2, le=1024, description="Images in a batch.")
    lr: float = Field(4e-3, gt=0, le=1, description="Highest learning rate of the one-cycle schedule.")
    weight_decay: float = Field(0.3, ge=0, le=1, description="AdamW's decoupled weight decay.")
    temperature: float = Field(4.0, gt=0, le=20, description="Softens the teacher's and student's logits.")
    kd_weight: float = Field(1.0, ge=0, le=10, description="Weight of the divergence from the teacher.")
    support_weight: float = Field(
        0.3,
        ge=0,
        le=10,
        description="Weight of the cross-entropy with the true labels of the labelled images.",
    )
    support_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Least share of labelled images in a batch, where there are unlabelled ones.",
    )
    crop: float = Field(
        0.0, ge=0, lt=1, description="Random crops keep at least 1 - this share of the area. 0: shifts only."
    )
    shift: float = Field(0.125, ge=0, le=0.5, description="Random shifts, as a share of the image's side.")
    flip: bool = Field(True, description="Mirror half of the images. Switch off where left and right matter.")
    colour: float = Field(
        0.2, ge=0, le=1, description="Strength of random brightness, contrast and saturation."
    )
    erase: float = Field(0.0, ge=0, le=1, description="Share of images with one random rectangle greyed out.")
    mixup: float = Field(0.4, ge=0, le=4, description="MixUp's Beta parameter. 0: no MixUp.")
    cutmix: float = Field(1.0, ge=0, le=4, description="CutMix's Beta parameter. 0: no CutMix.")
    mix_share: float = Field(0.5, ge=0, le=1, description="Share of batches that MixUp or CutMix changes.")
    ema_decay: float = Field(
        0.995,
        ge=0,
        lt=1,
        description="Decay of the running average of the weights that is kept. 0: last weights.",
    )


class ExportParams(Params):
    """The student's file."""

    int8: bool = Field(False, description="Also try an int8 file, by static quantisation.")
    max_accuracy_drop: float = Field(
        0.01, ge=0, le=1, description="The int8 file is kept if it loses at most this share of the answers."
    )


class EvaluationParams(Params):
    """The report."""

    latency_runs: int = Field(50, ge=5, le=1000, description="Timed runs of each network, one image each.")


def ask(context: StageContext, params: TeacherParams) -> None:
    from models.teachers import questions

    questions.ask(context, params)


def label(context: StageContext, params: HeadParams) -> None:
    from models.teachers import labelling

    labelling.label(context, params)


def distill(context: StageContext, params: DistillationParams) -> None:
    from models.training import distillation

    distillation.distill(context, params)


def cross_validate(context: StageContext, params: DistillationParams) -> None:
    from models.training import cross_validation

    cross_validation.cross_validate(context, params)


def examine(context: StageContext, params: None) -> None:
    from models.teachers import questions

    questions.examine(context)


def teacher_graph(context: StageContext, params: None) -> None:
    from models.export import teacher_graph

    teacher_graph.run(context, params)


def export(context: StageContext, params: ExportParams) -> None:
    from models.export import onnx_graph

    onnx_graph.run(context, params)


def evaluate(context: StageContext, params: EvaluationParams) -> None:
    from models.evaluation import report

    report.run(context, params)


def bundle(context: StageContext, params: None) -> None:
    from models.export import bundle

    bundle.run(context, params)


def chunks(images: int) -> int:
    return -(-images // CHUNK)


def folds(shape: JobShape, params: Any) -> int:
    """Every fold must leave each class an image to learn from and hold one of it back."""
    return max(2, min(FOLDS, shape.smallest_class))


ASK = Stage(
    "ask",
    ask,
    output="teacher_answers",
    inputs=("support", "teacher"),
    optional=("unlabelled",),
    params="teacher",
    shards=lambda shape, params: chunks(shape.support + shape.unlabelled),
    seeded=False,
    weight=2.0,
    version=2,
)
LABEL = Stage(
    "label",
    label,
    output="soft_labels",
    inputs=("support", "teacher", "teacher_answers"),
    optional=("unlabelled",),
    params="head",
    queue="cpu",
    seeded=False,
    weight=0.1,
    version=2,
)
DISTILL = Stage(
    "distill",
    distill,
    output="trained_student",
    inputs=("student", "soft_labels"),
    optional=("support", "unlabelled"),
    params="distillation",
    weight=10.0,
)
CROSS_VALIDATE = Stage(
    "cross_validate",
    cross_validate,
    output="cross_validation",
    inputs=("support", "student", "teacher_answers", "soft_labels"),
    optional=("unlabelled",),
    params="distillation",
    shards=folds,
    needed=lambda shape, params: shape.test == 0,
    weight=40.0,
    version=2,
)
EXAMINE = Stage(
    "examine",
    examine,
    output="teacher_on_test",
    inputs=("test", "teacher", "soft_labels"),
    shards=lambda shape, params: chunks(shape.test),
    needed=lambda shape, params: shape.test > 0,
    seeded=False,
    weight=0.5,
)
TEACHER_GRAPH = Stage(
    "teacher_graph",
    teacher_graph,
    output="teacher_onnx",
    inputs=("teacher", "soft_labels"),
    queue="cpu",
    seeded=False,
    weight=0.3,
)
EXPORT = Stage(
    "export",
    export,
    output="student_onnx",
    inputs=("trained_student", "teacher"),
    optional=("support", "unlabelled"),
    params="export",
    queue="cpu",
    seeded=False,
    weight=0.3,
)
EVALUATE = Stage(
    "evaluate",
    evaluate,
    output="report",
    inputs=("student_onnx", "trained_student", "teacher", "student"),
    optional=("support", "unlabelled", "test", "teacher_on_test"),
    params="evaluation",
    queue="cpu",
    seeded=False,
    weight=0.5,
    version=2,
)
BUNDLE = Stage(
    "bundle",
    bundle,
    output="bundle",
    inputs=("student_onnx", "report", "trained_student", "teacher"),
    optional=("support", "unlabelled", "test"),
    queue="cpu",
    seeded=False,
    weight=0.1,
    version=2,
)
