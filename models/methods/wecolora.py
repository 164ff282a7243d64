"""WeCoLoRA: a shorter vision transformer from one of every r blocks of a teacher's. Declares only.

The student is the teacher without the blocks that matter least (beyond the paper, which keeps them at equal distances).
Low-rank updates of the copied weights are learnt so that the last tokens become the teacher's, on images without
labels; they are folded into the weights, and the teacher's few-shot head is fitted again to the student's features.
Where asked, the last layer of each kept block is fitted in closed form before, to make up for those that are left out.

Source: Grigore et al., "Weight Copy and Low-Rank Adaptation for Few-Shot Distillation of Vision Transformers",
arXiv:2404.09326, section 3. Its reference code was not used.

| artefact        | files |
|---|---|
| shortened       | `shortened.json`: which blocks are kept, and why those |
| synthetic       | as in `models.methods.fsbbt`, of the maker diffusion |
| backbone        | `weights.safetensors`, `backbone.json`: the student without head; `history.json` |
| trained_student | as in `models.stages`; `student.json` has under "backbone" what `backbone.json` has |
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from models import stages
from models.methods.fsbbt import CHUNK, DrawingParams
from models.pipeline import JobShape, Method, Misfit, Params, Stage, StageContext, TeacherOutput
from models.students import SHORTENED_VIT
from models.teachers import TeacherSpec


class BlocksParams(Params):
    """Which of the teacher's blocks the student keeps."""

    rule: Literal["last_of_group", "first_of_group", "influence"] = Field(
        "influence",
        description="influence: blocks are left out one by one, each time the one without which the tokens of your "
        "images change least. last_of_group: of every r blocks the last is kept, as in the paper's figure. "
        "first_of_group: the first, as in its code.",
    )
    r: int = Field(2, ge=2, le=64, description="One block of every r is kept. The paper: 2 and 3.")
    most_parameters: int | None = Field(
        None,
        ge=1,
        description="The student's size without its head, at most. Given, r is the smallest for which that holds.",
    )
    most_latency: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="The student's time for an image at most, as a share of the teacher's, which holds on other "
        "machines, too. Given, r is the smallest for which that is measured: ONNX Runtime, one thread of a CPU, images "
        "of the teacher's own size.",
    )
    images: int = Field(64, ge=1, le=4096, description="Images that influence is measured on, at most.")


class GenerationParams(DrawingParams):
    """Images that are learnt from like unlabelled ones, made by the diffusion model that the order names."""

    images: int = Field(
        0,
        ge=0,
        le=20_000,  # they are held in memory at the student's size, for a moment twice: 3 GB of 224 px
        description="How many, of the classes' names in turn. 0: none, and no generator.",
    )
    size: int | None = Field(
        None,
        ge=28,
        le=1024,
        description="Side in pixels that they are kept at; never more than the generator's own. Empty: that of the "
        "student's images.",
    )


class TokenDistillationParams(Params):
    """How the student is trained."""

    input_size: int | None = Field(
        None,
        ge=28,
        le=1024,
        description="Side in pixels of the student's images; the teacher's tokens are of images of that size. Empty: "
        "the teacher's own. At another size its position embedding is interpolated.",
    )
    adaptation: Literal["enhanced_lora", "lora", "dora", "full", "none"] = Field(
        "enhanced_lora",
        description="enhanced_lora: low-rank updates of q, k, v, proj, fc1 and fc2, the paper's. lora: of q and v. "
        "dora: of all six, with magnitudes. full: all weights are trained. none: nothing is trained, the student is "
        "what it starts from.",
    )
    start: Literal["refitted", "copied", "random"] = Field(
        "copied",
        description="The student's weights at first. copied: the teacher's, as in the paper. refitted: copied, then "
        "the last layer of each block is fitted in closed form, so that its tokens come near to those after the blocks "
        "that it stands for; for little training or none (adaptation none). random: drawn anew, which shows what "
        "copying is worth and asks for adaptation full.",
    )
    rank: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Rank of the updates. Empty: a sixth of the teacher's width (128 of 768, as in the paper).",
    )
    match: Literal["last", "all"] = Field(
        "last", description="Tokens that are compared: after the last block, or after every one."
    )
    views: int = Field(
        8,
        ge=0,
        le=64,
        description="Views of each image: as it is, mirrored, then random crops. The teacher's tokens of each are made "
        "once and kept. 0: new crops at every step, as in the paper; the teacher works at every step, too.",
    )
    smallest_crop: float = Field(0.2, gt=0, le=1, description="Share of the area that a crop keeps at least.")
    memory_mib: int = Field(
        4096,
        ge=0,
        le=1_048_576,
        description="Memory for the teacher's tokens. Those that do not fit are made anew each time.",
    )
    steps: int = Field(
        1000, ge=1, le=200_000, description="Optimiser steps, also of few images: at least 500 are advised."
    )
    batch_size: int = Field(64, ge=2, le=1024, description="Views in a batch.")
    lr: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Highest learning rate of the one-cycle schedule. Empty: 1e-2, of full training 1e-3, "
        "less where the teacher is wider than 192 (a quarter of it at 768).",
    )
    weight_decay: float = Field(0.05, ge=0, le=1, description="AdamW's decoupled weight decay.")

    @model_validator(mode="after")
    def _all_of_random_weights_learn(self) -> Self:
        if self.start == "random" and self.adaptation != "full":
            raise ValueError(
                f"weights drawn at random cannot be adapted by '{self.adaptation}': choose adaptation 'full'"
            )
        return self


