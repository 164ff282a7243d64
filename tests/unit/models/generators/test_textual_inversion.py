"""Learning a class's token, and low-rank changes of the UNet, on tiny models with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from models.errors import DataError, GeneratorError, TrainingError
from models.generators import diffusion, textual_inversion
from models.generators.diffusion import Batches, Diffusion
from models.generators.textual_inversion import (
    CHECK_EVERY,
    _Learned,
    _Objective,
    adapted,
    apply_adapter,
    draw,
    learn,
    learn_adapter,
    learn_tokens,
)
from models.local import FolderCheckpoints
from models.methods.tint import TextualInversionParams
from models.runtime import generator
from tests import tiny_diffusion

SUPPORTS = tiny_diffusion.squares("green", 3)
SHORT = TextualInversionParams(steps=50, batch_size=8, lr=5e-2, patience=0)


class Curve:
    """The losses that were reported, and the `first` step that was."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.first = 10**9
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.stop_at = stop_at

    def __call__(self, step: int, total: int, **metrics: float) -> None:
        assert 0 <= step <= total
        self.first = min(step, self.first)
        if metrics:
            self.steps.append(step)
            self.losses.append(metrics["loss"])
        if step == self.stop_at:
            raise KeyboardInterrupt


def weights(model: Diffusion) -> dict[str, Tensor]:
    parts = {"unet": model.unet, "vae": model.vae, "text": model.text_encoder}
    return {
        f"{part}.{name}": value.clone()
        for part, network in parts.items()
        for name, value in network.state_dict().items()
    }


def test_the_loss_falls_and_nothing_but_the_token_moves(either_model: Diffusion) -> None:
    before, curve = weights(either_model), Curve()
    tokens = learn_tokens(either_model, SUPPORTS, SHORT, seed=0, report=curve)
    assert tokens.shape == (1, either_model.width)
    assert curve.steps == [0, 25, 50]
    assert min(curve.losses[1:]) < curve.losses[0] - 1e-3
    assert not torch.allclose(tokens, either_model.rows_of("object"), atol=1e-2)
    after = weights(either_model)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_gradient_is_that_of_the_words_row_in_the_table(either_model: Diffusion) -> None:
    """Against the straightforward way: the word stands in the prompt and the whole table has gradients."""
    model = either_model
    objective = _Objective(model, model.encode(SUPPORTS), SHORT)
    learned = _Learned(model.rows_of("red"), [])
    objective.differentiate(learned, generator(0, "some"))
    random = generator(0, "some")
    index, times = draw(3, 8, 250, 1000, random)
    noise = torch.randn(8, *model.latent_shape, generator=random)
    noisy, wanted = model.noised(model.encode(SUPPORTS)[index], noise, times)
    table = model.text_encoder.get_input_embeddings().weight.requires_grad_()
    ids = model.prompt("a photo of a red").ids
    conditions = model.text_encoder(ids.repeat(8, 1)).last_hidden_state
    functional.mse_loss(model.unet(noisy, times, conditions).sample, wanted).backward()  # type: ignore[no-untyped-call]
    assert table.grad is not None
    assert learned.rows.grad is not None
    row = table.grad[model.tokenizer.convert_tokens_to_ids("red")]
    assert torch.allclose(learned.rows.grad[0], row, rtol=1e-3, atol=1e-7)


def test_the_gradient_of_a_batch_in_parts_is_that_of_the_whole(model: Diffusion) -> None:
    gradients = []
    for size in (8, 3):
        objective = _Objective(model, model.encode(SUPPORTS), SHORT)
        objective._batches = Batches(size)
        learned = _Learned(model.rows_of("object"), [])
        objective.differentiate(learned, generator(0, "some"))
        assert learned.rows.grad is not None
        gradients.append(learned.rows.grad)
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-7)


