"""A latent diffusion model in Stable Diffusion's format, against diffusers' own pipeline and the papers' equations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.errors import DataError, GeneratorError
from models.generators import diffusion, diffusion_folder
from models.generators.diffusion import Batches, Diffusion, blend, psnr
from tests import tiny_diffusion

PROMPT = "a photo of a {}"
NO_MACHINE_HAS = 2**60  # bytes


def noise(model: Diffusion, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def conditions(model: Diffusion, *words: str) -> Tensor:
    with torch.no_grad():
        return model.embed_prompts(model.prompt(PROMPT), torch.stack([model.rows_of(word) for word in words]))


def nulls(model: Diffusion, count: int) -> Tensor:
    return model.unconditional()[None].expand(count, -1, -1, -1)


# Images and latents


def test_images_of_any_size_are_encoded_at_the_models_resolution(model: Diffusion) -> None:
    for shape in ((5, 7), (16, 16), (70, 31)):
        images = torch.rand(2, 3, *shape)
        latents = model.encode(images)
        assert latents.shape == (2, *model.latent_shape)
        assert model.decode(latents).shape == (2, 3, model.resolution, model.resolution)
    assert float(model.decode(100 * latents).max()) <= 1
    assert float(model.decode(100 * latents).min()) >= 0


@pytest.mark.parametrize("vae", ["kl", "tiny"])
def test_latents_are_the_autoencoders_code_scaled(tmp_path: Path, vae: Any) -> None:
    model = diffusion.load(tiny_diffusion.write(tmp_path, vae=vae))
    model.vae.register_to_config(scaling_factor=0.5)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        code = model.vae.encode(2 * images - 1)
        wanted = code.latents if vae == "tiny" else code.latent_dist.mean
        decoded = model.vae.decode(wanted).sample
    assert torch.allclose(model.encode(images), wanted / 2, atol=1e-6)
    assert torch.allclose(model.decode(wanted / 2), ((decoded + 1) / 2).clamp(0, 1), atol=1e-6)


def test_images_in_batches_are_encoded_and_decoded_as_one_by_one(model: Diffusion) -> None:
    images = torch.rand(5, 3, 16, 16)
    latents = model.encode_all(images, batch_size=2)
    alone = torch.cat([model.encode(image[None]) for image in images])
    assert torch.allclose(latents, alone, atol=1e-5)
    assert torch.allclose(model.decode_all(latents, batch_size=2), model.decode(alone), atol=1e-5)


def test_images_that_are_no_floats_or_have_no_three_planes_are_refused(model: Diffusion) -> None:
    with pytest.raises(DataError, match=r"torch\.uint8"):
        model.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"\[1, 1, 16, 16\]"):
        model.encode(torch.zeros(1, 1, 16, 16))


# Prompts


def test_an_embedded_prompt_is_what_the_text_encoder_says_of_the_same_words(model: Diffusion) -> None:
    ids = model.tokenizer("a photo of a red", padding="max_length", return_tensors="pt").input_ids
    ids = torch.cat([torch.tensor([[model.tokenizer.bos_token_id]]), ids[:, :5]], 1)
    end = torch.tensor([[model.tokenizer.eos_token_id]])
    padding = torch.full((1, model.context - 7), model.tokenizer.pad_token_id)
    ids = torch.cat([ids, end, padding], 1)
    assert torch.equal(model.prompt("a photo of a red").ids, ids[0])
    with torch.no_grad():
        wanted = model.text_encoder(ids).last_hidden_state
    assert torch.allclose(conditions(model, "red"), wanted, atol=1e-6)
    assert torch.allclose(model.embed_prompts(model.prompt("a photo of a red")), wanted, atol=1e-6)


def test_learned_tokens_stand_where_the_template_says(model: Diffusion) -> None:
    prompt = model.prompt("photo of {} the object", vectors=3)
    assert prompt.places.tolist() == [3, 4, 5]
    assert model.tokenizer.convert_ids_to_tokens(prompt.ids[6:8].tolist()) == ["the", "object"]
    assert int(prompt.ids[8]) == model.tokenizer.eos_token_id


def test_prompts_embedded_together_are_as_each_alone(model: Diffusion) -> None:
    together = conditions(model, "red", "blue", "object")
    for row, word in zip(together, ("red", "blue", "object"), strict=True):
        assert torch.allclose(row, conditions(model, word)[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_gradients_reach_the_learned_tokens_and_nothing_else(model: Diffusion) -> None:
    tokens = model.rows_of("red")[None].requires_grad_()
    before = model.text_encoder.get_input_embeddings().weight.clone()
    output = model.predict(noise(model, 1), 500, model.embed_prompts(model.prompt(PROMPT), tokens))
    output.square().sum().backward()
    assert tokens.grad is not None
    assert float(tokens.grad.abs().min()) > 0
    for part in (model.unet, model.vae, model.text_encoder):
        assert all(weight.grad is None for weight in part.parameters())
    assert torch.equal(model.text_encoder.get_input_embeddings().weight, before)


def test_a_prompt_longer_than_the_encoders_context_is_refused(model: Diffusion) -> None:
    assert len(model.prompt("a photo of a {}", vectors=6).ids) == model.context
    with pytest.raises(GeneratorError, match="has 13 tokens; the text encoder reads 12"):
        model.prompt("a photo of a {}", vectors=7)
    with pytest.raises(GeneratorError, match="reads 12"):
        model.prompt("a photo of a " + "red " * 20)


def test_a_template_with_two_places_or_a_token_too_few_is_refused(model: Diffusion) -> None:
    with pytest.raises(GeneratorError, match="has 2 places"):
        model.prompt("a {} of a {}")
    with pytest.raises(GeneratorError, match="none were given"):
        model.embed_prompts(model.prompt(PROMPT))


def test_a_token_starts_from_the_words_embedding(model: Diffusion) -> None:
    table = model.text_encoder.get_input_embeddings().weight
    red, blue = (table[model.tokenizer.convert_tokens_to_ids(word)] for word in ("red", "blue"))
    assert torch.equal(model.rows_of("Red"), red[None])
    assert torch.equal(model.rows_of("red blue", vectors=2), torch.stack([red, blue]))
    assert torch.allclose(model.rows_of("red blue"), ((red + blue) / 2)[None])
    assert torch.equal(model.rows_of("red", vectors=3), red.repeat(3, 1))


@pytest.mark.parametrize("name", ["washer", "red washer", "", "???"])
def test_a_word_that_the_tokenizer_does_not_know_gives_way_to_object(model: Diffusion, name: str) -> None:
    assert not model.knows(name)
    assert torch.equal(model.rows_of(name), model.rows_of("object"))


def test_a_tokenizer_without_the_neutral_word_says_so(
    model: Diffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusion, "NEUTRAL_WORD", "thing")
    with pytest.raises(GeneratorError, match="neither 'washer' nor 'thing'"):
        model.rows_of("washer")


# The schedule


def kept_signal(model: Diffusion) -> np.ndarray:
    """Alpha-bar at every timestep, in float64, of the schedule "scaled_linear"."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


