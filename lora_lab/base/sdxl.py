"""Stable Diffusion XL as a base model: the only module that names its classes, components and conditioning."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionXLPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import ImageProjection
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer, CLIPVisionModelWithProjection, PreTrainedTokenizerBase

from lora_lab.base.controlnet import UNION_TYPES, ControlNet, is_union, load_controlnet
from lora_lab.base.encode import identity_of, on_device, rules_of
from lora_lab.base.layers import split_geglu_
from lora_lab.base.load import (
    SDXL_CONFIG,
    DiffusionSchedule,
    pick_dtype,
    published_scheduler,
    resolve_prediction_type,
    vae_remedy,
    validate_prediction_type,
    with_prediction_type,
)
from lora_lab.base.locate import loading, locate_model, refuse_pickle
from lora_lab.base.protocol import Conditioning, Forms, MemoryProfile
from lora_lab.base.single_file import read_single_file
from lora_lab.console import quiet_loading, say
from lora_lab.errors import RunError
from lora_lab.settings.schema import Likeness, Loss, Model, Structure
from lora_lab.settings.sections import WINDOWS
from lora_lab.settings.setting import call_target

# How kohya's scripts, and every program that reads their files, name the components.
LORA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

FP16_VAE = "madebyollin/sdxl-vae-fp16-fix"  # gives the images of SDXL's, which overflows in fp16
FEATURE_NOISE = 10  # a tenth of the schedule: features of the tiny base hardly differ between .05 and .2


class SDXL:
    """A base.protocol.BaseModel around diffusers' pipeline."""

    network_name = "unet"
    # The names that ComfyUI, AUTOMATIC1111 and Forge look for.
    embedding_keys: Mapping[str, str] = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    text_targets = ("q_proj", "k_proj", "v_proj", "out_proj")  # diffusers reads no file that lacks one of them
    lora_metadata: Mapping[str, str] = {
        "ss_base_model_version": "sdxl_base_v1-0",  # Forge lists a file for SDXL only if this begins with sdxl_
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    }
    memory = MemoryProfile(
        linears=2.233e9,
        convolutions=0.333e9,
        text_encoders=0.818e9,
        adapter=1.45e6,
        activations={False: (350, 4610), True: (450, 560)},
        sampling=1300,
        decoding={False: 3400, True: 1050},
        image_area=1024 * 1024,
    )

    def __init__(self, pipe: StableDiffusionXLPipeline) -> None:
        self.pipe = pipe
        self.text_window = WINDOWS[77]
        self.controlnet: ControlNet | None = None
        self.control_type = 0  # of a union ControlNet

    @classmethod
    def load(cls, model: Model, device: torch.device, waiting: bool = False) -> "SDXL":
        """The frozen pipeline on `device`, or with `waiting` on the CPU; in either case in the precision for `device`.

        Raises InputError if the base cannot be read."""
        quiet_loading()
        dtype = pick_dtype(model.precision, device)
        base = locate_model("model.base", model.base)
        name = _vae_of(model, base)
        vae = None if name is None else _load_vae(name, dtype)
        with loading(base, f"model.base={model.base}: cannot be loaded as SDXL"):
            pipe = _load_pipeline(base, model, dtype, {} if vae is None else {"vae": vae})
            _refuse_missing_tensors(pipe)
        for component in _components(pipe).values():
            component.requires_grad_(False).eval()
        split_geglu_(pipe.unet)
        pipe.set_progress_bar_config(disable=True)
        pipe.watermark = None  # it changes the pixels that are trained on and compared
        return cls(pipe if waiting else pipe.to(device))

    @classmethod
    def validate_loss(cls, model: Model, loss: Loss) -> Loss:
        """See validate_prediction_type. Raises InputError."""
        return validate_prediction_type(model, loss)

    # --- components

    @property
    def components(self) -> dict[str, nn.Module]:
        """The UNet and both text encoders."""
        return {name: getattr(self.pipe, name) for name in LORA_PREFIXES}

    @property
    def network(self) -> nn.Module:
        """The UNet."""
        return self.pipe.unet

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """CLIP ViT-L and OpenCLIP ViT-bigG."""
        return {name: getattr(self.pipe, name) for name in self.embedding_keys}

    @property
    def autoencoder(self) -> nn.Module:
        """The VAE."""
        return self.pipe.vae

    @property
    def dtype(self) -> torch.dtype:
        """The data type that the UNet computes in: that of the text embeddings."""
        return self.pipe.text_encoder_2.dtype

    @property
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        """Those of both text encoders."""
        return [self.pipe.tokenizer, self.pipe.tokenizer_2]

    @tokenizers.setter
    def tokenizers(self, tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
        self.pipe.tokenizer, self.pipe.tokenizer_2 = tokenizers

    # --- text

    @property
    def zeros_for_empty_text(self) -> bool:
        """True of SDXL itself; a base that was trained with an encoded "" says otherwise."""
        return self.pipe.config.force_zeros_for_empty_prompt

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], device: torch.device, offload: bool) -> list[Conditioning]:
        """`prompt_embeds` (W, 2048), of both encoders side by side, and `pooled_prompt_embeds` (1280,), of the second,
        for each text, on the CPU, where W is `text_window`; for W = 77 bit-identical to diffusers' encode_prompt.

        Each encoder does all texts before the next one begins. Texts are cut after W tokens (stage=check names them).
        Raises RunError, naming the text, for non-finite values."""
        hidden, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders.values(), strict=True):
            with on_device(encoder, device, offload):
                ids = [_token_ids(tokenizer, text, self.text_window)[None].to(encoder.device) for text in texts]
                outputs = [[value[0].cpu() for value in _encode(encoder, chunks)] for chunks in ids]
            hidden.append([layer for layer, _ in outputs])
            pooled = [embedding for _, embedding in outputs]  # of the last encoder
        encoded = [
            {"prompt_embeds": torch.cat(layers, dim=-1).to(self.dtype), "pooled_prompt_embeds": embedding}
            for layers, embedding in zip(zip(*hidden, strict=True), pooled, strict=True)
        ]
        for text, conditioning in zip(texts, encoded, strict=True):
            if not all(value.isfinite().all() for value in conditioning.values()):
                raise RunError(f"{text!r}: the text encoders gave values that are not finite; use model.precision=fp32")
        return encoded

    def tokenize(self, caption: str, tokenizers: Sequence[PreTrainedTokenizerBase]) -> Conditioning:
        """`input_ids` (2, N, 77), the N chunks of either encoder, and `has_caption` (), true."""
        ids = torch.stack([_token_ids(tokenizer, caption, self.text_window) for tokenizer in tokenizers])
        return {"input_ids": ids, "has_caption": torch.tensor(True)}

    def encode_tokens(self, conditioning: Conditioning) -> Conditioning:
        """`conditioning` with `prompt_embeds` (B, W, 2048) and `pooled_prompt_embeds` (B, 1280) in place of
        `input_ids` (B, 2, N, 77) and `has_caption` (B,), as encode_texts has them: zeros where there is no caption."""
        rest = dict(conditioning)
        ids, dropped = rest.pop("input_ids"), ~rest.pop("has_caption")
        layers, outputs = zip(*(_encode(e, ids[:, i]) for i, e in enumerate(self.text_encoders.values())), strict=True)
        pooled = outputs[-1]
        hidden = torch.cat(layers, dim=-1).to(pooled.dtype)
        return {
            "prompt_embeds": hidden.masked_fill(dropped[:, None, None], 0),
            "pooled_prompt_embeds": pooled.masked_fill(dropped[:, None], 0),
            **rest,
        }

    def drop_text(self, conditioning: Conditioning) -> Conditioning:
        """Zeros in place of a text's embeddings; of token ids, `has_caption` turned off."""
        dropped = ("has_caption",) if "has_caption" in conditioning else ("prompt_embeds", "pooled_prompt_embeds")
        return {name: torch.zeros_like(value) if name in dropped else value for name, value in conditioning.items()}

    def size_conditioning(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> Conditioning:
        """`time_ids` (6,): original height and width, crop top and left, target height and width, all in pixels.

        Source: Podell et al. 2023, arXiv 2307.01952, section 2.2."""
        return {"time_ids": torch.tensor([*original, *crop, *target], dtype=torch.float32)}

    # --- images

    @property
    def latent_channels(self) -> int:
        """4."""
        return self.pipe.vae.config.latent_channels

    @property
    def pixels_per_latent(self) -> int:
        """8."""
        return self.pipe.vae_scale_factor

    @torch.no_grad()
    def encode_image(self, image: Image.Image, name: str) -> Tensor:
        """Latents (4, H / 8, W / 8), float32 on the CPU, of an RGB image whose sides are multiples of 8.

        They are the scaled mean of the VAE's posterior: its spread is a thousandth of the noise that training adds.
        SDXL's own VAE overflows in float16; a VAE with `force_upcast` therefore encodes in float32. Raises RunError for
        non-finite values."""
        vae, dtype = self.pipe.vae, self.pipe.vae.dtype
        upcast = vae.config.force_upcast and dtype == torch.float16
        if upcast:
            vae.float()
        pixels = VaeImageProcessor().preprocess(image).to(vae.device, vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode()[0].float() * vae.config.scaling_factor
        if upcast:
            vae.to(dtype)
        if not latents.isfinite().all():
            raise RunError(f"{name}: the VAE gave values that are not finite; use {vae_remedy(dtype)}")
        return latents.cpu().contiguous()

    def encode_photo(self, photo: Image.Image) -> Callable[[torch.Generator], Tensor]:
        """A function that draws latents (1, 4, H / 8, W / 8) from the VAE's posterior of the photo."""
        autoencoder, dtype = self.pipe.vae, self.dtype
        pixels = self.pipe.image_processor.preprocess(photo).to(autoencoder.device, autoencoder.dtype)
        posterior = autoencoder.encode(pixels).latent_dist
        return lambda generator: posterior.sample(generator).to(dtype) * autoencoder.config.scaling_factor

    @torch.no_grad()
    def features(self, latents: Tensor) -> Tensor:
        """The middle block's output (B, 1280, h / 4, w / 4), float32, for latents (B, 4, h, w) with a tenth of the
        schedule's noise, always the same, and an empty text (Tang et al. 2023, arXiv 2306.03881)."""
        unet, device, seen = self.network, latents.device, []
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(device)
        schedule = DDPMScheduler.from_config(self.pipe.scheduler.config)
        timesteps = torch.tensor([schedule.config.num_train_timesteps // FEATURE_NOISE], device=device)
        noisy = schedule.add_noise(latents, noise.expand_as(latents), timesteps)
        size = tuple(side * self.pixels_per_latent for side in latents.shape[2:])
        conditioning = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in self.text_forms().items()}
        conditioning |= self.size_conditioning(size, (0, 0), size)
        batch = {name: value.to(device).expand(len(latents), *value.shape) for name, value in conditioning.items()}
        handle = unet.mid_block.register_forward_hook(lambda _, __, output: seen.append(output.float()))
        try:
            with torch.compiler.set_stance("force_eager"):
                self.predict(unet, noisy, timesteps, batch)
        finally:
            handle.remove()
        return seen[0]

    def decode(self, latents: Tensor) -> Tensor:
        """The image (1, 3, 8 h, 8 w), values from -1 to 1, of latents (1, 4, h, w).

        After an out-of-memory error the VAE decodes in tiles from then on."""
        vae = self.pipe.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor
        try:
            return vae.decode(latents, return_dict=False)[0]
        except torch.OutOfMemoryError:
            if vae.use_tiling:
                raise
        # Outside of the except clause, where the failed attempt no longer holds memory.
        say("the GPU's memory is not enough to decode whole images: the VAE decodes in tiles from now on")
        self.enable_tiling(max(latents.shape[2:]) * self.pixels_per_latent // 2)
        return vae.decode(latents, return_dict=False)[0]

    @contextmanager
    def autoencoder_in_range(self, device: torch.device) -> Iterator[None]:
        """Within the context a VAE that overflows in float16 (`force_upcast`) computes in bfloat16, whose range is that
        of float32 at half the memory, or in float32 where the device has no bfloat16. Its weights come back
        bit-identical."""
        vae = self.pipe.vae
        if not (vae.config.force_upcast and vae.dtype == torch.float16):
            yield
            return
        weights = [(parameter, parameter.data) for parameter in vae.parameters()]
        best = pick_dtype("auto", device)
        vae.to(torch.float32 if best == torch.float16 else best)
        try:
            yield
        finally:
            for parameter, data in weights:
                parameter.data = data

    def enable_tiling(self, side: int) -> None:
        """Let the VAE encode and decode tiles of at most `side` px, which overlap by a quarter and are blended there.

        Attention and group norms see one tile at a time, so tints may differ a little between tiles."""
        vae = self.pipe.vae
        vae.enable_tiling()
        # diffusers' own tiles are as large as the images that the VAE was trained on, which an image may not exceed.
        vae.tile_latent_min_size = max(side // self.pixels_per_latent // 4, 1) * 4  # a quarter of it is whole latents
        vae.tile_sample_min_size = vae.tile_latent_min_size * self.pixels_per_latent

    # --- training and sampling

    def resolve_loss(self, loss: Loss) -> Loss:
        """See resolve_prediction_type. Raises InputError."""
        return resolve_prediction_type(loss, self.pipe.scheduler.config)

    def noise_schedule(self, loss: Loss) -> DiffusionSchedule:
        """The schedule of the pipeline's scheduler, with the prediction of the resolved `loss`."""
        return DiffusionSchedule(self.pipe.scheduler.config, loss.prediction, loss.zero_terminal_snr)

    def apply_loss(self, loss: Loss) -> None:
        """Give the pipeline, from which training and every sampler take it, a scheduler as `loss` names it.

        Raises InputError."""
        self.pipe.scheduler = with_prediction_type(self.pipe.scheduler, self.resolve_loss(loss))

    def solver(self, settings: dict[str, Any]) -> SchedulerMixin:
        """The scheduler of diffusers that `settings` name, on the base's noise schedule."""
        return call_target("sampler.scheduler", settings, self.pipe.scheduler.config)

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """What the UNet predicts from `noisy` (B, 4, h, w) at `timesteps` (B,) or (1,), of that shape.

        `conditioning` has prompt_embeds (B, W, 2048), pooled_prompt_embeds (B, 1280) and time_ids (B, 6)."""
        embeds = conditioning["prompt_embeds"]
        added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": conditioning["time_ids"]}
        noisy = noisy.to(embeds.dtype)  # the base's own precision, in which everything but the loss is computed
        if "image_embeds" in conditioning:
            added["image_embeds"] = [conditioning["image_embeds"]]
        options = {"added_cond_kwargs": added, "return_dict": False}
        residuals = {}
        if "control_image" in conditioning:
            residuals = self._control_residuals((noisy, timesteps, embeds), conditioning, options)
        return network(noisy, timesteps, embeds, **residuals, **options)[0]

    # --- structure and likeness of a photo

    @property
    def control_networks(self) -> Sequence[nn.Module]:
        """The ControlNet."""
        return () if self.controlnet is None else (self.controlnet,)

    def load_control(self, structure: Structure, device: torch.device, waiting: bool = False) -> None:
        """Load the ControlNet, or the union ControlNet, of `structure` in the precision of the base; of structure=off
        none. Raises InputError if it cannot be read, was made for another base, or does not know `structure.kind`."""
        self.controlnet = None
        if structure.kind != "off":
            network = load_controlnet(structure, self.pipe.unet, self.pixels_per_latent, self.dtype)
            self.controlnet = network if waiting else network.to(device)
            self.control_type = UNION_TYPES[structure.kind]

    def control_conditioning(self, image: Image.Image, scale: float) -> Conditioning:
        """`control_image` (3, H, W), values from 0 to 1, `control_scale` (), and for a union ControlNet `control_type`
        (T,), 1 at the kind of the image and 0 elsewhere."""
        processor = VaeImageProcessor(vae_scale_factor=self.pixels_per_latent, do_normalize=False)
        conditioning = {"control_image": processor.preprocess(image)[0], "control_scale": torch.tensor(scale)}
        if is_union(self.controlnet):
            kinds = torch.arange(self.controlnet.config.num_control_type)
            conditioning["control_type"] = (kinds == self.control_type).float()
        return {name: value.to(self.dtype) for name, value in conditioning.items()}

    def _control_residuals(self, inputs: tuple[Tensor, ...], conditioning: Conditioning, options: dict) -> dict:
        """What the ControlNet adds to the outputs of the UNet's blocks, as arguments of the UNet."""
        image, scale = conditioning["control_image"], conditioning["control_scale"]
        control: dict[str, Any] = {"controlnet_cond": image}
        if "control_type" in conditioning:
            control = {"controlnet_cond": [image], "control_type_idx": [self.control_type]}
            control["control_type"] = conditioning["control_type"]
        down, middle = self.controlnet(*inputs, **control, **options)
        scale = scale[:, None, None, None]  # a tensor, so that a CUDA graph serves any scale
        residuals = {"down_block_additional_residuals": [sample * scale for sample in down]}
        return residuals | {"mid_block_additional_residual": middle * scale}

    def load_likeness(self, likeness: Likeness, device: torch.device) -> None:
        """Load the IP-Adapter of `likeness` into the UNet, and its image encoder; of likeness=off remove the last.

        Raises InputError if one of them cannot be read or was made for another base."""
        self._unload_likeness()
        if likeness.kind == "off":
            return
        state, encoder = _load_ip_adapter(likeness, self.dtype)
        encoder.to(next(self.pipe.unet.parameters()).device)
        self.pipe.register_modules(image_encoder=encoder.requires_grad_(False).eval())
        with loading(likeness.weights, f"likeness.weights={likeness.weights}: it is no IP-Adapter of this base"):
            self.pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
        self.pipe.unet.requires_grad_(False).eval()
        self.pipe.set_ip_adapter_scale(likeness.scale)

    def unload_conditions(self) -> None:
        """See PhotoConditioned."""
        self.controlnet = None
        self._unload_likeness()

    def _unload_likeness(self) -> None:
        if self.pipe.image_encoder is not None:
            self.pipe.unload_ip_adapter()

    def likeness_conditioning(
        self, photos: Sequence[Image.Image], device: torch.device, offload: bool
    ) -> list[tuple[Conditioning, Conditioning]]:
        """`image_embeds` (1, D), or of a "plus" adapter (1, N, D), of each photo and of no photo, on the CPU."""
        (projection,) = self.pipe.unet.encoder_hid_proj.image_projection_layers
        hidden = not isinstance(projection, ImageProjection)
        with on_device(self.pipe.image_encoder, device, offload):
            pairs = [self.pipe.encode_image(photo, device, 1, hidden) for photo in photos]
        return [tuple({"image_embeds": embeds.to(self.dtype).cpu()} for embeds in pair) for pair in pairs]

    # --- files

    def text_identity(self) -> list[str]:
        """The hashes of both encoders and both tokenizers, and the window of long texts; takes seconds."""
        window = [f"window {self.text_window}"] if self.text_window > WINDOWS[77] else []
        return [*map(identity_of, self.text_encoders.values()), *map(rules_of, self.tokenizers), *window]

    def text_forms(self) -> Forms:
        """Shape and dtype of the tensors of encode_texts."""
        first, second = self.pipe.text_encoder, self.pipe.text_encoder_2
        width = first.config.hidden_size + second.config.hidden_size
        return {
            "prompt_embeds": ((self.text_window, width), second.dtype),
            "pooled_prompt_embeds": ((second.config.projection_dim,), second.dtype),
        }

    def image_identity(self) -> str:
        """The hash of the VAE, and the size of its tiles; takes a second."""
        autoencoder = self.pipe.vae
        tiles = f" in tiles of {autoencoder.tile_sample_min_size}" if autoencoder.use_tiling else ""
        return identity_of(autoencoder) + tiles

    @staticmethod
    def lora_key(component: str, module: str) -> str:
        """kohya's name of a module. transformers 5 dropped "text_model." from the first encoder's names; every other
        program expects it."""
        if component != SDXL.network_name and not module.startswith("text_model."):
            module = "text_model." + module
        return f"{LORA_PREFIXES[component]}_{module.replace('.', '_')}"

    def load_lora(self, file: Path, adapter: str) -> None:
        """Through diffusers, which reads the keys of kohya's scripts, its own, and those of other programs."""
        # Without use_safetensors a damaged file would be tried as a pickle.
        self.pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter, use_safetensors=True)


def _vae_of(model: Model, base: str) -> str | None:
    """The VAE in place of the base's; None for that."""
    if model.vae != "auto":
        return model.vae
    return None if Path(base).is_file() else FP16_VAE


def _load_vae(name: str, dtype: torch.dtype) -> AutoencoderKL:
    location = locate_model("model.vae", name)
    with loading(location, f"model.vae={name}: cannot be loaded"):
        if Path(location).is_file():
            return AutoencoderKL.from_single_file(location, dtype=dtype)
        return AutoencoderKL.from_pretrained(location, dtype=dtype)


def _load_ip_adapter(likeness: Likeness, dtype: torch.dtype) -> tuple[dict, CLIPVisionModelWithProjection]:
    """The tensors of an IP-Adapter as diffusers takes them, and its image encoder."""
    refuse_pickle("likeness.weights", likeness.weights)
    location = locate_model("likeness.adapter", likeness.adapter)
    names = f"likeness.weights={likeness.weights} and likeness.encoder={likeness.encoder}"
    with loading(location, f"likeness.adapter={likeness.adapter}: cannot be loaded with {names}"):
        file = Path(location) / likeness.weights
        state = load_file(file if Path(location).is_dir() else hf_hub_download(location, likeness.weights))
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            location, subfolder=likeness.encoder, dtype=dtype, use_safetensors=True
        )
    parts = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in state.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = tensor
    return parts, encoder


def _load_pipeline(base: str, model: Model, dtype: torch.dtype, components: dict) -> StableDiffusionXLPipeline:
    if Path(base).is_file():
        single = read_single_file(Path(base), has_vae="vae" in components)
        # Such a file has only weights; configurations and tokenizers come from model.config or this package.
        config = str(model.config or SDXL_CONFIG)
        if model.config is None:
            folder = SDXL_CONFIG / "tokenizer"
            components |= {"tokenizer": CLIPTokenizer.from_pretrained(folder, trust_remote_code=False)}
            second = CLIPTokenizer.from_pretrained(folder, pad_token="!", trust_remote_code=False)
            components |= {"tokenizer_2": second}
        pipe = StableDiffusionXLPipeline.from_single_file(
            base, dtype=dtype, config=config, local_files_only=True, **components
        )
        pipe.scheduler = EulerDiscreteScheduler.from_config(single.scheduler(published_scheduler(model)))
        return pipe
    variant = None if Path(base).is_dir() else model.variant
    # An explicit dtype everywhere: without one the text encoders get the file's, and the UNet float32.
    return StableDiffusionXLPipeline.from_pretrained(
        base, dtype=dtype, variant=variant, trust_remote_code=False, **components
    )


def _refuse_missing_tensors(pipe: StableDiffusionXLPipeline) -> None:
    """Raise ValueError where a single file lacks tensors: diffusers is silent, and leaves parameters without memory."""
    for name, component in _components(pipe).items():
        missing = [key for key, parameter in component.named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(f"it has no {name}.{missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1)))


def _components(pipe: StableDiffusionXLPipeline) -> dict[str, nn.Module]:
    return {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}


def _encode(encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of token ids (B, N, 77), N chunks of each text, the last hidden layer but one (B, 75 N + 2, width), and the
    encoder's first output for the first chunk (B, ...), which is the pooled text of SDXL's second encoder.

    Between chunks neither start nor end markers remain, as in kohya's scripts."""
    output = encoder(ids.flatten(0, 1), output_hidden_states=True)
    hidden = output.hidden_states[-2].unflatten(0, ids.shape[:2])
    text = hidden[:, :, 1:-1].flatten(1, 2)
    return torch.cat([hidden[:, 0, :1], text, hidden[:, -1, -1:]], dim=1), output[0].unflatten(0, ids.shape[:2])[:, 0]


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> Tensor:
    """Token ids (N, 77) of a text that is cut or padded to `window` = 75 N + 2; each chunk of 75 has start and end
    markers as if it were a text of its own.

    kohya's scripts take a "!", with which SDXL's second tokenizer pads, for no text at the ends of a chunk."""
    size = tokenizer.model_max_length - 2
    tokens = tokenizer(text, padding="max_length", max_length=window, truncation=True, return_tensors="pt")
    ids, count = tokens.input_ids[0], int(tokens.attention_mask.sum()) - 2
    if window == size + 2:
        return ids[None]
    chunks, places = ids[1:-1].view(-1, size).clone(), torch.arange(window - 2).view(-1, size)
    chunks[:, 0][places[:, 0] > count] = tokenizer.eos_token_id  # a chunk without text is an empty text
    last = torch.where(places[:, -1:] < count, tokenizer.eos_token_id, ids[-1])
    return torch.cat([ids[:1].expand(len(chunks), 1), chunks, last], dim=1)