def test_a_killed_run_goes_on_to_the_same_token(model: Diffusion, tmp_path: Path) -> None:
    whole = learn_tokens(model, SUPPORTS, SHORT, seed=3, report=Curve())
    kept, first, second = FolderCheckpoints(tmp_path, every=0), Curve(stop_at=25), Curve()
    with pytest.raises(KeyboardInterrupt):
        learn_tokens(model, SUPPORTS, SHORT, seed=3, report=first, checkpoints=kept)
    resumed = learn_tokens(model, SUPPORTS, SHORT, seed=3, report=second, checkpoints=kept)
    assert second.steps == [25, 50]
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("stop_at", [10, 40])
def test_a_killed_run_goes_on_to_the_same_token_and_adapter(
    model: Diffusion, tmp_path: Path, stop_at: int
) -> None:
    """In the token's 25 steps, and in the adapter's 25 after them; then no token is learned again."""
    params = SHORT.model_copy(update={"steps": 25, "lora_rank": 2})
    tokens, adapter = learn(model, SUPPORTS, params, seed=3, report=Curve())
    kept, first, second = FolderCheckpoints(tmp_path, every=0), Curve(stop_at), Curve()
    with pytest.raises(KeyboardInterrupt):
        learn(model, SUPPORTS, params, seed=3, report=first, checkpoints=kept)
    again, adapter_again = learn(model, SUPPORTS, params, seed=3, report=second, checkpoints=kept)
    assert second.first == stop_at
    assert torch.equal(again, tokens)
    assert adapter.keys() == adapter_again.keys()
    assert all(torch.equal(value, adapter_again[name]) for name, value in adapter.items())


def test_it_stops_where_the_loss_falls_no_more(model: Diffusion) -> None:
    still = TextualInversionParams(steps=200, batch_size=2, lr=1e-9, patience=50)
    curve = Curve()
    tokens = learn_tokens(model, SUPPORTS, still, seed=0, report=curve)
    assert curve.steps[-1] == 50
    assert torch.equal(tokens, model.rows_of("object"))
    curve = Curve()
    learn_tokens(model, SUPPORTS, still.model_copy(update={"steps": 75, "patience": 0}), seed=0, report=curve)
    assert curve.steps[-1] == 75


def test_the_token_of_the_lowest_loss_is_returned_and_not_the_last(model: Diffusion) -> None:
    """At a rate that overshoots; the loss on the draws that stay the same is asked for again."""
    wild = TextualInversionParams(steps=100, batch_size=4, lr=1.0, patience=0)
    curve = Curve()
    tokens = learn_tokens(model, SUPPORTS, wild, seed=0, report=curve)
    objective = _Objective(model, model.encode(SUPPORTS), wild)
    found = objective.checked(_Learned(tokens, []), 0)
    assert found <= min(curve.losses) * 1.0011


def test_a_loss_counts_as_lower_by_a_thousandth_only() -> None:
    history = [{"step": 0.0, "loss": 1.0}, {"step": 25.0, "loss": 0.9}, {"step": 50.0, "loss": 0.8999}]
    assert textual_inversion.lowest(history)["step"] == 25
    assert textual_inversion.settled(history, 25)
    assert not textual_inversion.settled(history, 26)
    assert not textual_inversion.settled(history, 0)


@pytest.mark.parametrize(("word", "start"), [("red", "red"), ("washer", "object"), (None, "blue")])
def test_without_a_step_the_token_is_the_word_it_starts_from(
    model: Diffusion, word: str | None, start: str
) -> None:
    """A class's name that the tokenizer does not know gives way to "object"; no name, to the parameter's word."""
    params = TextualInversionParams(steps=0, initial_word="blue", vectors=2)
    tokens = learn_tokens(model, SUPPORTS, params, seed=0, report=Curve(), word=word)
    assert torch.equal(tokens, model.rows_of(start, 2))


@pytest.mark.parametrize("shape", [(16, 16), (5, 7)])
def test_one_shot_of_any_size_is_enough(model: Diffusion, shape: tuple[int, int]) -> None:
    params = TextualInversionParams(steps=CHECK_EVERY, batch_size=4, vectors=3)
    tokens = learn_tokens(model, torch.rand(1, 3, *shape), params, seed=0, report=Curve())
    assert tokens.shape == (3, model.width)
    assert bool(tokens.isfinite().all())