def moved(model: Diffusion, latents: Tensor, output: Tensor, start: int, end: int) -> Tensor:
    """A DDIM step between two timesteps (Song et al., arXiv:2010.02502, equation 12 with sigma 0), in float64.

    Before the first timestep the signal kept is that at 0 (`set_alpha_to_one` is off).
    """
    kept = kept_signal(model)
    here, there = kept[max(start, 0)], kept[max(end, 0)]
    latents, output = latents.double(), output.double()
    if model.schedule["prediction_type"] == "epsilon":
        image, error = (latents - (1 - here) ** 0.5 * output) / here**0.5, output
    else:
        image = here**0.5 * latents - (1 - here) ** 0.5 * output
        error = here**0.5 * output + (1 - here) ** 0.5 * latents
    return there**0.5 * image + (1 - there) ** 0.5 * error


def test_noised_latents_and_what_is_to_be_predicted_follow_the_papers(either_model: Diffusion) -> None:
    """v = alpha noise - sigma z: Salimans & Ho, arXiv:2202.00512, appendix D."""
    latents, drawn = noise(either_model, 3, 1), noise(either_model, 3, 2)
    times = torch.tensor([0, 250, 999])
    noisy, wanted = either_model.noised(latents, drawn, times)
    kept = torch.from_numpy(kept_signal(either_model))[times].view(-1, 1, 1, 1)
    assert torch.allclose(noisy.double(), kept.sqrt() * latents + (1 - kept).sqrt() * drawn, atol=1e-4)
    velocity = kept.sqrt() * drawn - (1 - kept).sqrt() * latents
    predicts_noise = either_model.schedule["prediction_type"] == "epsilon"
    assert torch.allclose(wanted.double(), drawn.double() if predicts_noise else velocity, atol=1e-4)


