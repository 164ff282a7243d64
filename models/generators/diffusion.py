"""A text-to-image latent diffusion model in Stable Diffusion's format, and what TINT does with one.

Latents float32 [N, C, h, w]; conditions float32 [N, L, D], the text encoder's output for a prompt of L tokens.
Networks compute in bfloat16 on CUDA and float32 on CPU, unless `runtime.use_bfloat16_on_cpu` says otherwise (the VAE
always in float32: it runs once an image and bounds the quality of all reconstructions); what crosses a function's
border is float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from torch.nn import functional

from models.arrays import Images
from models.data import images as image_tensors
from models.errors import DataError, GeneratorError
from models.generators import diffusion_folder
from models.runtime import training_autocast

Solver = Literal["ddim", "dpm_solver++"]
T = TypeVar("T")

#: Where a prompt's template has the learned tokens.
PLACEHOLDER = "{}"
#: The word that a new token starts from where the wanted one is unknown.
NEUTRAL_WORD = "object"

#: DPM-Solver++(2M), Lu et al., arXiv:2211.01095, algorithm 2, at the timesteps that it is given.
_SECOND_ORDER = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
}


@dataclass(frozen=True)
class Prompt:
    """`ids` int64 [L], padded to the encoder's context; `places` int64 [V]: where learned tokens stand."""

    ids: Tensor
    places: Tensor


