"""TINT: a text-to-image diffusion model, specialised on the few labelled images, makes more of them. Declares only.

A token is learnt for each class (textual inversion) and each labelled image is inverted (null-text inversion);
between the two the generator makes new images of the class. The few-shot teacher labels them, those that it does not
take for their class are left out, and the student learns from the rest as in `kd`.

Source: Landolsi & Kahl, "Tiny models from tiny data", arXiv:2406.03146, section 3; Gal et al., arXiv:2208.01618;
Mokady et al., arXiv:2211.09794.

| artefact     | files |
|---|---|
| class_tokens | `tokens.safetensors` "tokens" float32 [V, D]; `tokens.json` template; with LoRA `lora.safetensors` |
| inversions   | `inversions.safetensors`, see `null_text_inversion.Inversions`, and "index" [K]; `inversions.json` |
| synthetic    | as in `models.methods.fsbbt`, with "label", "seed" [n]; "share" is the inverted image's, 1 - alpha |
| selection    | `selection.safetensors` "verdict" [n], see `Verdict`; "probability" [n] of the class asked for |

The first two have one shard a class; "index" are positions among the labelled images.
"""

from __future__ import annotations

from dataclasses import replace
from enum import IntEnum
from typing import Literal

from pydantic import Field

from models import stages
from models.pipeline import JobShape, Method, Params, Stage, StageContext, TeacherOutput

#: Synthetic images of one class that one shard makes.
CHUNK = 256


class TextualInversionParams(Params):
    """The token that is learnt for each class."""

    template: str = Field(
        "a photo of a {}",
        pattern=r"^[^{}]*\{\}[^{}]*$",
        max_length=200,
        description="Prompt; {} is the token.",
    )
    initial_word: str | None = Field(
        "object",
        max_length=100,
        description="Word whose embedding the token starts from. Empty: the class's own name.",
    )
    vectors: int = Field(1, ge=1, le=16, description="Embedding vectors of a token.")
    steps: int = Field(
        600, ge=0, le=50_000, description="Most optimiser steps. 0: the token stays the initial word."
    )
    batch_size: int = Field(16, ge=1, le=256, description="Noised images in a step.")
    lr: float = Field(5e-3, gt=0, le=1, description="AdamW's learning rate.")
    weight_decay: float = Field(1e-2, ge=0, le=1, description="AdamW's decoupled weight decay.")
    least_timestep: int = Field(
        250, ge=0, le=999, description="Lowest diffusion timestep: below, upsampling artefacts are learnt."
    )
    patience: int = Field(
        150,
        ge=0,
        le=50_000,
        description="It stops after so many optimiser steps without a lower loss. Every 25 steps the loss is taken on "
        "draws that stay the same; it counts as lower by a thousandth or more. 0: never.",
    )
    lora_rank: int = Field(
        0,
        ge=0,
        le=128,
        description="Rank of a LoRA of the network's attention, learnt after the token, which then stays as it is, in "
        "as many steps again. 0: none.",
    )


class NullTextInversionParams(Params):
    """How each labelled image is inverted."""

    mode: Literal["ddim", "null_text", "negative_prompt", "none"] = Field(
        "ddim",
        description="ddim: the image's noise, guided by the empty prompt, at once; its new images are of the right "
        "class more often. null_text: the empty prompt's embeddings are optimised so that guidance leads back to the "
        "image, the paper's. negative_prompt: the class's own prompt instead. none: images are made from new noise "
        "and the token alone.",
    )
    steps: int = Field(25, ge=2, le=1000, description="DDIM steps, of the inversion and of the generation.")
    guidance: float | None = Field(
        None, ge=1, le=30, description="Classifier-free guidance. Empty: the generator's own."
    )
    inner_steps: int = Field(10, ge=1, le=500, description="Most optimiser steps at one timestep.")
    lr: float = Field(1e-2, gt=0, le=1, description="Adam's learning rate.")
    tolerance: float = Field(
        1e-5, ge=0, le=1, description="Mean squared error of the latent at which a timestep is done."
    )


class GenerationParams(Params):
    """The images that are made."""

    images_per_class: int = Field(200, ge=1, le=20_000, description="Images made of each class.")
    alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of new noise in the start: 0 gives the labelled image back, 1 forgets its layout. Empty: "
        "another for each image, evenly from 0 to 1.",
    )
    guidance: float | None = Field(
        None,
        ge=1,
        le=30,
        description="Classifier-free guidance. Empty: that of the inversion, else the generator's own.",
    )
    sampler: Literal["ddim", "dpm_solver++"] = Field(
        "ddim", description="ddim, or DPM-Solver++ of second order."
    )
    steps: int | None = Field(
        None, ge=2, le=1000, description="Steps of the sampler. Empty: those of the inversion, else 25."
    )
    batch_size: int = Field(32, ge=1, le=1024, description="Images made at once; halved where memory lacks.")
    size: int | None = Field(
        None,
        ge=28,
        le=1024,
        description="Side in pixels of the images kept. Empty: the generator's, at most 224.",
    )