class StudentHeadParams(Params):
    """The classifier on the student's features."""

    kind: Literal["as_teacher", "linear_probe"] = Field(
        "as_teacher",
        description="as_teacher: the teacher's kind of head, fitted again. linear_probe: the paper's, a linear layer "
        "on standardised features (multinomial logistic regression).",
    )
    views: int = Field(8, ge=1, le=64, description="Views of each labelled image that it is fitted to.")
    penalty: float = Field(
        1e-2, ge=0, le=100, description="Of the linear probe: weight of its squared coefficients."
    )


class ShorteningParams(Params):
    """What every method has that shortens a vision transformer."""

    blocks: BlocksParams = Field(
        BlocksParams(), description="Which of the teacher's blocks the student keeps."
    )
    generation: GenerationParams = Field(
        GenerationParams(), description="Images that are made to learn from, besides the given ones."
    )
    distillation: TokenDistillationParams = Field(
        TokenDistillationParams(), description="How the student is trained."
    )

    @model_validator(mode="after")
    def _made_as_large_as_learnt(self) -> Self:
        size = self.generation.size or self.distillation.input_size
        object.__setattr__(self, "generation", self.generation.model_copy(update={"size": size}))
        return self


class WecoloraParams(ShorteningParams):
    teacher: stages.TeacherParams = Field(
        stages.TeacherParams(), description="What the teacher is shown for its own classifier."
    )
    head: stages.HeadParams = Field(stages.HeadParams(), description="The teacher's few-shot classifier.")
    student_head: StudentHeadParams = Field(
        StudentHeadParams(), description="The classifier on the student's features."
    )
    export: stages.ExportParams = Field(stages.ExportParams(), description="The student's file.")
    evaluation: stages.EvaluationParams = Field(stages.EvaluationParams(), description="The report.")


def shorten(context: StageContext, params: BlocksParams) -> None:
    from models.training import token_distillation

    token_distillation.shorten(context, params)


def draw(context: StageContext, params: GenerationParams) -> None:
    from models.generators import prompted

    prompted.run_for_tokens(context, params)


def distill_tokens(context: StageContext, params: TokenDistillationParams) -> None:
    from models.training import token_distillation

    token_distillation.distill(context, params)


def refit_head(context: StageContext, params: StudentHeadParams) -> None:
    from models.training import student_head

    student_head.refit(context, params)


def cross_validate(context: StageContext, params: TokenDistillationParams) -> None:
    from models.training import student_head

    student_head.cross_validate(context, params)


def makes_images(shape: JobShape, params: Any) -> bool:
    """Whether a job of a method with a group `generation` makes images to learn from."""
    return bool(params.generation.images > 0)


def too_high_a_rank(params: Any, teacher: TeacherSpec) -> Misfit | None:
    """Updates of a rank that no layer has; the features of a vision transformer are as long as it is wide."""
    rank, most = params.distillation.rank, teacher.embedding_dim
    if rank is None or rank <= most or params.distillation.adaptation in ("full", "none"):
        return None
    return Misfit(
        "distillation.rank",
        f"rank {rank} is more than the width of teacher '{teacher.name}'. Choose at most {most}; usual is a sixth",
    )


SHORTEN = Stage(
    "shorten",
    shorten,
    output="shortened",
    inputs=("teacher",),
    optional=("support", "unlabelled"),
    params="blocks",
    seeded=False,
    weight=0.2,
)
DRAW = Stage(
    "draw",
    draw,
    output="synthetic",
    inputs=("teacher", "generator"),
    optional=("support",),
    params="generation",
    shards=lambda shape, params: -(-params.generation.images // CHUNK),
    needed=makes_images,
    weight=5.0,
)
DISTILL_TOKENS = Stage(
    "distill_tokens",
    distill_tokens,
    output="backbone",
    inputs=("teacher", "shortened"),
    optional=("support", "unlabelled"),
    params="distillation",
    weight=10.0,
    version=3,
)
METHOD = Method(
    name="wecolora",
    title="Weight copy and low-rank adaptation",
    source="arXiv:2404.09326",
    needs=frozenset({TeacherOutput.FEATURES, TeacherOutput.TOKENS}),
    params=WecoloraParams,
    student=SHORTENED_VIT,
    draws=lambda params: params.generation.images > 0,
    misfit=too_high_a_rank,
    stages=(
        SHORTEN,
        stages.ASK,
        stages.LABEL,
        DRAW,
        DISTILL_TOKENS.given("synthetic"),
        Stage(
            "refit_head",
            refit_head,
            output="trained_student",
            inputs=("support", "backbone", "soft_labels"),
            optional=("unlabelled",),
            params="student_head",
            seeded=False,
            weight=0.3,
        ),
        Stage(
            "cross_validate",
            cross_validate,
            output="cross_validation",
            inputs=("support", "teacher", "shortened", "teacher_answers", "soft_labels", "trained_student"),
            optional=("unlabelled", "synthetic"),
            params="distillation",
            shards=stages.folds,
            needed=lambda shape, params: shape.test == 0,
            weight=40.0,
            version=3,
        ),
        stages.EXAMINE,
        stages.TEACHER_GRAPH,
        stages.EXPORT,
        stages.EVALUATE.given("teacher_onnx", "cross_validation", "generator", "synthetic"),
        stages.BUNDLE,
    ),
    presets={
        "draft": {"distillation": {"steps": 300, "views": 4}, "evaluation": {"latency_runs": 20}},
        "balanced": {},
        "best": {"distillation": {"steps": 5000, "views": 16}},
    },
)
