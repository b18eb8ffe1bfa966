"""Settings of the base model, of drawing with it, and of what saves its memory."""

from typing import Any, Literal

from lora_lab.errors import InputError
from lora_lab.settings.setting import ModelLocation, Section, open_group, section, setting

BOTH = ("weights", "images")
OUT_OF_MEMORY = "the way on from out of memory"  # training.memory advises it


@section
class Model(Section):
    name: str = setting("name of the option", decides="nothing")
    _target_: str = setting(
        "class of the base model, as lora_lab/base/protocol.py describes it",
        decides=BOTH,
        default="lora_lab.base.sdxl.SDXL",
    )
    base: ModelLocation = setting(
        "hub id, diffusers folder, or one .safetensors checkpoint; demo: is the package's folder",
        decides=BOTH,
        hashed_as="base",
    )
    vae: str | None = setting("VAE instead of the base's: hub id or folder", decides=BOTH, default=None)
    config: str | None = setting(
        "folder of configs and tokenizers for a single-file checkpoint; null asks the hub", decides=BOTH, default=None
    )
    judge: ModelLocation | None = setting(
        "CLIP model that scores LoRAs by the images they draw; null leaves scores out", decides="request", default=None
    )
    dino: ModelLocation | None = setting(
        "DINOv2 model that compares images for the scores; null uses CLIP", decides="request", default=None
    )
    resolution: int = setting("px; a bucket has about resolution^2 pixels", decides=BOTH, default=1024)
    bucket_step: int = setting("px; the sides of a bucket are multiples of it", decides=BOTH, default=64, ge=8)
    strength: float = setting("default of img2img's strength", decides="request", default=0.7, gt=0, le=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "number format of the frozen base; auto is bf16, else fp16, and fp32 on a CPU", decides=BOTH, default="auto"
    )
    variant: str | None = setting("variant of the files on the hub: fp16 or null", decides=BOTH, default=None)

    def __post_init__(self) -> None:
        if self.resolution < self.bucket_step:
            raise InputError(f"model.resolution={self.resolution}: resolution must be at least {self.bucket_step}")


@section
class Sampler(Section):
    scheduler: dict[str, Any] = open_group("diffusers' scheduler, which computes the next latents", decides="images")
    steps: int = setting("denoising steps", decides="images", default=30, ge=1)
    guidance: float = setting(
        "scale of classifier-free guidance; 1 switches it off", decides="images", default=5.0, ge=0
    )
    negative_prompt: str = setting("prompt that guidance leads away from", decides="images", default="")
    batch_size: int = setting(
        "images of one size that are drawn together; above 1 an image depends slightly on the others",
        decides="images",
        default=1,
        ge=1,
    )
    capture: bool = setting(
        "record the UNet as a CUDA graph and replay it: faster, the same images",
        decides="cost",
        default_from="memory.capture",
    )
    fuse: bool = setting(
        "merge the LoRA into the base's weights while drawing: faster, rounded to the base's precision",
        decides="images",
        default=False,
    )


@section
class Memory(Section):
    gradient_checkpointing: bool = setting(
        "recompute activations in the backward pass: less memory, a third slower", decides="cost", default=False
    )
    offload: bool = setting(
        "img2img moves VAE, text encoders and UNet to the device one at a time; training does so with all but the UNet",
        decides="cost",
        default=False,
    )
    linear_weights: Literal["base", "fp8", "int8", "nf4", "fp8_products"] = setting(
        "number format of the frozen linear layers; base: model.precision; fp8_products: multiplied in fp8",
        decides=BOTH,
        default="base",
        may_change=OUT_OF_MEMORY,
    )
    convolution_weights: Literal["base", "fp8", "int8"] = setting(
        "number format of the frozen convolutions; base: model.precision",
        decides=BOTH,
        default="base",
        may_change=OUT_OF_MEMORY,
    )
    capture: bool = setting(
        "record a training step as a CUDA graph and replay it; the graph keeps its memory", decides="cost", default=True
    )
    vae_tiling: bool = setting(
        "run the VAE in tiles of half the resolution: less memory, half as much work again",
        decides=BOTH,
        default=False,
        may_change=OUT_OF_MEMORY,
    )
    cudnn_benchmark: bool = setting(
        "try cuDNN's convolution algorithms in the first steps and use the fastest, which may need more memory",
        decides="cost",
        default=False,
    )