def test_no_image_a_prompt_too_long_and_a_loss_that_is_no_number_are_errors(model: Diffusion) -> None:
    with pytest.raises(DataError, match="no image"):
        learn_tokens(model, SUPPORTS[:0], SHORT, seed=0, report=Curve())
    long = TextualInversionParams(vectors=16)
    with pytest.raises(GeneratorError, match="the text encoder reads 12"):
        learn_tokens(model, SUPPORTS, long, seed=0, report=Curve())
    with pytest.raises(TrainingError, match="nan"):
        learn_tokens(model, SUPPORTS * torch.nan, SHORT, seed=0, report=Curve())


def test_a_least_timestep_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    short = diffusion.load(tiny_diffusion.write(tmp_path, num_train_timesteps=100))
    with pytest.raises(GeneratorError, match="least_timestep is 250; the model has 100"):
        learn_tokens(short, SUPPORTS, SHORT, seed=0, report=Curve())


def test_draws_take_each_image_equally_often_and_spread_the_timesteps() -> None:
    index, times = draw(3, 30, 250, 1000, generator(0, "draws"))
    assert torch.bincount(index).tolist() == [10, 10, 10]
    assert int(times.min()) >= 250
    assert int(times.max()) < 1000
    assert torch.bincount((times - 250) // 25, minlength=30).tolist() == [1] * 30
    few, _ = draw(10, 4, 0, 10, generator(1, "draws"))
    assert len(few.unique()) == 4


def test_an_adapter_lowers_the_loss_and_leaves_the_model_as_it_was(either_model: Diffusion) -> None:
    model, curve = either_model, Curve()
    before = weights(model)
    params = SHORT.model_copy(update={"lora_rank": 2, "lr": 1e-2})
    tokens = model.rows_of("green")
    adapter = learn_adapter(model, SUPPORTS, tokens, params, seed=0, report=curve)
    assert min(curve.losses[1:]) < curve.losses[0] - 1e-2
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    objective = _Objective(model, model.encode(SUPPORTS), params)
    assert objective.checked(_Learned(tokens, []), 0) == pytest.approx(curve.losses[0], rel=1e-5)
    apply_adapter(model, adapter)
    found = objective.checked(_Learned(tokens, []), 0)
    assert found == pytest.approx(min(curve.losses), rel=2e-3)


def test_a_model_that_was_adapted_is_as_it_was(model: Diffusion) -> None:
    """Also after work that failed."""
    params = SHORT.model_copy(update={"steps": 25, "lora_rank": 2, "lr": 1e-1})
    _, adapter = learn(model, SUPPORTS, params, seed=0, report=Curve())
    before, start = weights(model), torch.randn(1, *model.latent_shape)

    def predicted() -> Tensor:
        with torch.no_grad():
            return model.predict(start, 500, model.unconditional())

    plain = predicted()
    with adapted(model, adapter):
        assert not torch.allclose(predicted(), plain, atol=1e-3)
    with adapted(model, {}):
        assert torch.equal(predicted(), plain)
    with pytest.raises(DataError), adapted(model, adapter):
        model.encode(SUPPORTS[0])
    assert torch.equal(predicted(), plain)
    assert weights(model).keys() == before.keys()


def test_an_adapter_of_rank_zero_or_of_another_model_is_refused(model: Diffusion) -> None:
    with pytest.raises(GeneratorError, match="lora_rank is 0"):
        learn_adapter(model, SUPPORTS, model.rows_of("green"), SHORT, seed=0, report=Curve())
    params = TextualInversionParams(steps=1, batch_size=2, lora_rank=2)
    adapter = learn_adapter(model, SUPPORTS, model.rows_of("green"), params, seed=0, report=Curve())
    before = weights(model)
    with pytest.raises(GeneratorError, match="learned for another UNet"):
        apply_adapter(model, {name: torch.cat([value, value], -1) for name, value in adapter.items()})
    with pytest.raises(GeneratorError, match="no low-rank pairs"):
        apply_adapter(model, {})
    assert weights(model).keys() == before.keys()