@dataclass(frozen=True, eq=False)
class Diffusion:
    """The parts of a checkpoint, frozen, on `device`. `schedule` is its scheduler's configuration."""

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    schedule: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype

    @property
    def resolution(self) -> int:
        """Side in pixels of its images."""
        halvings = len(self.vae.config.block_out_channels) - 1
        return int(self.unet.config.sample_size) << halvings

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of one image's latent."""
        side = int(self.unet.config.sample_size)
        return int(self.unet.config.in_channels), side, side

    @property
    def width(self) -> int:
        """Length of a token's embedding, as learned."""
        return int(self.text_encoder.get_input_embeddings().weight.shape[1])

    @property
    def context(self) -> int:
        """How many tokens the text encoder reads."""
        positions = int(self.text_encoder.config.max_position_embeddings)
        return min(positions, int(self.tokenizer.model_max_length))

    @property
    def training_timesteps(self) -> int:
        """How many timesteps its noise has."""
        return int(self._forward.config.num_train_timesteps)

    @cached_property
    def _forward(self) -> Any:
        return self._scheduler(DDIMScheduler, 1)

    # Images and latents

    def encode(self, images: Images) -> Tensor:
        """Latents [N, C, h, w] of images [N, 3, H, W] of any size: the mode of the VAE's posterior, scaled."""
        if not images.is_floating_point():
            raise DataError(f"images are {images.dtype}; floating point in 0..1 is needed", "Divide by 255.")
        if images.ndim != 4 or images.shape[1] != 3:
            raise DataError(f"images have shape {list(images.shape)}; [N, 3, H, W] is needed")
        with torch.no_grad():
            seen = image_tensors.resize(images.to(self.device, torch.float32), self.resolution) * 2 - 1
            code = self.vae.encode(seen.contiguous(memory_format=torch.channels_last))
            latents = code.latents if hasattr(code, "latents") else code.latent_dist.mode()
        scaled: Tensor = (latents - self._shift) * self.vae.config.scaling_factor
        return scaled.contiguous()

    def encode_all(self, images: Images, batch_size: int = 16) -> Tensor:
        """As `encode`, in batches that fit."""
        return torch.cat(list(Batches(batch_size).of(len(images), lambda rows: self.encode(images[rows]))))

    def decode_all(self, latents: Tensor, batch_size: int = 16) -> Images:
        """As `decode`, in batches that fit; the images on the CPU."""
        parts = Batches(batch_size).of(len(latents), lambda rows: self.decode(latents[rows]).cpu())
        return torch.cat(list(parts))

    def decode(self, latents: Tensor) -> Images:
        """Images [N, 3, S, S] in 0..1 of latents [N, C, h, w]."""
        with torch.no_grad():
            code = latents.to(self.device, torch.float32) / self.vae.config.scaling_factor + self._shift
            decoded: Tensor = self.vae.decode(code.contiguous(memory_format=torch.channels_last)).sample
        return ((decoded + 1) / 2).clamp(0, 1).contiguous()

    @property
    def _shift(self) -> float:
        return float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    # Prompts

    def prompt(self, template: str, vectors: int = 1) -> Prompt:
        """The prompt of a template such as "a photo of a {}", with `vectors` learned tokens in place of {}.

        Raises `GeneratorError` where it is longer than the encoder's context.
        """
        before, *after = template.split(PLACEHOLDER)
        if len(after) > 1:
            raise GeneratorError(f"template '{template}' has {len(after)} places; one at most is possible")
        start = [self.tokenizer.bos_token_id, *self._ids(before)]
        learned = [self.tokenizer.eos_token_id] * (vectors if after else 0)  # what stands there is not read
        ids = [*start, *learned, *(self._ids(after[0]) if after else []), self.tokenizer.eos_token_id]
        if len(ids) > self.context:
            raise GeneratorError(
                f"prompt '{template}' with {len(learned)} learned tokens has {len(ids)} tokens; "
                f"the text encoder reads {self.context}",
                "Shorten the template, or learn fewer vectors.",
            )
        padding = [self.tokenizer.pad_token_id] * (self.context - len(ids))
        places = torch.arange(len(start), len(start) + len(learned))
        return Prompt(torch.tensor(ids + padding), places)

    def embed_prompts(self, prompt: Prompt, tokens: Tensor | None = None) -> Tensor:
        """Conditions [N, L, D] of one prompt with learned tokens [N, V, width] in its places; without any, [1, L, D].

        The tokens replace the table's output and not its rows: gradients reach them and nothing else.
        """
        table = self.text_encoder.get_input_embeddings()
        ids = prompt.ids.to(self.device)[None]
        rows = table(ids)
        if tokens is not None:
            ids, rows = ids.expand(len(tokens), -1), rows.repeat(len(tokens), 1, 1)
            rows = rows.index_copy(1, prompt.places.to(self.device), tokens.to(self.device, rows.dtype))
        elif len(prompt.places):
            raise GeneratorError(f"the prompt has {len(prompt.places)} learned tokens; none were given")
        hook = table.register_forward_hook(lambda module, inputs, output: rows)
        try:
            conditions: Tensor = self.text_encoder(ids).last_hidden_state.float()
        finally:
            hook.remove()
        return conditions

    def unconditional(self) -> Tensor:
        """Conditions [1, L, D] of the empty prompt."""
        with torch.no_grad():
            return self.embed_prompts(self.prompt(""))

    def knows(self, word: str) -> bool:
        """Whether the tokenizer has tokens for all of `word`."""
        ids = self._ids(word)
        return bool(ids) and self.tokenizer.unk_token_id not in ids

    def rows_of(self, word: str, vectors: int = 1) -> Tensor:
        """Start values [vectors, width] for learned tokens: the embeddings of `word`, else of `NEUTRAL_WORD`.

        A word of as many tokens as there are vectors gives one to each; any other gives its mean to all.
        Raises `GeneratorError` where the tokenizer knows neither.
        """
        known = next((name for name in (word, NEUTRAL_WORD) if self.knows(name)), None)
        if known is None:
            raise GeneratorError(
                f"the generator's tokenizer knows neither '{word}' nor '{NEUTRAL_WORD}'",
                "Name another word to start from.",
            )
        table = self.text_encoder.get_input_embeddings().weight
        rows: Tensor = table[torch.tensor(self._ids(known), device=self.device)].detach().float()
        return rows if len(rows) == vectors else rows.mean(0, keepdim=True).repeat(vectors, 1)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids) if text.strip() else []

    # The network and its schedule

    def predict(self, latents: Tensor, timestep: int | Tensor, conditions: Tensor) -> Tensor:
        """The UNet's output [N, C, h, w] (noise or velocity) for one timestep, or one for each latent [N]."""
        seen = latents.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        times = torch.as_tensor(timestep, device=self.device).expand(len(latents))
        with training_autocast(self.device):
            output: Tensor = self.unet(seen, times, conditions.to(self.device, self.dtype)).sample
        return output.float()

    def ddim(self, steps: int) -> Any:
        """diffusers' DDIM scheduler over `steps` steps (Song et al., arXiv:2010.02502, equation 12, eta 0)."""
        return self._scheduler(DDIMScheduler, steps)

    def ddim_inverse(self, steps: int) -> Any:
        """diffusers' scheduler of the same steps from image to noise."""
        return self._scheduler(DDIMInverseScheduler, steps)

    def timesteps(self, steps: int) -> list[int]:
        """The timesteps of `steps` DDIM steps, from noise to image."""
        return [int(time) for time in self.ddim(steps).timesteps]

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Latents at `timesteps` [N] and what the network should predict there: the noise, or the velocity."""
        scheduler = self._forward
        noisy: Tensor = scheduler.add_noise(latents, noise, timesteps)
        if scheduler.config.prediction_type == "epsilon":
            return noisy, noise
        return noisy, scheduler.get_velocity(latents, noise, timesteps)

    def _scheduler(self, family: Any, steps: int) -> Any:
        scheduler = family.from_config(self._unclipped | {"timestep_spacing": self._spacing})
        if not 1 <= steps <= scheduler.config.num_train_timesteps:
            raise GeneratorError(
                f"{steps} steps were asked for; 1 to {scheduler.config.num_train_timesteps} are possible"
            )
        scheduler.set_timesteps(steps)
        return scheduler

    @property
    def _unclipped(self) -> dict[str, Any]:
        """The configuration without what only pixels need."""
        return {**self.schedule, "clip_sample": False, "thresholding": False}

    @property
    def _spacing(self) -> str:
        """The checkpoint's own, as far as inversion knows it."""
        return "trailing" if self.schedule.get("timestep_spacing") == "trailing" else "leading"

    # Sampling

    def sample(
        self,
        latents: Tensor,
        conditions: Tensor,
        unconditional: Tensor,
        *,
        steps: int,
        guidance: float,
        solver: Solver = "ddim",
        batch_size: int = 16,
    ) -> Tensor:
        """Latents [N, C, h, w] without noise, from noise `latents` [N, C, h, w], under `conditions` [N, L, D].

        `unconditional` [N, R, L, D]: one row of null embeddings for all steps (R = 1), or the rows of an inversion
        over R steps, noisiest first; a sampler of other steps takes the row nearest in time. Guidance: Ho &
        Salimans, arXiv:2207.12598, equation 6 with w + 1 = `guidance`.
        """

        def part(rows: slice) -> Tensor:
            return self._sample(latents[rows], conditions[rows], unconditional[rows], steps, guidance, solver)

        with torch.no_grad():
            return torch.cat(list(Batches(batch_size).of(len(latents), part)))

    def _sample(
        self,
        latents: Tensor,
        conditions: Tensor,
        unconditional: Tensor,
        steps: int,
        guidance: float,
        solver: Solver,
    ) -> Tensor:
        times = self.timesteps(steps)
        if solver == "ddim":
            scheduler = self.ddim(steps)
        else:
            scheduler = DPMSolverMultistepScheduler.from_config(self._unclipped | _SECOND_ORDER)
            scheduler.set_timesteps(timesteps=times)
        nulls_at = torch.tensor(self.timesteps(unconditional.shape[1]))
        current = latents.to(self.device, torch.float32)
        for time in times:
            row = int((nulls_at - time).abs().argmin())
            output = self.guided(current, time, conditions, unconditional[:, row], guidance)
            current = scheduler.step(output, time, current).prev_sample
        return current

    def guided(
        self, latents: Tensor, timestep: int, conditions: Tensor, unconditional: Tensor, guidance: float
    ) -> Tensor:
        """unconditional + guidance (conditional - unconditional), both predicted in one pass; [N, C, h, w]."""
        if guidance == 1:
            return self.predict(latents, timestep, conditions)
        both = self.predict(
            torch.cat([latents, latents]), timestep, torch.cat([unconditional, conditions.to(unconditional)])
        )
        without, with_ = both.chunk(2)
        return torch.lerp(without, with_, guidance)


