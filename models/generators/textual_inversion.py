"""Textual inversion: new words for the text encoder, learned from a few images of a class.

Source: Gal et al., "An image is worth one word", arXiv:2208.01618, equation 2; timesteps as in Landolsi & Kahl,
arXiv:2406.03146: those of little noise carry artefacts of upsampling, not content, and are left out. LoRA: Hu et al.,
arXiv:2106.09685.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from models.arrays import Images
from models.errors import DataError, GeneratorError, TrainingError
from models.generators.diffusion import NEUTRAL_WORD, Batches, Diffusion
from models.methods.tint import TextualInversionParams
from models.pipeline import Checkpoints, Report
from models.runtime import generator, seed_weights
from models.training import checkpoint
from models.training.checkpoint import History
from models.training.loop import NoCheckpoints

#: Steps between two looks at the loss on draws that stay the same.
CHECK_EVERY = 25
#: A loss is lower where it is lower by this share.
_LOWER = 1e-3
_WARM_UP = 100
#: Batches of draws that a look at the loss takes.
_CHECKED_BATCHES = 2
_ADAPTER = "class"
_TOKENS = "tokens.safetensors"
_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


class _Learned(nn.Module):
    """What is learned: the `rows` [V, width] of the new token, or, in the second mode, the UNet's low-rank pairs."""

    def __init__(self, rows: Tensor, adapter: list[nn.Parameter]) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows, requires_grad=not adapter)
        self.adapter = nn.ParameterList(adapter)


