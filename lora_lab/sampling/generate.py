"""Draw: text-to-image and img2img in one function, for validation, the img2img stage and everybody else."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor

from lora_lab.base.cache import Cache
from lora_lab.base.cuda_graph import GraphedCallable, Tensors
from lora_lab.base.encode import Encoder, TextEmbedding, in_turn, micro_conditioning
from lora_lab.base.load import pick_dtype, tile_vae
from lora_lab.console import bar, say
from lora_lab.errors import InputError, RunError
from lora_lab.settings.schema import Sampler


@dataclass(frozen=True)
class Request:
    """One picture to draw. With a `photo` (RGB, sides multiples of the model's step) it is img2img of its size."""

    prompt: str
    seed: int
    size: tuple[int, int]  # width, height in pixels
    photo: Image.Image | None = None
    strength: float = 1.0

    @property
    def form(self) -> tuple[object, ...]:
        """What the requests of a batch have in common: size, and where on the way from noise they begin."""
        return (self.size, None) if self.photo is None else (self.photo.size, self.strength)


def check_strength(steps: int, strength: float) -> None:
    """diffusers runs int(steps * strength) steps, and crashes where that is none."""
    if int(steps * strength) < 1:
        raise InputError(
            f"stage.strength={strength} with sampler.steps={steps} leaves no step to run: "
            f"use a strength of at least {math.ceil(100 / steps) / 100} or more steps"
        )


# Not inference_mode: parts are moved in here, and its tensors could never again be in the way of a gradient.
@torch.no_grad()
def generate(
    pipe: StableDiffusionXLPipeline,
    requests: list[Request],
    sampler: Sampler,
    encoder: Encoder | None = None,
) -> Iterator[Image.Image]:
    """Draw every request with what `pipe` wears (adapters.attach.lora_attached), yielding the pictures in their order.

    `encoder` (of `pipe`) says where it works and if its parts take turns there: then only one of them is on the device,
    and all pictures wait as latents for the VAE. Without it all of `pipe` is in one place.
    The noise comes from a CPU generator, so a seed means the same on every device; and in batches of one a picture
    does not depend on the company it was drawn in.
    Raises RunError, naming the request, for numbers that are not finite."""
    for request in requests:
        if request.photo is not None:
            check_strength(sampler.steps, request.strength)
    encoder = encoder or Encoder(pipe, pipe.unet.device, Cache(None), offload=False)
    pipe.unet.eval()  # the next step of a training asks for its own mode
    texts, photos = _texts(requests, sampler, encoder), _photos(requests, encoder)
    latents = _all_latents(requests, sampler, encoder, texts, photos)
    drawn = bar(zip(requests, latents, strict=True), total=len(requests), desc="draw", unit="picture", leave=False)
    if encoder.offload:
        drawn = list(drawn)
    with in_turn(pipe.vae, encoder.device, encoder.offload), _without_overflow(pipe.vae, encoder.device):
        for request, its in drawn:
            yield _decode(pipe, request, its)


@dataclass(frozen=True)
class _Texts:
    prompts: dict[str, TextEmbedding]
    negative: TextEmbedding | None  # what guidance leads away from; None without guidance

    def of(self, batch: list[Request], device: torch.device) -> Tensors:
        """Tokens (B, 77, width) and pooled (B, width); under guidance the first half of B is the negative's."""
        rows = [self.prompts[request.prompt] for request in batch]
        if self.negative is not None:
            rows = [self.negative] * len(rows) + rows
        return {name: torch.stack([getattr(row, name) for row in rows]).to(device) for name in ("tokens", "pooled")}


def _texts(requests: list[Request], sampler: Sampler, encoder: Encoder) -> _Texts:
    pipe, negative = encoder.pipe, sampler.negative_prompt
    guided = sampler.guidance > 1
    zeros = not negative and pipe.config.force_zeros_for_empty_prompt  # SDXL learnt nothing as zeros
    if any(part.startswith("text_encoder") for part in pipe.get_list_adapters()):
        encoder = replace(encoder, cache=Cache(None))  # that has what the base alone makes of a text
    wanted = [request.prompt for request in requests] + [negative] * (guided and not zeros)
    found, _ = encoder.captions(wanted)
    if not guided or not found:
        return _Texts(found, None)
    if not zeros:
        return _Texts(found, found[negative])
    return _Texts(found, next(iter(found.values())).left_out())


Photos = dict[int, DiagonalGaussianDistribution]  # what the VAE makes of a photo, by its id()


def _photos(requests: list[Request], encoder: Encoder) -> Photos:
    """Every photo encoded once, however many seeds it has."""
    photos = {id(request.photo): request.photo for request in requests if request.photo is not None}
    if not photos:
        return {}
    pipe, vae, device = encoder.pipe, encoder.pipe.vae, encoder.device
    with in_turn(vae, device, encoder.offload), _without_overflow(vae, device):
        pixels = ((key, pipe.image_processor.preprocess(photo)) for key, photo in photos.items())
        return {key: vae.encode(its.to(device, vae.dtype)).latent_dist for key, its in pixels}


def _all_latents(
    requests: list[Request], sampler: Sampler, encoder: Encoder, texts: _Texts, photos: Photos
) -> Iterator[Tensor]:
    """The latents (1, 4, h, w) of every request; neighbours of one form go through the UNet together."""

    def each() -> Iterator[Tensor]:
        predict = predictor(encoder.pipe.unet, encoder.device, sampler.capture)
        scheduler = instantiate(sampler.scheduler)(encoder.pipe.scheduler.config)
        denoiser = _Denoiser(encoder, sampler, texts, photos, predict, scheduler)
        for _, neighbours in groupby(requests, key=lambda request: request.form):
            alike = list(neighbours)
            for start in range(0, len(alike), sampler.batch_size):
                yield from denoiser.latents(alike[start : start + sampler.batch_size]).split(1)

    with in_turn(encoder.pipe.unet, encoder.device, encoder.offload):
        yield from each()  # with its end what was recorded is gone, before the UNet goes


def predictor(unet: UNet2DConditionModel, device: torch.device, capture: bool) -> Callable[[Tensors], Tensor]:
    """`unet` as a function of tensors: sample (B, 4, h, w), timestep (1,), tokens (B, 77, width), pooled (B, width) and
    time_ids (B, 6) to the prediction (B, 4, h, w). This is the one place where drawing calls it.

    With `capture` it is recorded as a CUDA graph, which holds as long as its weights stay where they are."""

    def predict(inputs: Tensors) -> Tensor:
        with torch.compiler.set_stance("force_eager"):  # blocks compiled to be trained would be compiled anew for this
            return unet(
                inputs["sample"],
                inputs["timestep"],
                encoder_hidden_states=inputs["tokens"],
                added_cond_kwargs={"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]},
                return_dict=False,
            )[0]

    if not capture or device.type != "cuda":
        return predict
    captured = GraphedCallable(predict, device)
    return lambda inputs: captured(inputs).clone()  # the next step overwrites it, and a scheduler may keep it


@dataclass(frozen=True)
class _Denoiser:
    encoder: Encoder
    sampler: Sampler
    texts: _Texts
    photos: Photos
    predict: Callable[[Tensors], Tensor]
    scheduler: SchedulerMixin  # the sampler's, of the base's noise schedule

    def latents(self, batch: list[Request]) -> Tensor:
        """The latents (B, 4, h, w) of requests of one form, the noise of each from a generator of its own."""
        scheduler, sampler, device = self.scheduler, self.sampler, self.encoder.device
        # On the CPU: some schedulers look their tables up by the timestep, and would wait for a GPU's at every step.
        scheduler.set_timesteps(sampler.steps)
        skipped = 0 if batch[0].photo is None else sampler.steps - int(sampler.steps * batch[0].strength)
        timesteps = scheduler.timesteps[skipped * scheduler.order :]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped * scheduler.order)
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in batch]
        conditions = self.texts.of(batch, device)
        dtype, rows = conditions["tokens"].dtype, len(conditions["tokens"])
        latents = torch.cat([self._begin(*each, timesteps[:1], dtype) for each in zip(batch, generators, strict=True)])
        size = tuple(side * self.encoder.pipe.vae_scale_factor for side in latents.shape[2:])
        conditions["time_ids"] = micro_conditioning(size, (0, 0), size).to(device, dtype).expand(rows, 6)
        options = {"eta": 0.0, "generator": generators if len(batch) > 1 else generators[0]}  # of those that take them
        options = {name: options[name] for name in inspect.signature(scheduler.step).parameters if name in options}
        on_device = timesteps.to(device)
        for i, timestep in enumerate(timesteps):
            doubled = torch.cat([latents] * (rows // len(batch)))  # under guidance
            sample = scheduler.scale_model_input(doubled, timestep)
            noise = self.predict({"sample": sample, "timestep": on_device[i : i + 1], **conditions})
            if self.texts.negative is not None:
                away, towards = noise.chunk(2)
                noise = away + sampler.guidance * (towards - away)
            latents = scheduler.step(noise, timestep, latents, **options, return_dict=False)[0]
        return latents

    def _begin(self, request: Request, generator: torch.Generator, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Noise, or the photo's latents with as much noise as `timestep` (1,) asks: (1, 4, h, w)."""
        pipe, device = self.encoder.pipe, self.encoder.device
        if request.photo is None:
            width, height = (side // pipe.vae_scale_factor for side in request.size)
            shape = (1, pipe.unet.config.in_channels, height, width)
            return randn_tensor(shape, generator, device, dtype) * self.scheduler.init_noise_sigma
        latents = self.photos[id(request.photo)].sample(generator).to(dtype) * pipe.vae.config.scaling_factor
        return self.scheduler.add_noise(latents, randn_tensor(latents.shape, generator, device, dtype), timestep)


def _decode(pipe: StableDiffusionXLPipeline, request: Request, latents: Tensor) -> Image.Image:
    vae = pipe.vae
    _refuse_not_finite(latents, request, "the UNet")
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    try:
        picture = vae.decode(latents, return_dict=False)[0]
    except torch.OutOfMemoryError:
        if vae.use_tiling:
            raise
        picture = None  # made anew outside, where the failed attempt holds nothing any more
    if picture is None:
        say("the VAE goes on in tiles, for the GPU's memory is not enough for whole pictures")
        tile_vae(vae, max(latents.shape[2:]) * pipe.vae_scale_factor // 2)
        picture = vae.decode(latents, return_dict=False)[0]
    _refuse_not_finite(picture, request, "the VAE")
    pixels = ((picture[0] / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _refuse_not_finite(tensor: Tensor, request: Request, part: str) -> None:
    """They would be saved as black."""
    if not tensor.isfinite().all():
        mend = "model.precision=fp32 or another model.vae" if part == "the VAE" else "model.precision=bf16 or fp32"
        raise RunError(
            f"{request.prompt!r} with seed {request.seed}: {part} gave numbers that are not finite; use {mend}"
        )


@contextmanager
def _without_overflow(vae: AutoencoderKL, device: torch.device) -> Iterator[None]:
    """SDXL's own VAE overflows in float16, which it says as force_upcast: for a while it computes in bfloat16, whose
    range is float32's at half the memory, or where the device has none in float32. Its weights come back to the bit."""
    if not (vae.config.force_upcast and vae.dtype == torch.float16):
        yield
        return
    kept = [(parameter, parameter.data) for parameter in vae.parameters()]
    best = pick_dtype("auto", device)
    vae.to(torch.float32 if best == torch.float16 else best)
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