def test_guided_ddim_steps_are_those_of_the_paper(either_model: Diffusion) -> None:
    """Against its equation in float64, with the two predictions made one at a time."""
    model, count, guidance = either_model, 2, 7.5
    prompts, empty = conditions(model, "red", "blue"), nulls(model, count)
    wanted = noise(model, count)
    times = [801, 601, 401, 201, 1]
    assert model.timesteps(5) == times
    with torch.no_grad():
        for time in times:
            without = model.predict(wanted.float(), time, empty[:, 0])
            with_ = model.predict(wanted.float(), time, prompts)
            wanted = moved(model, wanted, without + guidance * (with_ - without), time, time - 200)
    found = model.sample(noise(model, count), prompts, empty, steps=5, guidance=guidance)
    assert torch.allclose(found.double(), wanted.double(), rtol=1e-3, atol=1e-3)


def reference_sample(folder: Path, model: Diffusion, solver: str, steps: int, guidance: float) -> Tensor:
    """diffusers' own pipeline on the same checkpoint."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
        vae=model.vae,
        unet=model.unet,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        scheduler=DDIMScheduler.from_config(dict(model.schedule), clip_sample=False),
    )
    pipeline.set_progress_bar_config(disable=True)
    timing: dict[str, Any] = {"num_inference_steps": steps}
    if solver == "dpm_solver++":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(dict(model.schedule))
        timing = {"timesteps": model.timesteps(steps)}
    latents: Tensor = pipeline(
        prompt_embeds=conditions(model, "red", "blue"),
        negative_prompt_embeds=nulls(model, 2)[:, 0],
        latents=noise(model, 2),
        guidance_scale=guidance,
        output_type="latent",
        height=model.resolution,
        width=model.resolution,
        **timing,
    ).images
    return latents


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver++"])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_samples_are_those_of_diffusers_own_pipeline(
    either_model: Diffusion,
    random_folder: Path,
    velocity_folder: Path,
    solver: diffusion.Solver,
    guidance: float,
) -> None:
    folder = random_folder if either_model.schedule["prediction_type"] == "epsilon" else velocity_folder
    wanted = reference_sample(folder, either_model, solver, 8, guidance)
    found = either_model.sample(
        noise(either_model, 2),
        conditions(either_model, "red", "blue"),
        nulls(either_model, 2),
        steps=8,
        guidance=guidance,
        solver=solver,
    )
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_a_trailing_schedule_is_kept_and_any_other_becomes_leading(tmp_path: Path) -> None:
    trailing = diffusion.load(tiny_diffusion.write(tmp_path / "trailing", timestep_spacing="trailing"))
    assert trailing.timesteps(4) == [999, 749, 499, 249]
    evenly = diffusion.load(tiny_diffusion.write(tmp_path / "linspace", timestep_spacing="linspace"))
    assert evenly.timesteps(4) == [751, 501, 251, 1]


def test_more_steps_than_the_model_has_timesteps_are_refused(model: Diffusion) -> None:
    with pytest.raises(GeneratorError, match="1001 steps were asked for; 1 to 1000"):
        model.timesteps(1001)


def test_samples_in_batches_are_those_made_one_by_one(model: Diffusion) -> None:
    start, prompts = noise(model, 5), conditions(model, "red", "blue", "green", "red", "object")
    empty = nulls(model, 5) + 0.1 * torch.randn(5, 4, 1, 1, generator=torch.Generator().manual_seed(3))

    def made(rows: slice, batch_size: int) -> Tensor:
        return model.sample(
            start[rows], prompts[rows], empty[rows], steps=4, guidance=3.0, batch_size=batch_size
        )

    alone = torch.cat([made(slice(row, row + 1), 1) for row in range(5)])
    assert torch.allclose(made(slice(None), 5), alone, atol=1e-4)
    assert torch.allclose(made(slice(None), 2), alone, atol=1e-4)


def test_a_sampler_of_other_steps_takes_the_null_embeddings_nearest_in_time(model: Diffusion) -> None:
    """Of an inversion over 4 steps, at 751, 501, 251 and 1; a sampler over 2 steps, at 501 and 1, takes 2 of them."""
    random = torch.randn(1, 4, model.context, model.width, generator=torch.Generator().manual_seed(0))
    prompts = conditions(model, "red")
    found = model.sample(noise(model, 1), prompts, random, steps=2, guidance=5.0)
    wanted = model.sample(noise(model, 1), prompts, random[:, [1, 3]], steps=2, guidance=5.0)
    other = model.sample(noise(model, 1), prompts, random[:, [0, 2]], steps=2, guidance=5.0)
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, other, atol=1e-3)


# Blending, quality


def test_blending_restores_the_norm(model: Diffusion) -> None:
    start, drawn = 3 * noise(model, 3, 1), noise(model, 3, 2)
    share = torch.tensor([0.0, 0.3, 1.0])
    mixed = blend(start, drawn, share)
    assert torch.allclose(mixed[0], start[0], atol=1e-5)
    assert torch.allclose(mixed[2], drawn[2], atol=1e-5)
    for row, (z, n, a) in enumerate(zip(start.numpy(), drawn.numpy(), share.tolist(), strict=True)):
        straight = (1 - a) * z + a * n
        wanted = (1 - a) * np.sqrt(np.mean(z**2)) + a * np.sqrt(np.mean(n**2))
        expected = straight / np.sqrt(np.mean(straight**2)) * wanted
        assert mixed[row].numpy() == pytest.approx(expected, abs=1e-4)
    assert torch.allclose(blend(start, drawn, 0.3)[1], mixed[1])


def test_psnr_is_ten_times_the_logarithm_of_peak_over_error() -> None:
    images = torch.zeros(2, 3, 4, 4)
    others = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert psnr(images, others).tolist() == pytest.approx([20.0, 40.0])


# Memory


def test_where_memory_is_full_the_batch_halves_and_the_work_goes_on() -> None:
    """The allocator really refuses."""
    tried = []

    def work(rows: slice) -> list[int]:
        tried.append(rows.stop - rows.start)
        if rows.stop - rows.start > 2:
            torch.empty(NO_MACHINE_HAS, dtype=torch.uint8)
        return list(range(rows.start, rows.stop))

    batches = Batches(8)
    parts = list(batches.of(7, work))
    assert parts == [[0], [1], [2], [3], [4], [5], [6]] or parts == [[0, 1], [2, 3], [4, 5], [6]]
    assert tried[0] == 7
    assert batches.size <= 2
    tried.clear()
    list(batches.of(7, work))
    assert max(tried) <= 2


def test_samples_are_made_in_smaller_batches_where_memory_is_full(model: Diffusion) -> None:
    """The allocator refuses more than two images at once: four rows, with and without the prompt."""
    start, prompts = noise(model, 5), conditions(model, "red", "blue", "green", "red", "object")
    most = [4]

    def refuse(module: Any, inputs: Any) -> None:
        if len(inputs[0]) > most[0]:
            torch.empty(NO_MACHINE_HAS, dtype=torch.uint8)

    def made() -> Tensor:
        return model.sample(start, prompts, nulls(model, 5), steps=2, guidance=3.0)

    whole = made()
    model.unet.register_forward_pre_hook(refuse)
    assert torch.allclose(made(), whole, atol=1e-4)
    most[0] = 1
    with pytest.raises(GeneratorError, match="does not hold the work on one image"):
        made()


def test_where_a_single_image_does_not_fit_the_error_says_so() -> None:
    with pytest.raises(GeneratorError, match="memory does not hold the work on one image"):
        list(Batches(4).of(4, lambda rows: torch.empty(NO_MACHINE_HAS, dtype=torch.uint8)))


def test_other_errors_are_not_taken_for_full_memory() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        list(Batches(4).of(4, lambda rows: torch.zeros(2) + torch.zeros(3)))


# Folders


@pytest.fixture
def folder(random_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_folder, tmp_path / "checkpoint"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def weights(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(GeneratorError, match=f"has no {part}/"):
        diffusion.load(folder)


def another_unet(folder: Path) -> None:
    change(folder / "unet/config.json", _class_name="UNet2DModel")


def another_vae(folder: Path) -> None:
    change(folder / "vae/config.json", _class_name="VQModel")


def another_text_encoder(folder: Path) -> None:
    change(folder / "text_encoder/config.json", architectures=["T5EncoderModel"])


def an_sdxl_unet(folder: Path) -> None:
    change(folder / "unet/config.json", addition_embed_type="text_time")


def an_inpainting_unet(folder: Path) -> None:
    change(folder / "unet/config.json", in_channels=9)


def wider_conditions(folder: Path) -> None:
    change(folder / "unet/config.json", cross_attention_dim=1024)


def a_flow(folder: Path) -> None:
    change(folder / "scheduler/scheduler_config.json", prediction_type="flow_prediction")


def no_json(folder: Path) -> None:
    (folder / "vae/config.json").write_text("{")


def a_list(folder: Path) -> None:
    (folder / "vae/config.json").write_text("[]")


def no_size(folder: Path) -> None:
    change(folder / "unet/config.json", sample_size=None)


def pickled(folder: Path) -> None:
    path = weights(folder, "unet")
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def quantised(folder: Path) -> None:
    path = weights(folder, "unet")
    tensors = load_file(path)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].to(torch.int8)
    save_file(tensors, path, metadata={"format": "pt"})


def cut_off(folder: Path) -> None:
    path = weights(folder, "vae")
    path.write_bytes(path.read_bytes()[:100])


def other_shapes(folder: Path) -> None:
    change(folder / "unet/config.json", block_out_channels=[32, 32])


def other_weights(folder: Path) -> None:
    shutil.copy(weights(folder, "vae"), weights(folder, "unet"))


def no_tokenizer_files(folder: Path) -> None:
    (folder / "tokenizer/tokenizer.json").unlink()


WRONG = [
    (another_unet, "unet: class is 'UNet2DModel'; 'UNet2DConditionModel' is needed"),
    (another_vae, "vae: class is 'VQModel'"),
    (another_text_encoder, "text_encoder: architecture is 'T5EncoderModel'; 'CLIPTextModel'"),
    (an_sdxl_unet, "unet: addition_embed_type is 'text_time'"),
    (an_inpainting_unet, "unet: in_channels is 9; 4 is needed"),
    (wider_conditions, "unet: cross_attention_dim is 1024; 16 is needed"),
    (a_flow, "scheduler: prediction_type is 'flow_prediction'; 'epsilon' or 'v_prediction' is needed"),
    (no_json, r"vae/config\.json is no JSON"),
    (a_list, r"vae/config\.json is no JSON object"),
    (no_size, "unet: sample_size is None"),
    (pickled, r"has no unet/diffusion_pytorch_model\.safetensors"),
    (quantised, r"unet: tensor 'conv_in\.weight' is I8"),
    (cut_off, "vae/.* is no safetensors file"),
    (other_shapes, "unet cannot be loaded"),
    (other_weights, "unet cannot be loaded"),
    (no_tokenizer_files, "tokenizer cannot be loaded"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_checkpoint_that_is_none_says_why(
    folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder)
    with pytest.raises(GeneratorError, match=message) as raised:
        diffusion.load(folder)
    assert raised.value.hint


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GeneratorError, match="has no unet/"):
        diffusion.load(tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_floating_type_compute_in_float32_on_the_cpu(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = diffusion.load(tiny_diffusion.write(tmp_path, dtype=dtype))
    for part in (model.unet, model.vae, model.text_encoder):
        assert {weight.dtype for weight in part.parameters()} == {torch.float32}
    images = model.decode(
        model.sample(noise(model, 1), conditions(model, "red"), nulls(model, 1), steps=2, guidance=2.0)
    )
    assert images.dtype == torch.float32


def test_half_precision_files_are_found_by_their_name(folder: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        path = weights(folder, part)
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert diffusion_folder.unet(folder, torch.float32).config.in_channels == 4
    diffusion.load(folder)


@pytest.mark.slow
def test_compiled_blocks_predict_the_same(random_folder: Path, model: Diffusion) -> None:
    compiled = diffusion.load(random_folder, compiled=True)
    for count in (2, 3):
        prompts = conditions(model, *["red"] * count)
        with torch.no_grad():
            wanted = model.predict(noise(model, count), 500, prompts)
            found = compiled.predict(noise(model, count), 500, prompts)
        assert torch.allclose(found, wanted, atol=1e-4)
