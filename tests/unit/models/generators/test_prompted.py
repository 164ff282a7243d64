"""Images of the classes' names, by a tiny random diffusion model: noise, but of the right class and seed."""

from __future__ import annotations

import torch

from models.data import images
from models.generators import Kind, prompted
from models.generators.diffusion import Diffusion
from models.generators.shards import Generated
from models.methods.fsbbt import DrawingParams

CLASSES = ("red", "washer", "blue")
QUICK = DrawingParams(steps=2, batch_size=4)


def drawn(model: Diffusion, index: range, params: DrawingParams = QUICK) -> Generated:
    prompts, known = prompted.embed(model, CLASSES, params.template)
    return prompted.draw(model, prompts, known, index, 32, params, seed=0)


def test_classes_take_turns_and_an_unknown_name_gives_way_to_a_neutral_word(model: Diffusion) -> None:
    prompts, known = prompted.embed(model, CLASSES, "a photo of a {}")
    with torch.no_grad():
        for row, text in zip(
            prompts, ("a photo of a red", "a photo of a object", "a photo of a blue"), strict=True
        ):
            assert torch.equal(row, model.embed_prompts(model.prompt(text))[0])
    assert known.tolist() == [True, False, True]
    made = drawn(model, range(5))
    assert made.label.tolist() == [0, -1, 2, 0, -1]
    assert made.pixels.shape == (5, 3, 32, 32)
    assert set(made.kind.tolist()) == {Kind.DIFFUSION}
    assert {*made.first.tolist(), *made.second.tolist()} == {-1}


def test_images_made_alone_are_those_made_with_the_others(model: Diffusion) -> None:
    everything, part = drawn(model, range(6)), drawn(model, range(3, 5))
    assert torch.equal(part.seed, everything.seed[3:5])
    assert (part.pixels.int() - everything.pixels[3:5].int()).abs().max() <= 1
    assert len(set(everything.seed.tolist())) == 6


def test_an_image_can_be_made_again_from_its_seed_and_class(model: Diffusion) -> None:
    made = drawn(model, range(3))
    start = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(int(made.seed[2])))
    prompt = model.embed_prompts(model.prompt("a photo of a blue")).detach()
    latents = model.sample(
        start, prompt, model.unconditional()[None], steps=QUICK.steps, guidance=QUICK.guidance
    )
    again = images.to_pixels(images.resize(model.decode(latents), 32))
    assert (again[0].int() - made.pixels[2].int()).abs().max() <= 1


def test_the_sampler_is_the_one_asked_for(model: Diffusion) -> None:
    other = QUICK.model_copy(update={"sampler": "dpm_solver++"})
    assert not torch.equal(drawn(model, range(2)).pixels, drawn(model, range(2), other).pixels)
