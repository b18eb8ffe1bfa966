"""Sample images: text-to-image and img2img in one function, for validation, the img2img stage and everything else."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from lora_lab.base.cache import Cache
from lora_lab.base.cuda_graph import GraphedCallable, GraphPool, Tensors
from lora_lab.base.encode import Encoder, on_device
from lora_lab.base.protocol import BaseModel, Conditioning, Solver
from lora_lab.console import bar
from lora_lab.errors import InputError, RunError
from lora_lab.settings.schema import Sampler


@dataclass(frozen=True)
class Request:
    """One image to sample. With a `photo` (RGB, sides multiples of the base's step) it is img2img of its size."""

    prompt: str
    seed: int
    size: tuple[int, int]  # width, height in pixels
    photo: Image.Image | None = None
    strength: float = 1.0

    @property
    def form(self) -> tuple[object, ...]:
        """What the requests of a batch have in common: the size, and how much noise they begin with."""
        return (self.size, None) if self.photo is None else (self.photo.size, self.strength)


def check_strength(steps: int, strength: float) -> None:
    """Raise InputError where int(steps * strength), the steps that diffusers runs, is 0: it crashes there."""
    if int(steps * strength) < 1:
        raise InputError(
            f"stage.strength={strength} with sampler.steps={steps} leaves no step to run: "
            f"use a strength of at least {math.ceil(100 / steps) / 100} or more steps"
        )


# Not inference_mode: components are moved in here, and tensors made under it could never again take part in a gradient.
@torch.no_grad()
def generate(
    base: BaseModel, requests: list[Request], sampler: Sampler, encoder: Encoder | None = None
) -> Iterator[Image.Image]:
    """Sample every request with `base` and what is attached to it (adapters.attach.lora_attached); yields the images in
    the order of the requests.

    `encoder` (of `base`) says on which device, and whether components are offloaded: then one component at a time is on
    the device, and all images wait as latents for the autoencoder. Without it all of `base` is on one device.
    Noise comes from a CPU generator, so a seed gives the same noise on every device; in batches of one an image does
    not depend on the other requests.
    Raises InputError for a strength that leaves no step, RunError, naming the request, for non-finite values."""
    for request in requests:
        if request.photo is not None:
            check_strength(sampler.steps, request.strength)
    encoder = encoder or Encoder(base, next(base.network.parameters()).device, Cache(None), offload=False)
    base.network.eval()  # the next training step sets its own mode
    texts, photos = _encode_prompts(requests, sampler, encoder), _encode_photos(requests, encoder)
    latents = _all_latents(requests, sampler, encoder, texts, photos)
    sampled = bar(zip(requests, latents, strict=True), total=len(requests), desc="draw", unit="picture", leave=False)
    if encoder.offload:
        sampled = list(sampled)
    device = encoder.device
    with on_device(base.autoencoder, device, encoder.offload), base.autoencoder_in_range(device):
        for request, image_latents in sampled:
            yield _decode(base, request, image_latents)


@dataclass(frozen=True)
class _Prompts:
    encoded: dict[str, Conditioning]  # by prompt, without a batch dimension
    negative: Conditioning | None  # what guidance leads away from; None without guidance

    def conditioning(self, batch: list[Request], device: torch.device) -> Conditioning:
        """Each tensor (B, ...); with guidance the negative prompt is the first half of B."""
        rows = [self.encoded[request.prompt] for request in batch]
        if self.negative is not None:
            rows = [self.negative] * len(rows) + rows
        return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}


def _encode_prompts(requests: list[Request], sampler: Sampler, encoder: Encoder) -> _Prompts:
    base, negative = encoder.base, sampler.negative_prompt
    guided = sampler.guidance > 1
    zeros = not negative and base.zeros_for_empty_text  # as the base was trained without a caption
    if any(getattr(text_encoder, "peft_config", None) for text_encoder in base.text_encoders.values()):
        encoder = replace(encoder, cache=Cache(None))  # it holds what the base alone makes of a text
    prompts = [request.prompt for request in requests] + [negative] * (guided and not zeros)
    encoded, _ = encoder.encode_texts(prompts)
    if not guided or not encoded:
        return _Prompts(encoded, None)
    if not zeros:
        return _Prompts(encoded, encoded[negative])
    return _Prompts(encoded, base.drop_text(next(iter(encoded.values()))))


Photos = dict[int, Callable[[torch.Generator], Tensor]]  # BaseModel.encode_photo of a photo, by its id()


def _encode_photos(requests: list[Request], encoder: Encoder) -> Photos:
    """Every photo encoded once, however many seeds it has."""
    photos = {id(request.photo): request.photo for request in requests if request.photo is not None}
    if not photos:
        return {}
    base, device = encoder.base, encoder.device
    with on_device(base.autoencoder, device, encoder.offload), base.autoencoder_in_range(device):
        return {key: base.encode_photo(photo) for key, photo in photos.items()}


