"""What training and sampling need of a frozen base model.

`model._target_` in conf/model/ names the class. lora_lab.base.sdxl.SDXL is the one in the package; tests/toy_base.py
has a small one of another kind."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_lab.settings.schema import Likeness, Loss, Model, Structure

Conditioning = dict[str, Tensor]  # what the network is told besides noisy latents and timesteps; opaque to its users
Forms = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each tensor, by name


class NoiseSchedule(Protocol):
    """How training mixes noise with latents at each of T timesteps, and what the network predicts from the mixture."""

    prediction: str  # epsilon, v_prediction or flow
    snr: Tensor  # (T,) signal-to-noise ratio, float32 on the CPU
    sigmas: Tensor  # (T,) standard deviation of the noise relative to the signal, float32 on the CPU

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (B, C, h, w) of `latents` and `noise` of that shape at integer `timesteps` (B,)."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict from their mixture (B, C, h, w)."""


class Solver(Protocol):
    """A sampler's way from noise to an image: the part of diffusers' schedulers that sampling uses."""

    timesteps: Tensor  # (N,) on the CPU, after set_timesteps
    order: int  # calls of the network per step
    init_noise_sigma: float | Tensor

    def set_timesteps(self, steps: int) -> None:
        """Choose the timesteps of `steps` steps."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """What the network gets for `sample` (B, C, h, w) at `timestep` ()."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (B, C, h, w) at `timesteps` (1,), from which img2img starts."""

    def step(self, prediction: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """The next sample (B, C, h, w), in a tuple, after the network's `prediction` (B, C, h, w) at `timestep` ()."""


@dataclass(frozen=True)
class MemoryProfile:
    """What the GPU memory that training needs depends on, measured in half precision with `python -m benchmarks`."""

    linears: float  # numbers in the network's linear layers
    convolutions: float  # numbers in its convolutions
    text_encoders: float  # numbers in the text encoders
    adapter: float  # numbers of a LoRA on the attention, per rank
    activations: dict[bool, tuple[float, float]]  # with gradient checkpointing or not: constant MiB, and MiB per image
    sampling: float  # MiB of the network while it samples
    decoding: dict[bool, float]  # tiling: MiB of the autoencoder while it decodes an image
    image_area: int  # pixels of the image that the figures are for


class BaseModel(Protocol):
    """A frozen text-to-image model, loaded. Shapes: B images, C latent channels, h and w latent height and width."""

    network_name: ClassVar[str]  # the component that is trained
    embedding_keys: ClassVar[Mapping[str, str]]  # text encoder -> key of new token embeddings in their file
    text_targets: ClassVar[Sequence[str]]  # layers of the text encoders that get a LoRA
    lora_metadata: ClassVar[Mapping[str, str]]  # how a LoRA file names this kind of base
    memory: ClassVar[MemoryProfile]

    tokenizers: Sequence[PreTrainedTokenizerBase]  # of the text encoders, in their order; may be replaced

    @classmethod
    def load(cls, model: Model, device: torch.device, waiting: bool) -> "BaseModel":
        """Load the frozen base in the precision for `device`; with `waiting` it stays on the CPU. Raises InputError."""

    @classmethod
    def validate_loss(cls, model: Model, loss: Loss) -> Loss | None:
        """`loss` with what it leaves to the base filled in, as far as that is known before the base is loaded; None
        where nothing is. Raises InputError where it is known not to fit."""

    # --- components

    @property
    def components(self) -> dict[str, nn.Module]:
        """The modules that adapters may change, by name: the network, then the text encoders in their order.

        They have the adapter methods of diffusers' and transformers' models (add_adapter, disable_adapters, ...)."""

    @property
    def network(self) -> nn.Module:
        """The component that predicts, and that is trained."""

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The components that encode texts, in order."""

    @property
    def autoencoder(self) -> nn.Module:
        """The module that encodes images and decodes latents."""

    @property
    def dtype(self) -> torch.dtype:
        """The data type that the network computes in."""

    # --- text

    text_window: int  # tokens of a text that are read, start and end markers included; may be replaced
    zeros_for_empty_text: bool  # whether zeros stand for an empty text; else its own encoding does

    def encode_texts(self, texts: Sequence[str], device: torch.device, offload: bool) -> list[Conditioning]:
        """The conditioning of each text, without a batch dimension, on the CPU. Raises RunError for non-finite values.

        With `offload` one text encoder at a time is on `device`."""

    def tokenize(self, text: str, tokenizers: Sequence[PreTrainedTokenizerBase]) -> Conditioning:
        """The token ids of a text, for encode_tokens, without a batch dimension, on the CPU."""

    def encode_tokens(self, conditioning: Conditioning) -> Conditioning:
        """Encode a batch of what `tokenize` returns, with gradients of the text encoders, without waiting for the
        device."""

    def drop_text(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning of an empty text if `zeros_for_empty_text`: `conditioning`, of encode_texts or of tokenize,
        with its text replaced by zeros."""

    def size_conditioning(
        self, original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]
    ) -> Conditioning:
        """The conditioning on sizes, {} where there is none: (height, width) before cropping, (top, left) of the crop,
        (height, width) after it, in pixels."""

    # --- images

    latent_channels: int
    pixels_per_latent: int  # pixels along a side that one latent stands for

    def encode_image(self, image: Image.Image, name: str) -> Tensor:
        """Latents (C, h, w) of an RGB image to train on, float32 on the CPU. Raises RunError, naming the image, for
        non-finite values."""

    def encode_photo(self, photo: Image.Image) -> Callable[[torch.Generator], Tensor]:
        """For img2img: a function that draws latents (1, C, h, w) of the photo, in `dtype`."""

    def features(self, latents: Tensor) -> Tensor:
        """What the network sees in latents (B, C, h, w) of images: vectors (B, D, h', w') of its middle, float32, which
        are alike for parts that look alike. They do not depend on the other images, nor on a text."""

    def decode(self, latents: Tensor) -> Tensor:
        """The image (1, 3, H, W) of latents (1, C, h, w), values from -1 to 1."""

    def autoencoder_in_range(self, device: torch.device) -> AbstractContextManager[None]:
        """Within the context the autoencoder computes in a precision that does not overflow."""

    def enable_tiling(self, side: int) -> None:
        """Let the autoencoder work in tiles of at most `side` pixels, for less memory."""

    # --- training and sampling

    def resolve_loss(self, loss: Loss) -> Loss:
        """`loss` with what it leaves to the base filled in. Raises InputError for a loss that does not fit the base."""

    def noise_schedule(self, loss: Loss) -> NoiseSchedule:
        """The schedule of training for a resolved `loss`."""

    def apply_loss(self, loss: Loss) -> None:
        """Let training and sampling from now on follow the prediction that `loss` names. Raises InputError."""

    def solver(self, settings: dict[str, Any]) -> Solver:
        """The sampler that `settings` (of sampler.scheduler) describe, for this base."""

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """What `network` (the base's, or a clone) predicts from `noisy` (B, C, h, w) at `timesteps` (B,) or (1,), in
        the base's precision."""

    # --- files

    def text_identity(self) -> list[str]:
        """Hashes of everything but the text that encode_texts depends on."""

    def text_forms(self) -> Forms:
        """Shape and dtype of the tensors of encode_texts."""

    def image_identity(self) -> str:
        """A hash of everything but the image that encode_image depends on."""

    @staticmethod
    def lora_key(component: str, module: str) -> str:
        """The name of a component's `module` in a LoRA file: what stands before the dot in its keys."""

    def load_lora(self, file: Path, adapter: str) -> None:
        """Load a LoRA file into new adapters of that name. May raise anything for a file that does not fit."""


@runtime_checkable
class PhotoConditioned(Protocol):
    """What a BaseModel has beside the rest if its predictions can follow images: the control image of a ControlNet, and
    a photo through an IP-Adapter."""

    @property
    def control_networks(self) -> Sequence[nn.Module]:
        """What `predict` calls beside the network."""

    def load_control(self, structure: Structure, device: torch.device, waiting: bool) -> None:
        """Load the ControlNet of `structure`, or none; with `waiting` it stays on the CPU. Raises InputError."""

    def control_conditioning(self, image: Image.Image, scale: float) -> Conditioning:
        """The conditioning on an RGB control image of the sampled image's size, without a batch dimension, on the CPU.

        `scale` weighs what the ControlNet adds to the network."""

    def load_likeness(self, likeness: Likeness, device: torch.device) -> None:
        """Load the IP-Adapter of `likeness` into the network, or remove the last. Raises InputError."""

    def unload_conditions(self) -> None:
        """Remove the ControlNet and the IP-Adapter, if there are any."""

    def likeness_conditioning(
        self, photos: Sequence[Image.Image], device: torch.device, offload: bool
    ) -> list[tuple[Conditioning, Conditioning]]:
        """The conditioning on each RGB photo, and that of guidance's negative half, without a batch dimension."""