def learn(
    diffusion: Diffusion,
    supports: Images,
    params: TextualInversionParams,
    *,
    seed: int,
    report: Report,
    word: str | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokens, see `learn_tokens`, and where `params.lora_rank` asks for it the adapter, see `learn_adapter`.

    Both share the checkpoints and count their steps as one.
    """
    kept = checkpoints or NoCheckpoints()
    whole = params.steps * (2 if params.lora_rank else 1)

    def advance(step: int, total: int, **metrics: float) -> None:
        report(step, whole, **metrics)

    def advance_further(step: int, total: int, **metrics: float) -> None:
        report(params.steps + step, whole, **metrics)

    tokens = _read_tokens(kept.latest())
    if tokens is None:
        tokens = learn_tokens(
            diffusion, supports, params, seed=seed, report=advance, word=word, checkpoints=kept
        )
    if not params.lora_rank:
        return tokens, {}
    further = _AfterTokens(kept, tokens, params.steps)
    return tokens, learn_adapter(
        diffusion, supports, tokens, params, seed=seed, report=advance_further, checkpoints=further
    )


def learn_tokens(
    diffusion: Diffusion,
    supports: Images,
    params: TextualInversionParams,
    *,
    seed: int,
    report: Report,
    word: str | None = None,
    checkpoints: Checkpoints | None = None,
) -> Tensor:
    """Token embeddings float32 [vectors, width] under which the frozen model makes images like `supports` [K, 3, H, W].

    They start from `word` (None: `params.initial_word`), see `Diffusion.rows_of`. Of the embeddings at every
    `CHECK_EVERY` steps those of the lowest loss on draws that stay the same are returned; after `params.patience` steps
    without a lower one it stops. `report` is given the loss at those steps.
    """
    rows = diffusion.rows_of(word or params.initial_word or NEUTRAL_WORD, params.vectors)
    learned = _learn(diffusion, supports, params, _Learned(rows, []), seed, report, checkpoints)
    return learned.rows.detach().cpu()


def learn_adapter(
    diffusion: Diffusion,
    supports: Images,
    tokens: Tensor,
    params: TextualInversionParams,
    *,
    seed: int,
    report: Report,
    checkpoints: Checkpoints | None = None,
) -> dict[str, Tensor]:
    """The second mode: low-rank changes of the UNet's attention (LoRA), by name, learned with `tokens` as they are.

    `diffusion` is left as it was; see `apply_adapter`.
    """
    if params.lora_rank < 1:
        raise GeneratorError(f"lora_rank is {params.lora_rank}; an adapter needs 1 or more")
    seed_weights(seed, "textual_inversion", "adapter")
    pairs = _add_pairs(diffusion, params.lora_rank)
    try:
        learned = _learn(diffusion, supports, params, _Learned(tokens, pairs), seed, report, checkpoints)
        with torch.no_grad():
            for pair, best in zip(pairs, learned.adapter, strict=True):
                pair.copy_(best)
        weights = get_peft_model_state_dict(diffusion.unet, adapter_name=_ADAPTER)
        return {name: value.detach().cpu().clone() for name, value in weights.items()}
    finally:
        diffusion.unet.unload_lora()


@contextlib.contextmanager
def adapted(diffusion: Diffusion, adapter: Mapping[str, Tensor]) -> Iterator[Diffusion]:
    """The model with the low-rank changes that `learn_adapter` found (none: as it is); afterwards as it was."""
    if not adapter:
        yield diffusion
        return
    try:
        apply_adapter(diffusion, adapter)
        yield diffusion
    finally:
        diffusion.unet.unload_lora()


def apply_adapter(diffusion: Diffusion, adapter: Mapping[str, Tensor]) -> None:
    """From now on the UNet works with the low-rank changes that `learn_adapter` found."""
    rank = next((len(value) for name, value in adapter.items() if "lora_A" in name), 0)
    if not rank:
        raise GeneratorError("the adapter has no low-rank pairs")
    pairs = _add_pairs(diffusion, rank)
    expected = get_peft_model_state_dict(diffusion.unet, adapter_name=_ADAPTER)
    shapes = {name: value.shape for name, value in adapter.items()}
    if shapes != {name: value.shape for name, value in expected.items()}:
        diffusion.unet.unload_lora()
        raise GeneratorError("the adapter was learned for another UNet", "Learn it with this generator.")
    set_peft_model_state_dict(diffusion.unet, dict(adapter), adapter_name=_ADAPTER)
    for pair in pairs:
        pair.requires_grad_(False)


def draw(count: int, size: int, first: int, last: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of `count` images and at which timestep, both int64 [size]; timesteps in `first` ... `last` - 1.

    Each image comes equally often, give or take one. Timesteps are spread evenly with one random offset, which lowers
    the variance of the loss (Kingma et al., arXiv:2107.00630, appendix I.1).
    """
    rounds = [torch.randperm(count, generator=random) for _ in range(math.ceil(size / count))]
    spread = (torch.arange(size) + torch.rand(1, generator=random)) / size
    timesteps = first + (spread * (last - first)).long().clamp_max(last - first - 1)
    return torch.cat(rounds)[:size], timesteps[torch.randperm(size, generator=random)]


@dataclass(frozen=True)
class _AfterTokens:
    """The checkpoints of an adapter's training, `before` steps after the first: with the tokens learned until then."""

    kept: Checkpoints
    tokens: Tensor
    before: int

    def latest(self) -> Path | None:
        folder = self.kept.latest()
        return None if _read_tokens(folder) is None else folder

    def due(self) -> bool:
        return self.kept.due()

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        def write_all(folder: Path) -> None:
            write(folder)
            save_file({"tokens": self.tokens.contiguous()}, folder / _TOKENS)

        self.kept.save(self.before + step, write_all)


def _read_tokens(checkpoint: Path | None) -> Tensor | None:
    """The tokens in a checkpoint of an adapter's training; None in one of the tokens' own."""
    if checkpoint is None or not (checkpoint / _TOKENS).exists():
        return None
    tokens: Tensor = load_file(checkpoint / _TOKENS)["tokens"]
    return tokens


def _learn(
    diffusion: Diffusion,
    supports: Images,
    params: TextualInversionParams,
    learned: _Learned,
    seed: int,
    report: Report,
    checkpoints: Checkpoints | None,
) -> _Learned:
    """Train `learned`; returns its state of the lowest loss."""
    if not len(supports):
        raise DataError("there is no image to learn a token from", "Add a labelled image of the class.")
    if params.least_timestep >= diffusion.training_timesteps:
        raise GeneratorError(
            f"least_timestep is {params.least_timestep}; the model has {diffusion.training_timesteps} timesteps"
        )
    objective = _Objective(diffusion, diffusion.encode_all(supports), params)
    saved = checkpoints or NoCheckpoints()
    best = copy.deepcopy(learned)
    adamw = torch.optim.AdamW(learned.parameters(), params.lr, weight_decay=params.weight_decay)
    folder = saved.latest()
    done, history = checkpoint.restore(folder, learned, best, adamw) if folder else (0, [])
    while True:
        if done % CHECK_EVERY == 0 or done == params.steps:
            history.append({"step": done, "loss": objective.checked(learned, seed)})
            report(done, params.steps, loss=history[-1]["loss"])
            if lowest(history) is history[-1]:
                best.load_state_dict(learned.state_dict())
        if done == params.steps or settled(history, params.patience):
            return best
        for group in adamw.param_groups:
            group["lr"] = params.lr * min(1.0, (done + 1) / _WARM_UP)
        objective.differentiate(learned, generator(seed, "textual_inversion", done))
        adamw.step()
        done += 1
        report(done, params.steps)
        if saved.due():
            write = partial(
                checkpoint.save, step=done, network=learned, average=best, optimiser=adamw, history=history
            )
            saved.save(done, write)


def lowest(history: History) -> dict[str, float]:
    """The row of the lowest loss; a row counts as lower where it is so by a thousandth."""
    best = history[0]
    for row in history:
        if row["loss"] < best["loss"] * (1 - _LOWER):
            best = row
    return best


def settled(history: History, patience: int) -> bool:
    """Whether the lowest loss is `patience` steps old; never where that is 0."""
    return patience > 0 and history[-1]["step"] - lowest(history)["step"] >= patience


class _Objective:
    """The mean squared error of the network's prediction, over latents [K, C, h, w] of the class's images."""

    def __init__(self, diffusion: Diffusion, latents: Tensor, params: TextualInversionParams) -> None:
        self._diffusion = diffusion
        self._latents = latents
        self._params = params
        self._prompt = diffusion.prompt(params.template, params.vectors)
        self._batches = Batches(params.batch_size)

    def differentiate(self, learned: _Learned, random: torch.Generator) -> None:
        """Set the gradients of `learned` for one batch of draws."""
        draws = self._draw(self._params.batch_size, random)
        parameters = [each for each in learned.parameters() if each.requires_grad]
        parts = self._batches.of(
            self._params.batch_size,
            lambda rows: torch.autograd.grad(self._error(learned, draws, rows), parameters),
        )
        for parameter, gradients in zip(parameters, zip(*parts, strict=True), strict=True):
            parameter.grad = torch.stack(gradients).sum(0)

    def checked(self, learned: _Learned, seed: int) -> float:
        """The error on draws that depend on `seed` only. Raises `TrainingError` when it is no number."""
        size = _CHECKED_BATCHES * self._params.batch_size
        draws = self._draw(size, generator(seed, "textual_inversion", "check"))
        with torch.no_grad():
            error = sum(self._batches.of(size, lambda rows: float(self._error(learned, draws, rows))))
        if not math.isfinite(error):
            raise TrainingError(f"the loss of textual inversion is {error}", "Try a lower learning rate.")
        return error

    def _draw(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the image, timestep, both [size], and noise [size, C, h, w]."""
        first, last = self._params.least_timestep, self._diffusion.training_timesteps
        index, timesteps = draw(len(self._latents), size, first, last, random)
        return index, timesteps, torch.randn(size, *self._latents.shape[1:], generator=random)

    def _error(self, learned: _Learned, draws: tuple[Tensor, Tensor, Tensor], rows: slice) -> Tensor:
        """The share of `rows` in the mean error of all draws."""
        device = self._latents.device
        index, timesteps, noise = (each[rows].to(device) for each in draws)
        noisy, wanted = self._diffusion.noised(self._latents[index], noise, timesteps)
        conditions = self._diffusion.embed_prompts(self._prompt, learned.rows[None])
        predicted = self._diffusion.predict(noisy, timesteps, conditions.expand(len(index), -1, -1))
        return functional.mse_loss(predicted, wanted) * (len(index) / len(draws[0]))


def _add_pairs(diffusion: Diffusion, rank: int) -> list[nn.Parameter]:
    """Give the UNet's attention low-rank pairs, which change nothing yet; their weights, float32."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_ATTENTION)
    diffusion.unet.add_adapter(config, adapter_name=_ADAPTER)
    pairs = [value for name, value in diffusion.unet.named_parameters() if "lora_" in name]
    for pair in pairs:
        pair.data = pair.data.float()
    return pairs