def load(folder: str | Path, device: str | torch.device = "cpu", *, compiled: bool = False) -> Diffusion:
    """The model in a folder of diffusers' layout. One at the hub: `models.generators.load`.

    `compiled`: torch.compile of the UNet's attention blocks; minutes at first use, for long work on a GPU.

    Raises `GeneratorError` where a part is missing, of another kind, or its weights are no floating point numbers.
    """
    folder = Path(folder)
    diffusion_folder.check(folder)
    place = torch.device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    parts = (
        diffusion_folder.vae(folder, torch.float32),
        diffusion_folder.unet(folder, dtype),
        diffusion_folder.text_encoder(folder, torch.float32),
    )
    with clear_when_full("the generator's weights"):
        vae, unet, text_encoder = (part.to(place).requires_grad_(False).eval() for part in parts)
    if compiled:
        unet.compile_repeated_blocks(dynamic=True)
    return Diffusion(
        vae=vae.to(memory_format=torch.channels_last),
        unet=unet.to(memory_format=torch.channels_last),
        text_encoder=text_encoder,
        tokenizer=diffusion_folder.tokenizer(folder),
        schedule=diffusion_folder.schedule(folder),
        device=place,
        dtype=dtype,
    )


def blend(latents: Tensor, noise: Tensor, alpha: float | Tensor) -> Tensor:
    """Noise blended into inverted latents [N, C, h, w], its norm restored; `alpha` one number or [N] in 0..1.

    z = (1 - a) z_T + a n;  z / rms(z) * ((1 - a) rms(z_T) + a rms(n)) (Landolsi & Kahl, arXiv:2406.03146).
    """
    share = torch.as_tensor(alpha, dtype=latents.dtype, device=latents.device).view(-1, 1, 1, 1)
    mixed = torch.lerp(latents, noise, share)
    wanted = torch.lerp(_rms(latents), _rms(noise), share)
    return mixed * (wanted / _rms(mixed))