def _all_latents(
    requests: list[Request], sampler: Sampler, encoder: Encoder, prompts: _Prompts, photos: Photos
) -> Iterator[Tensor]:
    """The latents (1, C, h, w) of every request; neighbours of one form go through the network in one batch."""
    base = encoder.base

    def batches() -> Iterator[Tensor]:
        predict = predictor(base, encoder.graphs, sampler.capture)
        denoiser = _Denoiser(encoder, sampler, prompts, photos, predict, base.solver(sampler.scheduler))
        for _, neighbours in groupby(requests, key=lambda request: request.form):
            group = list(neighbours)
            for start in range(0, len(group), sampler.batch_size):
                yield from denoiser.latents(group[start : start + sampler.batch_size]).split(1)

    with on_device(base.network, encoder.device, encoder.offload):
        yield from batches()  # when it ends its CUDA graphs are freed, before the network is moved


def predictor(base: BaseModel, graphs: GraphPool, capture: bool) -> Callable[[Tensors], Tensor]:
    """The base's network as a function of tensors: sample (B, C, h, w), timestep (1,) and the conditioning, each
    (B, ...), to the prediction (B, C, h, w). Sampling calls the network here only.

    With `capture` it becomes a CUDA graph, which is valid as long as the weights keep their addresses."""
    network: nn.Module = base.network

    def predict(inputs: Tensors) -> Tensor:
        conditioning = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
        with torch.compiler.set_stance("force_eager"):  # blocks compiled for training would be compiled again here
            return base.predict(network, inputs["sample"], inputs["timestep"], conditioning)

    if not capture or graphs.device.type != "cuda":
        return predict
    graphed = GraphedCallable(predict, graphs)
    return lambda inputs: graphed(inputs).clone()  # the next step overwrites it, and a solver may keep it


@dataclass(frozen=True)
class _Denoiser:
    encoder: Encoder
    sampler: Sampler
    prompts: _Prompts
    photos: Photos
    predict: Callable[[Tensors], Tensor]
    solver: Solver

    def latents(self, batch: list[Request]) -> Tensor:
        """The latents (B, C, h, w) of requests of one form, the noise of each from its own generator."""
        solver, sampler, base, device = self.solver, self.sampler, self.encoder.base, self.encoder.device
        # On the CPU: some solvers look values up by the timestep, and would wait for a GPU at every step.
        solver.set_timesteps(sampler.steps)
        skipped = 0 if batch[0].photo is None else sampler.steps - int(sampler.steps * batch[0].strength)
        timesteps = solver.timesteps[skipped * solver.order :]
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(skipped * solver.order)
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in batch]
        conditioning = self.prompts.conditioning(batch, device)
        dtype, rows = base.dtype, len(next(iter(conditioning.values())))
        latents = torch.cat([self._initial(*pair, timesteps[:1]) for pair in zip(batch, generators, strict=True)])
        size = tuple(side * base.pixels_per_latent for side in latents.shape[2:])
        for name, value in base.size_conditioning(size, (0, 0), size).items():
            conditioning[name] = value.to(device, dtype).expand(rows, *value.shape)
        options = {"eta": 0.0, "generator": generators if len(batch) > 1 else generators[0]}
        options = {name: options[name] for name in inspect.signature(solver.step).parameters if name in options}
        on_device = timesteps.to(device)
        for i, timestep in enumerate(timesteps):
            sample = solver.scale_model_input(torch.cat([latents] * (rows // len(batch))), timestep)
            prediction = self.predict({"sample": sample, "timestep": on_device[i : i + 1], **conditioning})
            if self.prompts.negative is not None:
                negative, positive = prediction.chunk(2)
                prediction = negative + sampler.guidance * (positive - negative)
            latents = solver.step(prediction, timestep, latents, **options, return_dict=False)[0]
        return latents

    def _initial(self, request: Request, generator: torch.Generator, timestep: Tensor) -> Tensor:
        """Noise, or the photo's latents with the noise of `timestep` (1,): (1, C, h, w)."""
        base, device = self.encoder.base, self.encoder.device
        if request.photo is None:
            width, height = (side // base.pixels_per_latent for side in request.size)
            shape = (1, base.latent_channels, height, width)
            return randn_tensor(shape, generator, device, base.dtype) * self.solver.init_noise_sigma
        latents = self.photos[id(request.photo)](generator)
        noise = randn_tensor(latents.shape, generator, device, base.dtype)
        return self.solver.add_noise(latents, noise, timestep)


def _decode(base: BaseModel, request: Request, latents: Tensor) -> Image.Image:
    """The image of latents (1, C, h, w)."""
    _refuse_not_finite(latents, request, f"the {base.network_name}", "model.precision=bf16 or fp32")
    pixels = base.decode(latents)
    _refuse_not_finite(pixels, request, "the VAE", "model.precision=fp32 or another model.vae")
    pixels = ((pixels[0] / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _refuse_not_finite(tensor: Tensor, request: Request, component: str, remedy: str) -> None:
    """Raise RunError for values that would be saved as a black image."""
    if not tensor.isfinite().all():
        raise RunError(
            f"{request.prompt!r} with seed {request.seed}: {component} gave values that are not finite; use {remedy}"
        )
