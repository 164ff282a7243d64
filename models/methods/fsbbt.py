"""FS-BBT: few-shot distillation from a black-box teacher, of which only answers are known. Declares only.

The teacher answers the real images; MixUp of pairs and a conditional VAE make many more, which it answers too; the
student learns from all of them. The images need no labels.

Source: Nguyen et al., "Black-box Few-shot Knowledge Distillation", arXiv:2207.12106, section 3 and algorithm 1.

| artefact            | files |
|---|---|
| black_box           | `black_box.json`: classes, how to read answers, what is held out; a network's head |
| real_answers        | `answers.safetensors` "answers" float32 [n, C]: support, then unlabelled |
| cvae                | `weights.safetensors`, `cvae.json`, `history.json` |
| synthetic           | `images.safetensors` "pixels" uint8 [n, 3, S, S]; "kind", "first", "second", "share" [n] |
|                     | and, of the maker diffusion, "label" (-1: none), "seed" [n] |
| chosen              | `chosen.safetensors` "index" [m]: the synthetic images to ask about |
| synthetic_answers   | `answers.safetensors` "answers" float32 [n, C], "index" int64 [n] into all synthetic images |
| soft_labels         | as in `models.stages`, without a head; images: support, unlabelled, synthetic |
| teacher_on_test     | as in `models.stages` |
| teacher_on_held_out | `answers.safetensors` "probabilities" [k, C], "index" [k] into the real images, "labels" [k] |
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from models import stages
from models.pipeline import JobShape, Method, Params, Stage, StageContext, TeacherOutput

#: Synthetic images that one shard makes.
CHUNK = 8192

Maker = Literal["mixup_cvae", "mixup", "cutmix", "mixup_cutmix", "cvae", "diffusion"]


class DrawingParams(Params):
    """The images of the diffusion model that the order names as its generator, where it makes them."""

    template: str = Field(
        "a photo of a {}",
        pattern=r"^[^{}]*\{\}[^{}]*$",
        max_length=200,
        description="Prompt; {} is the name of a class.",
    )
    sampler: Literal["ddim", "dpm_solver++"] = Field(
        "ddim", description="ddim, or DPM-Solver++ of second order."
    )
    steps: int = Field(25, ge=2, le=1000, description="Steps of the sampler.")
    guidance: float = Field(3.0, ge=1, le=30, description="Classifier-free guidance.")
    batch_size: int = Field(32, ge=1, le=1024, description="Images made at once; halved where memory lacks.")


class SynthesisParams(Params):
    """The images that are made from the real ones."""

    images: int = Field(
        20_000,
        ge=0,
        le=1_000_000,
        description="Synthetic images that the teacher answers. The paper: 24,000 at 28 pixels, 40,000 at 32.",
    )
    maker: Maker = Field(
        "mixup_cutmix",
        description="mixup_cutmix: half each; better and cheaper in our measurements. mixup_cvae: MixUp, and the "
        "CVAE's images instead of mixes that are nearly an original, which is the paper's. diffusion: images of the "
        "classes' names, made by the order's generator from no real image.",
    )
    drawing: DrawingParams = Field(DrawingParams(), description="For the maker diffusion.")
    beta: float = Field(1.0, gt=0, le=10, description="Parameter of the Beta distribution of a mix's shares.")
    margin: float = Field(
        0.05, ge=0, lt=0.5, description="A mix whose share of one image is at most this is nearly the other."
    )
    pool: float = Field(
        1.0,
        ge=1,
        le=10,
        description="Images made for each one that is asked about. Above 1, those of which a student of the real "
        "answers is least sure are chosen.",
    )

    @property
    def made(self) -> int:
        """How many images are made, asked about or not."""
        return round(self.images * self.pool)


class CvaeParams(Params):
    """The conditional variational auto-encoder."""

    latent: int = Field(2, ge=1, le=256, description="Length of the latent code.")
    epochs: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Passes over the real images. Empty: 100 for images below 32 pixels, else 600.",
    )
    batch_size: int = Field(64, ge=2, le=1024, description="Images in a batch.")
    lr: float = Field(1e-3, gt=0, le=1, description="Adam's learning rate.")
    outside: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of codes drawn from U[-3, 3] instead of the prior, out of distribution on purpose.",
    )


class BlackBoxParams(Params):
    """What the teacher is asked, and how its answers are read."""

    size: int | None = Field(
        None,
        ge=28,
        le=128,
        description="Side in pixels of the images that are made. Empty: the teacher's, from 28 to 64.",
    )
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="Of a teacher that only names a label: the share of all other classes."
    )
    head: stages.HeadParams = Field(
        stages.HeadParams(),
        description="Of a catalogue teacher: its few-shot classifier, fitted to the labelled images.",
    )
    held_out: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of the real images kept for the report where there is no test split.",
    )


class StudentParams(stages.DistillationParams):
    """How the student is trained on the answers. Images are mixed before they are asked about, so not again here."""

    views: int = Field(1, ge=1, le=1, description="The teacher answers each image as it is.")
    steps: int = Field(4000, ge=1, le=1_000_000, description="Optimiser steps.")
    batch_size: int = Field(128, ge=2, le=1024, description="Images in a batch.")
    weight_decay: float = Field(0.05, ge=0, le=1, description="AdamW's decoupled weight decay.")
    colour: float = Field(
        0.0, ge=0, le=1, description="Strength of random brightness, contrast and saturation."
    )
    mixup: float = Field(0.0, ge=0, le=4, description="MixUp's Beta parameter. 0: no MixUp in the batch.")
    cutmix: float = Field(0.0, ge=0, le=4, description="CutMix's Beta parameter. 0: no CutMix in the batch.")
    support_weight: float = Field(
        0.0, ge=0, le=10, description="Weight of the cross-entropy with the true labels of labelled images."
    )
    support_share: float = Field(0.0, ge=0, le=1, description="Least share of labelled images in a batch.")


class FsbbtParams(Params):
    black_box: BlackBoxParams = Field(
        BlackBoxParams(), description="What the teacher is asked, and how its answers are read."
    )
    synthesis: SynthesisParams = Field(SynthesisParams(), description="The images that are made.")
    cvae: CvaeParams = Field(CvaeParams(), description="The generator of images that are no mixes.")
    distillation: StudentParams = Field(StudentParams(), description="How the student is trained.")
    export: stages.ExportParams = Field(stages.ExportParams(), description="The student's file.")
    evaluation: stages.EvaluationParams = Field(stages.EvaluationParams(), description="The report.")


def introduce(context: StageContext, params: BlackBoxParams) -> None:
    from models.teachers import black_box_questions

    black_box_questions.introduce(context, params)


def ask_real(context: StageContext, params: None) -> None:
    from models.teachers import black_box_questions

    black_box_questions.ask_real(context)


def train_cvae(context: StageContext, params: CvaeParams) -> None:
    from models.generators import cvae

    cvae.run(context, params)


def synthesise(context: StageContext, params: SynthesisParams) -> None:
    from models.generators import prompted, synthesis

    maker = prompted if params.maker == "diffusion" else synthesis
    maker.run(context, params)


def choose(context: StageContext, params: SynthesisParams) -> None:
    from models.generators import choice

    choice.run(context, params)


def ask_synthetic(context: StageContext, params: None) -> None:
    from models.teachers import black_box_questions

    black_box_questions.ask_synthetic(context)


def collect(context: StageContext, params: None) -> None:
    from models.teachers import black_box_questions

    black_box_questions.collect(context)


def hold_out(context: StageContext, params: None) -> None:
    from models.teachers import black_box_questions

    black_box_questions.hold_out(context)


def examine(context: StageContext, params: None) -> None:
    from models.teachers import black_box_questions

    black_box_questions.examine(context)


def queries(shape: JobShape, params: FsbbtParams) -> int:
    """How many questions a job puts to its teacher if none was answered before."""
    return shape.support + shape.unlabelled + params.synthesis.images + shape.test


def _parts(images: int) -> int:
    return -(-images // CHUNK)


def _draws(params: FsbbtParams) -> bool:
    return params.synthesis.images > 0 and params.synthesis.maker == "diffusion"


def _needs_cvae(shape: JobShape, params: FsbbtParams) -> bool:
    return params.synthesis.images > 0 and params.synthesis.maker in ("mixup_cvae", "cvae")


METHOD = Method(
    name="fsbbt",
    title="Few-shot distillation from a black box",
    source="arXiv:2207.12106",
    needs=frozenset({TeacherOutput.LABELS}),
    params=FsbbtParams,
    queries=queries,
    draws=_draws,
    stages=(
        Stage(
            "introduce",
            introduce,
            output="black_box",
            inputs=("teacher",),
            optional=("support", "unlabelled", "test"),
            params="black_box",
            seeded=False,
            weight=0.2,
            version=2,
        ),
        Stage(
            "ask_real",
            ask_real,
            output="real_answers",
            inputs=("teacher", "black_box"),
            optional=("support", "unlabelled"),
            shards=lambda shape, params: stages.chunks(shape.support + shape.unlabelled),
            seeded=False,
            asks=True,
            weight=1.0,
        ),
        Stage(
            "train_cvae",
            train_cvae,
            output="cvae",
            inputs=("black_box", "real_answers"),
            optional=("support", "unlabelled"),
            params="cvae",
            needed=_needs_cvae,
            weight=4.0,
        ),
        Stage(
            "synthesise",
            synthesise,
            output="synthetic",
            inputs=("black_box",),
            optional=("support", "unlabelled", "cvae", "generator"),
            params="synthesis",
            shards=lambda shape, params: _parts(params.synthesis.made),
            needed=lambda shape, params: params.synthesis.images > 0,
            weight=1.0,
        ),
        Stage(
            "choose",
            choose,
            output="chosen",
            inputs=("black_box", "real_answers", "synthetic", "student"),
            optional=("support", "unlabelled"),
            params="synthesis",
            needed=lambda shape, params: params.synthesis.images > 0 and params.synthesis.pool > 1,
            weight=3.0,
        ),
        Stage(
            "ask_synthetic",
            ask_synthetic,
            output="synthetic_answers",
            inputs=("teacher", "black_box", "synthetic"),
            optional=("chosen",),
            shards=lambda shape, params: _parts(params.synthesis.images),
            needed=lambda shape, params: params.synthesis.images > 0,
            seeded=False,
            asks=True,
            weight=4.0,
        ),
        Stage(
            "collect",
            collect,
            output="soft_labels",
            inputs=("black_box", "real_answers"),
            optional=("support", "unlabelled", "synthetic_answers"),
            queue="cpu",
            seeded=False,
            weight=0.1,
        ),
        stages.DISTILL.given("synthetic"),
        Stage(
            "hold_out",
            hold_out,
            output="teacher_on_held_out",
            inputs=("black_box", "real_answers"),
            optional=("support", "unlabelled"),
            needed=lambda shape, params: shape.test == 0,
            queue="cpu",
            seeded=False,
            weight=0.1,
        ),
        Stage(
            "examine",
            examine,
            output="teacher_on_test",
            inputs=("test", "teacher", "black_box"),
            shards=lambda shape, params: stages.chunks(shape.test),
            needed=lambda shape, params: shape.test > 0,
            seeded=False,
            asks=True,
            weight=0.5,
        ),
        stages.EXPORT.given("black_box"),
        stages.EVALUATE.given("black_box", "teacher_on_held_out", "generator", "synthetic"),
        stages.BUNDLE,
    ),
    presets={
        "draft": {
            "synthesis": {"images": 2000},
            "cvae": {"epochs": 100},
            "distillation": {"steps": 1000},
            "evaluation": {"latency_runs": 20},
        },
        "balanced": {},
        "best": {"synthesis": {"images": 40_000}, "distillation": {"steps": 12_000, "ema_decay": 0.998}},
    },
)
