"""Stable Diffusion XL as a base model: the only package that names its classes, components and conditioning."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin, StableDiffusionXLPipeline
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_lab.base import diffusion
from lora_lab.base.cache import identity_of, rules_of
from lora_lab.base.protocol import Conditioning, Forms, MemoryProfile
from lora_lab.base.sdxl import text, vae
from lora_lab.base.sdxl.load import load_pipeline
from lora_lab.settings.schema import Loss, Model

# How kohya's scripts, and every program that reads their files, name the components.
LORA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


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
        decoding=1050,  # where 3,400 are free it decodes whole images
        image_area=1024 * 1024,
    )

    def __init__(self, pipe: StableDiffusionXLPipeline) -> None:
        self.pipe = pipe

    @classmethod
    def load(cls, model: Model, device: torch.device, waiting: bool = False) -> "SDXL":
        """See load_pipeline. Raises InputError."""
        return cls(load_pipeline(model, device, waiting))

    @classmethod
    def validate_loss(cls, model: Model, loss: Loss) -> None:
        """Raise InputError for a prediction that does not fit the base's scheduler, where that can be read."""
        diffusion.validate_prediction_type(model, loss)

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
        """What the UNet computes in: that of the text embeddings."""
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

    def encode_texts(self, texts: Sequence[str], device: torch.device, offload: bool) -> list[Conditioning]:
        """See text.encode_texts. Raises RunError."""
        return text.encode_texts(self.tokenizers, list(self.text_encoders.values()), texts, device, offload)

    def tokenize(self, caption: str, tokenizers: Sequence[PreTrainedTokenizerBase]) -> Conditioning:
        """`input_ids` (2, 77) of either encoder, and `has_caption` (), true."""
        ids = torch.cat([text.token_ids(tokenizer, caption) for tokenizer in tokenizers])
        return {"input_ids": ids, "has_caption": torch.tensor(True)}

    def encode_tokens(self, conditioning: Conditioning) -> Conditioning:
        """See text.encode_tokens."""
        return text.encode_tokens(self.text_encoders.values(), conditioning)

    def drop_text(self, conditioning: Conditioning) -> Conditioning:
        """See text.drop_text."""
        return text.drop_text(conditioning)

    def size_conditioning(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> Conditioning:
        """`time_ids` (6,): see text.micro_conditioning."""
        return {"time_ids": text.micro_conditioning(original, crop, target)}

    # --- images

    @property
    def latent_channels(self) -> int:
        """4."""
        return self.pipe.vae.config.latent_channels

    @property
    def pixels_per_latent(self) -> int:
        """8."""
        return self.pipe.vae_scale_factor

    def encode_image(self, image: Image.Image, name: str) -> Tensor:
        """Latents (4, H / 8, W / 8): see vae.encode_image. Raises RunError."""
        return vae.encode_image(self.pipe.vae, image, name)

    def encode_photo(self, photo: Image.Image) -> Callable[[torch.Generator], Tensor]:
        """A function that draws latents (1, 4, H / 8, W / 8) from the VAE's posterior of the photo."""
        autoencoder, dtype = self.pipe.vae, self.dtype
        pixels = self.pipe.image_processor.preprocess(photo).to(autoencoder.device, autoencoder.dtype)
        posterior = autoencoder.encode(pixels).latent_dist
        return lambda generator: posterior.sample(generator).to(dtype) * autoencoder.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (1, 4, h, w) to pixels (1, 3, 8 h, 8 w): see vae.decode."""
        return vae.decode(self.pipe.vae, latents, self.pixels_per_latent)

    def autoencoder_in_range(self, device: torch.device) -> AbstractContextManager[None]:
        """See vae.without_overflow."""
        return vae.without_overflow(self.pipe.vae, device)

    def enable_tiling(self, side: int) -> None:
        """See vae.tile_vae."""
        vae.tile_vae(self.pipe.vae, side)

    # --- training and sampling

    def resolve_loss(self, loss: Loss) -> Loss:
        """See diffusion.resolve_prediction_type. Raises InputError."""
        return diffusion.resolve_prediction_type(loss, self.pipe.scheduler.config)

    def noise_schedule(self, loss: Loss) -> diffusion.DiffusionSchedule:
        """The schedule of the pipeline's scheduler, with the prediction of the resolved `loss`."""
        return diffusion.DiffusionSchedule(self.pipe.scheduler.config, loss.prediction, loss.zero_terminal_snr)

    def apply_loss(self, loss: Loss) -> None:
        """Give the pipeline, from which training and every sampler take it, a scheduler as `loss` names it.

        Raises InputError."""
        self.pipe.scheduler = diffusion.with_prediction_type(self.pipe.scheduler, self.resolve_loss(loss))

    def solver(self, settings: dict[str, Any]) -> SchedulerMixin:
        """The scheduler of diffusers that `settings` name, on the base's noise schedule."""
        return instantiate(settings)(self.pipe.scheduler.config)

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """What the UNet predicts of `noisy` (B, 4, h, w) at `timesteps` (B,) or (1,), of that shape.

        `conditioning` has prompt_embeds (B, 77, 2048), pooled_prompt_embeds (B, 1280) and time_ids (B, 6)."""
        embeds = conditioning["prompt_embeds"]
        added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": conditioning["time_ids"]}
        # In the base's own precision, in which everything but the loss is computed.
        return network(noisy.to(embeds.dtype), timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0]

    # --- files

    def text_identity(self) -> list[str]:
        """The hashes of both encoders and both tokenizers; takes seconds."""
        return [*map(identity_of, self.text_encoders.values()), *map(rules_of, self.tokenizers)]

    def text_forms(self) -> Forms:
        """Shape and dtype of what encode_texts gives."""
        first, second = self.pipe.text_encoder, self.pipe.text_encoder_2
        width = first.config.hidden_size + second.config.hidden_size
        return {
            "prompt_embeds": ((self.pipe.tokenizer.model_max_length, width), second.dtype),
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
