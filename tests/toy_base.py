"""A base model of another kind than SDXL: it predicts a flow, and its conditioning is one vector, without a pooled one.

Its weights are a few thousand numbers in one .safetensors file; it learns nothing before the test trains a LoRA."""

from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.loaders.peft import PeftAdapterMixin
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate

from lora_lab.adapters.inject import load_own_keys
from lora_lab.base.protocol import MemoryProfile
from lora_lab.settings.schema import Loss, Model

STEPS, WIDTH = 1000, 32


class Denoiser(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A multilayer perceptron for every latent, told the time and the text."""

    config_name = "config.json"

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 3, 3, padding=1)
        self.time, self.text = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x, time, text):
        told = self.time(time[:, None]) + self.text(text)
        hidden = self.conv_in(x).movedim(1, -1) + told[:, None, None]
        return self.conv_out((hidden + self.mlp(hidden)).movedim(-1, 1))


class Flow:
    """noisy = (1 - t) x + t noise at t = (timestep + 1) / 1000; predicted is noise - x (Liu et al. 2022)."""

    prediction = "flow"

    def __init__(self) -> None:
        time = (torch.arange(STEPS) + 1) / STEPS
        self.snr, self.sigmas = ((1 - time) / time).square(), time / (1 - time)

    def add_noise(self, latents, noise, timesteps):
        time = ((timesteps + 1) / STEPS).view(-1, 1, 1, 1)
        return (1 - time) * latents + time * noise

    def target(self, latents, noise, timesteps):
        return noise - latents


class Euler:
    """Equal steps of t from 1 to 0."""

    order, init_noise_sigma = 1, 1.0

    def set_timesteps(self, steps):
        self.timesteps = (torch.linspace(1, 1 / steps, steps) * STEPS).round().long() - 1

    def scale_model_input(self, sample, timestep):
        return sample

    def add_noise(self, latents, noise, timesteps):
        return Flow().add_noise(latents, noise, timesteps)

    def step(self, prediction, timestep, sample, return_dict=False):
        return (sample - prediction / len(self.timesteps),)


class ToyBase:
    """A lora_lab.base.protocol.BaseModel."""

    network_name = "denoiser"
    embedding_keys, text_targets = MappingProxyType({}), ()
    lora_metadata = MappingProxyType({"modelspec.architecture": "toy/lora"})
    memory = MemoryProfile(1e3, 1e3, 0, 1e2, {False: (1, 1), True: (1, 1)}, 1, 1, 128 * 128)
    latent_channels, pixels_per_latent, zeros_for_empty_text = 3, 8, False
    tokenizers, text_encoders, dtype = (), MappingProxyType({}), torch.float32
    text_window = 77  # it reads whole texts

    def __init__(self, denoiser: Denoiser) -> None:
        self.network, self.autoencoder = denoiser, nn.Linear(1, 1)

    @classmethod
    def load(cls, model: Model, device: torch.device, waiting: bool) -> "ToyBase":
        denoiser = Denoiser()
        denoiser.load_state_dict(load_file(model.base))
        return cls(denoiser.requires_grad_(False).eval())

    @classmethod
    def validate_loss(cls, model: Model, loss: Loss) -> None:
        pass

    @property
    def components(self):
        return {"denoiser": self.network}

    def encode_texts(self, texts, device, offload):
        table = torch.randn((256, WIDTH), generator=torch.Generator().manual_seed(0))
        return [{"text": table[list(text.encode()) or [0]].mean(0)} for text in texts]

    def tokenize(self, text, tokenizers):
        raise NotImplementedError("the toy has no text encoder to train")

    encode_tokens = drop_text = tokenize

    def size_conditioning(self, original, crop, target):
        return {}

    def encode_image(self, image, name):
        pixels = torch.from_numpy(np.array(image)).movedim(-1, 0) / 127.5 - 1
        return avg_pool2d(pixels, self.pixels_per_latent)

    def encode_photo(self, photo):
        return lambda generator: self.encode_image(photo, "")[None]

    def features(self, latents):
        return latents

    def decode(self, latents):
        return interpolate(latents, scale_factor=self.pixels_per_latent)

    def autoencoder_in_range(self, device):
        return nullcontext()

    def enable_tiling(self, side):
        pass

    def resolve_loss(self, loss: Loss) -> Loss:
        return loss

    def noise_schedule(self, loss: Loss) -> Flow:
        return Flow()

    def apply_loss(self, loss: Loss) -> None:
        pass

    def solver(self, settings):
        return Euler()

    def predict(self, network, noisy, timesteps, conditioning):
        time = (timesteps + 1) / STEPS
        return network(noisy, time.expand(len(noisy)), conditioning["text"])

    def text_identity(self):
        return ["toy"]

    def text_forms(self):
        return {"text": ((WIDTH,), torch.float32)}

    def image_identity(self):
        return "toy"

    @staticmethod
    def lora_key(component: str, module: str) -> str:
        return f"lora_toy_{module.replace('.', '_')}"

    def load_lora(self, file: Path, adapter: str) -> None:
        load_own_keys(self, "denoiser", file, adapter)


def save_weights(file: Path) -> Path:
    """A denoiser of random weights that predicts little, so that a LoRA has much to learn."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = Denoiser()
        nn.init.normal_(denoiser.conv_out.weight, std=0.05)
    save_file(denoiser.state_dict(), str(file))
    return file


def checkerboard(colors: tuple[str, str]) -> Image.Image:
    """64 x 64 pixels in squares of 16."""
    image = Image.new("RGB", (64, 64), colors[0])
    for i in range(16):
        if (i // 4 + i) % 2:
            image.paste(colors[1], (i % 4 * 16, i // 4 * 16, i % 4 * 16 + 16, i // 4 * 16 + 16))
    return image