def psnr(images: Images, others: Images) -> Tensor:
    """Peak signal-to-noise ratio in dB [N] of images [N, 3, S, S] in 0..1; equal ones: infinity."""
    error = functional.mse_loss(images, others, reduction="none").flatten(1).mean(1)
    return -10 * error.log10()


class Batches:
    """Work in batches of at most `size` rows. Where the device's memory is full, `size` halves and the work goes on."""

    def __init__(self, size: int) -> None:
        self.size = size

    def of(self, count: int, work: Callable[[slice], T]) -> Iterator[T]:
        """`work` of the rows 0..`count` in turn; it must be safe to repeat.

        Raises `GeneratorError` where a single row does not fit.
        """
        start = 0
        while start < count:
            rows = slice(start, min(start + self.size, count))
            try:
                result = work(rows)
            except RuntimeError as error:
                if not _is_full(error):
                    raise
                self.size = (rows.stop - rows.start) // 2
                if self.size < 1:
                    raise _full("the work on one image") from error
            else:
                start = rows.stop
                yield result
                continue
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # after the except block: its traceback held the tensors


@contextlib.contextmanager
def clear_when_full(what: str) -> Iterator[None]:
    """Memory that is full becomes a `GeneratorError` that names `what`."""
    try:
        yield
    except RuntimeError as error:
        if not _is_full(error):
            raise
        raise _full(what) from error


def _full(what: str) -> GeneratorError:
    return GeneratorError(
        f"the device's memory does not hold {what}", "Use a smaller generator, or a device with more memory."
    )


def _is_full(error: RuntimeError) -> bool:
    """CUDA's error has a class of its own, the CPU allocator's only its words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _rms(latents: Tensor) -> Tensor:
    return latents.square().mean((1, 2, 3), keepdim=True).sqrt()
