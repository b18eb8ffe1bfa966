"""Sample images: text-to-image and img2img in one function; fixed prompts and seeds with and without a LoRA; photos."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from lora_lab.adapters.inject import AttachedLoRA, lora_attached
from lora_lab.base.cuda_graph import GraphedCallable, GraphPool, Tensors
from lora_lab.base.encode import Cache, Encoder, key_of, on_device
from lora_lab.base.layers import quantize_
from lora_lab.base.load import load_base, vae_remedy, validate_prediction
from lora_lab.base.locate import hash_model, locate_folder, locate_model
from lora_lab.base.protocol import BaseModel, Conditioning, PhotoConditioned, Solver
from lora_lab.captions.refiner import Refiner, run_refiner
from lora_lab.console import bar, say
from lora_lab.errors import InputError, RunError
from lora_lab.images.dataset import say_unused
from lora_lab.images.pixels import Size, fit, nearest_bucket
from lora_lab.images.scan import find_pictures
from lora_lab.runs import save_picture
from lora_lab.settings.schema import Loss, Memory, Model, Sampler, Text, base_image_settings, values_of
from lora_lab.shared import Shared


@dataclass(frozen=True)
class Control:
    """A control image, for the ControlNet that PhotoConditioned.load_control has loaded."""

    image: Image.Image  # RGB, of the size of the request
    scale: float  # weight of what the ControlNet adds
    end: float  # fraction of the steps after which it adds nothing


@dataclass(frozen=True)
class Request:
    """One image to sample. With a `photo` (RGB, sides multiples of the base's step) it is img2img of its size."""

    prompt: str
    seed: int
    size: tuple[int, int]  # width, height in pixels
    photo: Image.Image | None = None
    strength: float = 1.0
    control: Control | None = None
    mask: Image.Image | None = None  # mode L, of the photo's size: 255 is drawn, 0 stays the photo
    likeness: Image.Image | None = None  # RGB, for the IP-Adapter that PhotoConditioned.load_likeness has loaded
    lora_weight: float | None = None  # of the attached LoRA; None: as it was attached
    lora_schedule: tuple[float, ...] = (1.0,)  # factors of that weight, evenly spaced from the first to the last step

    @property
    def form(self) -> tuple[object, ...]:
        """What the requests of a batch have in common: the size, how much noise they begin with, until when they are
        controlled, whether they have a likeness and a mask, and the LoRA's weight."""
        size, strength = (self.size, None) if self.photo is None else (self.photo.size, self.strength)
        conditions = (self.control and self.control.end, self.likeness is not None, self.mask is not None)
        return size, strength, *conditions, self.lora_weight, self.lora_schedule


def check_strength(steps: int, strength: float, key: str = "sampler.steps") -> None:
    """Raise InputError where int(steps * strength), the steps that diffusers runs, is 0: it crashes there.

    `key` is that of `steps`."""
    if int(steps * strength) < 1:
        raise InputError(
            f"stage.strength={strength} with {key}={steps} leaves no step to run: "
            f"use a strength of at least {math.ceil(100 / steps) / 100} or more steps"
        )


# Not inference_mode: components are moved in here, and tensors made under it could never again take part in a gradient.
@torch.no_grad()
def generate(
    base: BaseModel,
    requests: list[Request],
    sampler: Sampler,
    encoder: Encoder | None = None,
    lora: AttachedLoRA | None = None,
) -> Iterator[Image.Image]:
    """Sample every request with `base` and the LoRA that adapters.inject.lora_attached has put onto it; yields the
    images in the order of the requests.

    `encoder` (of `base`) has the device, and says whether components are offloaded. If they are, one component at a
    time is on the device, and the latents of all images are sampled before the first is decoded. Without `encoder` all
    of `base` is on one device. `lora` is what lora_attached gave; only requests with a lora_weight need it.
    Noise comes from a CPU generator, so a seed gives the same noise on every device; in batches of one an image does
    not depend on the other requests.
    Raises InputError for a strength that leaves no step, RunError, naming the request, for non-finite values."""
    for request in requests:
        if request.photo is not None:
            check_strength(sampler.steps, request.strength)
    encoder = encoder or Encoder(base, next(base.network.parameters()).device, Cache(None), offload=False)
    base.network.eval()  # the next training step sets its own mode
    texts, photos = _encode_prompts(requests, sampler, encoder, lora), _encode_photos(requests, encoder)
    latents = _all_latents(requests, sampler, encoder, texts, photos, lora)
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


def _encode_prompts(
    requests: list[Request], sampler: Sampler, encoder: Encoder, lora: AttachedLoRA | None
) -> dict[float | None, _Prompts]:
    """The prompts by the LoRA's weight, since text encoders with a LoRA depend on it."""
    weights = dict.fromkeys(request.lora_weight for request in requests)
    if lora is None or {*lora.components} <= {encoder.base.network_name}:
        return dict.fromkeys(weights, _encode(requests, sampler, encoder))
    prompts = {}
    for weight in weights:
        if weight is not None:
            lora.set_weight(weight)
        prompts[weight] = _encode([request for request in requests if request.lora_weight == weight], sampler, encoder)
    return prompts


def _encode(requests: list[Request], sampler: Sampler, encoder: Encoder) -> _Prompts:
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


@dataclass(frozen=True)
class _Photos:
    """What the base makes of photos, by their id()."""

    latents: dict[int, Callable[[torch.Generator], Tensor]]  # BaseModel.encode_photo
    likenesses: dict[int, tuple[Conditioning, Conditioning]]  # PhotoConditioned.likeness_conditioning

    def likeness(self, batch: list[Request], guided: bool) -> Conditioning:
        """Each tensor (B, ...); with guidance that of no photo is the first half of B; {} without a likeness."""
        pairs = [self.likenesses[id(request.likeness)] for request in batch if request.likeness is not None]
        rows = [*(negative for _, negative in pairs if guided), *(positive for positive, _ in pairs)]
        return {name: torch.stack([row[name] for row in rows]) for name in (rows[0] if rows else ())}


def _encode_photos(requests: list[Request], encoder: Encoder) -> _Photos:
    """Every photo encoded once, however many seeds it has."""
    base, device = encoder.base, encoder.device
    photos = {id(request.photo): request.photo for request in requests if request.photo is not None}
    likenesses = {id(request.likeness): request.likeness for request in requests if request.likeness is not None}
    latents, pairs = {}, []
    if likenesses:
        pairs = base.likeness_conditioning([*likenesses.values()], device, encoder.offload)
    if photos:
        with on_device(base.autoencoder, device, encoder.offload), base.autoencoder_in_range(device):
            latents = {key: base.encode_photo(photo) for key, photo in photos.items()}
    return _Photos(latents, dict(zip(likenesses, pairs, strict=True)))


def _all_latents(
    requests: list[Request],
    sampler: Sampler,
    encoder: Encoder,
    prompts: dict[float | None, _Prompts],
    photos: _Photos,
    lora: AttachedLoRA | None,
) -> Iterator[Tensor]:
    """The latents (1, C, h, w) of every request; neighbours of one form go through the network in one batch."""
    base = encoder.base

    def batches() -> Iterator[Tensor]:
        predict = predictor(base, encoder.graphs, sampler.capture)
        denoiser = _Denoiser(encoder, sampler, prompts, photos, predict, base.solver(sampler.scheduler), lora)
        for batch in batches_of(requests, sampler.batch_size):
            yield from denoiser.latents(batch).split(1)

    with ExitStack() as moved:
        for network in (base.network, *(base.control_networks if isinstance(base, PhotoConditioned) else ())):
            moved.enter_context(on_device(network, encoder.device, encoder.offload))
        yield from batches()  # when it ends its CUDA graphs are freed, before the network is moved


def batches_of(requests: Sequence[Request], batch_size: int) -> Iterator[list[Request]]:
    """What goes through the network together: neighbours of one form, at most `batch_size`."""
    for _, neighbours in groupby(requests, key=lambda request: request.form):
        group = list(neighbours)
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def predictor(base: BaseModel, graphs: GraphPool, capture: bool) -> Callable[[Tensors], Tensor]:
    """The base's network as a function of tensors: sample (B, C, h, w), timestep (1,) and the conditioning, each
    (B, ...), to the prediction (B, C, h, w). It is the only place where sampling calls the network.

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
    prompts: dict[float | None, _Prompts]
    photos: _Photos
    predict: Callable[[Tensors], Tensor]
    solver: Solver
    lora: AttachedLoRA | None

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
        prompts, weights = self.prompts[batch[0].lora_weight], self._weights(batch[0], len(timesteps))
        conditioning = prompts.conditioning(batch, device)
        dtype, rows = base.dtype, len(next(iter(conditioning.values())))
        starts = [self._start(*pair, timesteps[:1]) for pair in zip(batch, generators, strict=True)]
        latents, *photo = map(torch.cat, zip(*starts, strict=True))
        size = tuple(side * base.pixels_per_latent for side in latents.shape[2:])
        for name, value in base.size_conditioning(size, (0, 0), size).items():
            conditioning[name] = value.to(device, dtype).expand(rows, *value.shape)
        for name, value in self.photos.likeness(batch, prompts.negative is not None).items():
            conditioning[name] = value.to(device, dtype)
        options = {"eta": 0.0, "generator": generators if len(batch) > 1 else generators[0]}
        options = {name: options[name] for name in inspect.signature(solver.step).parameters if name in options}
        control, end = self._control(batch, rows // len(batch))
        mask = None if batch[0].mask is None else torch.cat([_latent_mask(r.mask, latents) for r in batch])
        on_device = timesteps.to(device)
        for i, timestep in enumerate(timesteps):
            sample = solver.scale_model_input(torch.cat([latents] * (rows // len(batch))), timestep)
            if i in weights:
                self.lora.set_weight(weights[i])
            structure = control if (i + 1) / len(timesteps) <= end else {}  # another graph, without the ControlNet
            inputs = {"sample": sample, "timestep": on_device[i : i + 1], **conditioning, **structure}
            prediction = self.predict(inputs)
            if prompts.negative is not None:
                negative, positive = prediction.chunk(2)
                prediction = negative + sampler.guidance * (positive - negative)
            latents = solver.step(prediction, timestep, latents, **options, return_dict=False)[0]
            if mask is not None:
                latents = (1 - mask) * self._photo_at(*photo, timesteps[i + 1 : i + 2]) + mask * latents
        return latents

    def _control(self, batch: list[Request], repeats: int) -> tuple[Conditioning, float]:
        """The conditioning on the control images, each (B, ...) `repeats` times, and the fraction of the steps that
        have it."""
        if batch[0].control is None:
            return {}, 0.0
        rows = [self.encoder.base.control_conditioning(r.control.image, r.control.scale) for r in batch] * repeats
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {name: value.to(self.encoder.device) for name, value in stacked.items()}, batch[0].control.end

    def _weights(self, request: Request, steps: int) -> dict[int, float]:
        """The LoRA's weight by the step at which it changes: between the factors of the schedule it is interpolated."""
        if request.lora_weight is None:
            return {}
        points = np.linspace(0, 1, len(request.lora_schedule))
        factors = np.interp(np.linspace(0, 1, steps), points, request.lora_schedule)
        return {i: float(request.lora_weight * f) for i, f in enumerate(factors) if i == 0 or f != factors[i - 1]}

    def _start(self, request: Request, generator: torch.Generator, timestep: Tensor) -> tuple[Tensor, ...]:
        """Noise, or the photo's latents with the noise of `timestep` (1,), these latents and this noise: (1, C, h, w)
        each."""
        base, device = self.encoder.base, self.encoder.device
        if request.photo is None:
            width, height = (side // base.pixels_per_latent for side in request.size)
            shape = (1, base.latent_channels, height, width)
            return (randn_tensor(shape, generator, device, base.dtype) * self.solver.init_noise_sigma,)
        latents = self.photos.latents[id(request.photo)](generator)
        noise = randn_tensor(latents.shape, generator, device, base.dtype)
        return self.solver.add_noise(latents, noise, timestep), latents, noise

    def _photo_at(self, photo: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What replaces the latents outside of a mask: the photo's (B, C, h, w) with the noise of the next `timestep`
        (1,), or (0,) after the last (blended latent diffusion: Avrahami et al. 2023, arXiv 2206.02779)."""
        return self.solver.add_noise(photo, noise, timestep) if len(timestep) else photo


def _latent_mask(mask: Image.Image, latents: Tensor) -> Tensor:
    """The mean of a mask (mode L) over each latent (1, 1, h, w), 0 to 1."""
    pixels = torch.from_numpy(np.asarray(mask, np.float32) / 255)[None, None]
    return F.adaptive_avg_pool2d(pixels, latents.shape[2:]).to(latents)


def _decode(base: BaseModel, request: Request, latents: Tensor) -> Image.Image:
    """The image of latents (1, C, h, w)."""
    larger = "model.precision=bf16 or fp32" if base.dtype == torch.float16 else "a LoRA trained with a lower lr"
    _refuse_not_finite(latents, request, f"the {base.network_name}", larger)
    pixels = base.decode(latents)
    _refuse_not_finite(pixels, request, "the VAE", vae_remedy(base.dtype))
    pixels = ((pixels[0] / 2 + 0.5).clamp(0, 1).float() * 255).round().to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    return image if request.mask is None else Image.composite(image, request.photo, request.mask)


def _refuse_not_finite(tensor: Tensor, request: Request, component: str, remedy: str) -> None:
    """Raise RunError for values that would be saved as a black image."""
    if not tensor.isfinite().all():
        raise RunError(
            f"{request.prompt!r} with seed {request.seed}: {component} gave values that are not finite; use {remedy}"
        )


@dataclass(frozen=True)
class ImageSpec:
    """An image to render: its file's name without suffix, its prompt and its seed."""

    name: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class RenderSettings:
    """How images of fixed prompts and seeds are rendered, and where those of the base are kept."""

    sampler: Sampler
    side: int  # pixels
    base_key: str  # a hash of all that decides what the base renders, apart from prompt, seed and side
    cache: Path | None  # None keeps the base's images in the run folder


def render_settings(
    model: Model,
    loss: Loss,
    memory: Memory,
    sampler: Sampler,
    text: Text,
    cache: str | None,
    base: str,
    dtype: torch.dtype,
) -> RenderSettings:
    """How a run with these settings renders. `base` is the hash of the base's files, `dtype` its precision."""
    key = key_of("drawn", base, dtype, base_image_settings(model, loss, memory, sampler, text))
    return RenderSettings(sampler, image_side(model), key, cache and Path(cache))


def image_side(model: Model) -> int:
    """The side of a rendered image in pixels: that of the square bucket."""
    return model.resolution // model.bucket_step * model.bucket_step


def image_specs(prompts: Sequence[str], seeds: Sequence[int]) -> list[ImageSpec]:
    """Every prompt with every seed, as p0-s0, p0-s1, ..."""
    return [ImageSpec(f"p{i}-s{seed}", text, seed) for i, text in enumerate(prompts) for seed in seeds]


def load_base_for_sampling(model: Model, memory: Memory, loss: Loss, device: torch.device) -> Encoder:
    """The base, loaded for a stage that only samples, with the prediction of `loss`. Raises InputError."""
    base = load_base(model, device, waiting=memory.offload)
    if memory.vae_tiling:
        base.enable_tiling(model.resolution // 2)
    base.apply_loss(loss)
    quantize_(base.network, memory.linear_weights, memory.convolution_weights, device)
    if memory.offload:
        base.network.to("cpu")  # until it samples
    return Encoder(base, device, Cache(None), memory.offload)  # a few prompts are encoded sooner than looked up


@contextmanager
def base_for_sampling(
    shared: Shared, model: Model, memory: Memory, loss: Loss, text: Text, device: torch.device
) -> Iterator[Encoder]:
    """A context with what `load_base_for_sampling` gives, which reads as much of a text as `text` says; jobs with the
    same files and the same settings, as far as those decide the base, share it. What is loaded for photos within the
    context is removed at its end. Raises InputError."""
    sections = (model, memory, validate_prediction(model, loss))  # a LoRA file may state the base's own prediction
    settings = {v.key: v.value for s in sections for v in values_of(s) if {"images", "cost"} & {*v.facts.decides}}
    key = hash_model(locate_model("model.base", model.base)), settings, device
    with shared.base(key, lambda: load_base_for_sampling(model, memory, loss, device)) as encoder:
        encoder.base.text_window = text.window
        yield encoder
        if isinstance(encoder.base, PhotoConditioned):
            encoder.base.unload_conditions()


def render_with_lora(
    lora: Path, specs: Sequence[ImageSpec], folder: Path, settings: RenderSettings, encoder: Encoder
) -> list[Image.Image]:
    """Render `specs` with the LoRA file on the base, as inference does, and save them as `folder`/NAME.png.

    Raises InputError for a file that does not fit, RunError for non-finite values."""
    if not specs:  # attaching the file takes a second at SDXL's size
        return []
    sampler = settings.sampler
    with lora_attached(encoder.base, lora, fuse=sampler.fuse):
        images = list(generate(encoder.base, _requests(specs, settings), sampler, encoder))
    for spec, image in zip(specs, images, strict=True):
        save_image(folder / f"{spec.name}.png", image, spec, lora.name)
    return images


def render_base(
    specs: Sequence[ImageSpec], settings: RenderSettings, folder: Path, encoder: Encoder
) -> tuple[list[Image.Image], list[Path]]:
    """The base's images of `specs` without a LoRA, and their files: from the cache, or rendered and stored there.

    Without a cache the files lie in the run `folder`. Raises RunError for non-finite values."""
    place = (settings.cache or folder) / "drawn"
    files = [place / f"{key_of(settings.base_key, s.prompt, s.seed, settings.side)}.png" for s in specs]
    images = [_stored_image(file) for file in files]
    missing = [i for i, image in enumerate(images) if image is None]
    if not missing:
        return images, files
    with lora_attached(encoder.base, None):
        requests = _requests([specs[i] for i in missing], settings)
        for i, image in zip(missing, generate(encoder.base, requests, settings.sampler, encoder), strict=True):
            images[i] = image
            save_image(files[i], image, specs[i], "none")
    return images, files


def save_image(file: Path, image: Image.Image, spec: ImageSpec, lora: str) -> None:
    """Save a PNG whose metadata says how it was rendered."""
    save_picture(file, image, {"prompt": spec.prompt, "seed": spec.seed, "lora": lora})


def _requests(specs: Sequence[ImageSpec], settings: RenderSettings) -> list[Request]:
    return [Request(spec.prompt, spec.seed, (settings.side, settings.side)) for spec in specs]


def _stored_image(file: Path) -> Image.Image | None:
    """The stored image; None if there is none, or if the file is damaged, which is printed."""
    if not file.is_file():
        return None
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError):
        say(f"{file} is damaged: it is drawn again")
        return None


def find_photos(value: object, key: str) -> list[Path]:
    """The image files of the setting `key`: an image, a folder of images, or a list of either.

    Raises InputError for anything else, for a path that does not exist, and for a folder without images."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, str) for item in values):
        raise InputError(f"{key}={value}: name a picture, a folder of pictures, or a list: [me.jpg,you.png]")
    files: list[Path] = []
    for item in values:
        path = locate_folder(key, item)
        files += find_pictures(path, key).values() if path.is_dir() else [path]
        if path.is_dir() and not item.startswith("demo:"):
            say_unused([path])
    return files


@dataclass(frozen=True)
class PhotoRequest:
    """A request to draw the character in place of the subject of a photo."""

    caption: str | None  # the captioner's caption of the photo; None if the prompt was given
    request: Request  # its photo is cut to the bucket


def photo_to_request(
    photo: Image.Image,
    caption: str | None,
    refiner: Refiner,
    trigger: str,
    buckets: Sequence[Size],
    *,
    prompt: str | None = None,
    seed: int = 0,
    strength: float = 1.0,
) -> PhotoRequest:
    """Refine the captioner's caption of an RGB photo of any size to a prompt, and cut the photo to the nearest bucket.

    With a `prompt`, in which {trigger} stands for the trigger, no caption is needed. `buckets` are (width, height) in
    pixels; `strength` is above 0 (the photo itself) and at most 1 (noise only)."""
    if prompt:
        prompt = prompt.replace("{trigger}", trigger)
    else:
        (prompt,) = run_refiner(refiner, [caption], trigger)
    image = fit(photo, nearest_bucket(photo.size, buckets)).picture
    return PhotoRequest(caption, Request(prompt, seed, image.size, image, strength))