class SelectionParams(Params):
    """Which of the images the student learns from."""

    least_probability: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="An image is rejected where its class has a lower probability, by the teacher and `head.intended`.",
    )
    most_to_least: float = Field(
        2.0,
        ge=1,
        le=1000,
        description="A class keeps at most so many times the images of the class that has fewest, the surest first.",
    )


class Verdict(IntEnum):
    """What SELECT makes of a synthetic image, and why."""

    KEPT = 0
    UNSURE = 1  # the teacher gives the intended class too low a probability
    SURPLUS = 2  # its class has enough surer ones


class TintParams(Params):
    textual_inversion: TextualInversionParams = Field(
        TextualInversionParams(), description="The token that is learnt for each class."
    )
    null_text_inversion: NullTextInversionParams = Field(
        NullTextInversionParams(), description="How each labelled image is inverted."
    )
    generation: GenerationParams = Field(GenerationParams(), description="The images that are made.")
    teacher: stages.TeacherParams = Field(stages.TeacherParams(), description="What the teacher is shown.")
    head: stages.HeadParams = Field(stages.HeadParams(), description="The teacher's few-shot classifier.")
    selection: SelectionParams = Field(
        SelectionParams(), description="Which of the images the student learns from."
    )
    distillation: stages.DistillationParams = Field(
        stages.DistillationParams(), description="How the student is trained."
    )
    export: stages.ExportParams = Field(stages.ExportParams(), description="The student's file.")
    evaluation: stages.EvaluationParams = Field(stages.EvaluationParams(), description="The report.")


def textual_inversion(context: StageContext, params: TextualInversionParams) -> None:
    from models.generators import generation

    generation.textual_inversion(context, params)


def null_text_inversion(context: StageContext, params: NullTextInversionParams) -> None:
    from models.generators import generation

    generation.null_text_inversion(context, params)


def generate(context: StageContext, params: GenerationParams) -> None:
    from models.generators import generation

    generation.generate(context, params)


def select(context: StageContext, params: SelectionParams) -> None:
    from models.training import selection

    selection.run(context, params)


def chunks_of_a_class(images: int) -> int:
    """Shards that make the images of one class."""
    return -(-images // CHUNK)


def _asked(shape: JobShape, params: TintParams) -> int:
    """Images that the teacher is shown to label them."""
    return shape.support + shape.unlabelled + shape.classes * params.generation.images_per_class


METHOD = Method(
    name="tint",
    title="Textual and null-text inversion",
    source="arXiv:2406.03146",
    needs=frozenset({TeacherOutput.FEATURES}),
    params=TintParams,
    draws=lambda params: True,
    stages=(
        Stage(
            "textual_inversion",
            textual_inversion,
            output="class_tokens",
            inputs=("support", "generator"),
            params="textual_inversion",
            shards=lambda shape, params: shape.classes,
            weight=20.0,
        ),
        Stage(
            "null_text_inversion",
            null_text_inversion,
            output="inversions",
            inputs=("support", "generator", "class_tokens"),
            params="null_text_inversion",
            shards=lambda shape, params: shape.classes,
            needed=lambda shape, params: params.null_text_inversion.mode != "none",
            seeded=False,
            weight=10.0,
        ),
        Stage(
            "generate",
            generate,
            output="synthetic",
            inputs=("generator", "class_tokens"),
            optional=("inversions",),
            params="generation",
            shards=lambda shape, params: (
                shape.classes * chunks_of_a_class(params.generation.images_per_class)
            ),
            weight=20.0,
        ),
        replace(
            stages.ASK.given("synthetic"), shards=lambda shape, params: stages.chunks(_asked(shape, params))
        ),
        stages.LABEL.given("synthetic"),
        Stage(
            "select",
            select,
            output="selection",
            inputs=("soft_labels", "synthetic"),
            params="selection",
            queue="cpu",
            seeded=False,
            weight=0.1,
        ),
        stages.DISTILL.given("synthetic", "selection"),
        stages.CROSS_VALIDATE.given("synthetic", "selection"),
        stages.EXAMINE,
        stages.TEACHER_GRAPH,
        stages.EXPORT,
        stages.EVALUATE.given("teacher_onnx", "cross_validation", "generator", "synthetic", "selection"),
        stages.BUNDLE,
    ),
    presets={
        "draft": {
            "textual_inversion": {"steps": 200},
            "null_text_inversion": {"steps": 15},
            "generation": {"images_per_class": 64, "sampler": "dpm_solver++", "steps": 10},
            "distillation": {"steps": 600},
            "evaluation": {"latency_runs": 20},
        },
        "balanced": {},
        "best": {
            "textual_inversion": {"steps": 2000, "patience": 400},
            "null_text_inversion": {"steps": 50},
            "generation": {"images_per_class": 1000},
            "distillation": {"steps": 10_000, "ema_decay": 0.999},
        },
    },
)
