"""SDXL with random weights: FULL has the published sizes, NARROW every one of its modules, a few numbers wide each.

NARROW is made on a CPU in a second, and its UNet has the 560 attention layers, its text encoders the 12 and 32 layers
whose names a LoRA file is about."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from lora_lab import demo


@dataclass(frozen=True)
class Shape:
    channels: tuple[int, int, int]  # of the UNet's three levels
    heads: tuple[int, int, int]
    groups: int  # of the UNet's and the VAE's group norms
    time_width: int  # of each of the six numbers of micro-conditioning
    vae_channels: tuple[int, int, int, int]
    text_width: int  # of the first text encoder
    text_heads: int
    text_2_width: int  # never the first's: diffusers tells the encoders of a single file apart by it
    text_2_heads: int
    vocabulary: int
    sample_size: int  # latent pixels


FULL = Shape((320, 640, 1280), (5, 10, 20), 32, 256, (128, 256, 512, 512), 768, 12, 1280, 20, 49408, 128)
NARROW = Shape((8, 16, 32), (2, 2, 4), 4, 8, (4, 8, 8, 8), 16, 2, 24, 2, 1298, 16)


def pipeline(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusionXLPipeline:
    """The same weights at every call; the tokenizers are the demo's (1298 tokens)."""
    torch.manual_seed(0)
    with torch.device(device):  # a GPU fills 3.5 billion numbers in a second, a CPU in a minute
        parts = {
            "unet": unet_of(shape).to(dtype),
            "vae": _vae(shape).to(dtype),
            "text_encoder": _text(CLIPTextModel, shape.text_width, shape.text_heads, 12, "quick_gelu", shape).to(dtype),
            "text_encoder_2": _text(
                CLIPTextModelWithProjection, shape.text_2_width, shape.text_2_heads, 32, "gelu", shape
            ).to(dtype),
        }
    for part in parts.values():
        part.requires_grad_(False).eval()
    pipe = StableDiffusionXLPipeline(
        **parts,
        tokenizer=CLIPTokenizer.from_pretrained(demo.BASE / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(demo.BASE / "tokenizer_2"),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_of(shape: Shape) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=shape.sample_size,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=shape.channels,
        layers_per_block=2,
        norm_num_groups=shape.groups,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=shape.heads,  # diffusers' name for the number of heads
        use_linear_projection=True,
        cross_attention_dim=shape.text_width + shape.text_2_width,
        addition_embed_type="text_time",
        addition_time_embed_dim=shape.time_width,
        projection_class_embeddings_input_dim=6 * shape.time_width + shape.text_2_width,
    )


def _vae(shape: Shape) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=shape.vae_channels,
        layers_per_block=2,
        norm_num_groups=shape.groups,
        sample_size=8 * shape.sample_size,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _text(kind: type, width: int, heads: int, layers: int, activation: str, shape: Shape) -> torch.nn.Module:
    return kind(
        CLIPTextConfig(
            vocab_size=shape.vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
            hidden_act=activation,
            bos_token_id=0,  # these three as published: CLIP then takes the largest id for the end of the text
            eos_token_id=2,
            pad_token_id=1,
        )
    )


def save_single_file(pipe: StableDiffusionXLPipeline, path: Path) -> Path:
    """Write `pipe` as one checkpoint in the original names, as models are shared on the web."""
    state = {
        **_renamed(pipe.unet.state_dict(), "model.diffusion_model.", original_unet_key),
        **_original_vae(pipe.vae.state_dict()),
        **_renamed(pipe.text_encoder.state_dict(), "conditioner.embedders.0.transformer.", _with_text_model),
        **_open_clip(pipe.text_encoder_2.state_dict()),
    }
    save_file({key: value.contiguous() for key, value in state.items()}, str(path))
    return path


def _renamed(state: dict[str, Tensor], prefix: str, rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {prefix + rename(key): value for key, value in state.items()}


def _with_text_model(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"  # transformers 5 dropped it


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet_key(key: str) -> str:
    """down_blocks.1.resnets.0.norm1.weight -> input_blocks.4.0.in_layers.0.weight, for a UNet of 2 layers a block."""
    module, kind = key.rsplit(".", 1)
    if module in UNET_ENDS:
        return f"{UNET_ENDS[module]}.{kind}"
    block, *rest = key.split(".")
    if block == "mid_block":
        part, number, *inside = rest
        place = f"middle_block.{2 * int(number) if part == 'resnets' else 1}"
    else:
        level, part, number, *inside = rest
        level, number, is_down = int(level), int(number), block == "down_blocks"
        if part in ("downsamplers", "upsamplers"):
            # An upsampler comes after the attention, and the lowest level of the decoder has both.
            place = f"input_blocks.{3 * level + 3}.0" if is_down else f"output_blocks.{3 * level + 2}.2"
            inside[0] = "op" if is_down else "conv"
        else:
            index = 1 + 3 * level + number if is_down else 3 * level + number
            place = f"{'input' if is_down else 'output'}_blocks.{index}.{0 if part == 'resnets' else 1}"
    if part == "resnets":
        inside[0] = RESNET[inside[0]]
    return ".".join([place, *inside])


VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _original_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    original = {}
    for key, value in state.items():
        if ".attentions.0." in key:
            for ours, theirs in VAE_ATTENTION.items():
                key = key.replace(f"attentions.0.{ours}.", f"attn_1.{theirs}.")
            value = value[:, :, None, None] if value.ndim == 2 else value  # their linears are 1x1 convolutions
        parts = key.split(".")
        if parts[1] == "down_blocks":
            parts[1] = "down"
        elif parts[1] == "up_blocks":
            parts[1:3] = ["up", str(3 - int(parts[2]))]  # counted from the picture's side
        elif parts[1] == "mid_block":
            parts[1] = "mid"
            if parts[2] == "resnets":
                parts[2:4] = [f"block_{int(parts[3]) + 1}"]
        key = ".".join(parts)
        for ours, theirs in {
            ".resnets.": ".block.",
            "conv_shortcut": "nin_shortcut",
            "downsamplers.0": "downsample",
            "upsamplers.0": "upsample",
            "conv_norm_out": "norm_out",
        }.items():
            key = key.replace(ours, theirs)
        original[f"first_stage_model.{key}"] = value
    return original


OPEN_CLIP = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
}


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    original = {}
    for key, value in state.items():
        if ".q_proj." in key:  # OpenCLIP keeps q, k and v in one matrix
            value = torch.cat([state[key.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"])
            key = key.replace("self_attn.q_proj.", "attn.in_proj_")
        elif ".k_proj." in key or ".v_proj." in key:
            continue
        elif key == "text_projection.weight":
            key, value = "text_projection", value.T
        for ours, theirs in OPEN_CLIP.items():
            key = key.replace(ours, theirs)
        original[f"conditioner.embedders.1.model.{key}"] = value
    return original


@torch.no_grad()
def outputs(pipe: StableDiffusionXLPipeline) -> tuple[Tensor, Tensor, Tensor]:
    """What the text encoders make of a caption (tokens, pooled), and the UNet of it and fixed latents."""
    tokens, _, pooled, _ = pipe.encode_prompt("A HANA_TOFU, smiling", do_classifier_free_guidance=False)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    return tokens, pooled, pipe.unet(latents, 500, tokens, added_cond_kwargs=conditions).sample


def save_ip_adapters(unet: UNet2DConditionModel, place: Path) -> Path:
    """Into the folder `place`, which is returned, an IP-Adapter for `unet`, a "plus" one, and their image encoder:
    plain.safetensors, plus.safetensors and encoder, all of random weights."""
    torch.manual_seed(2)
    clip = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=12,
    )  # fmt: skip
    CLIPVisionModelWithProjection(clip).save_pretrained(place / "encoder")
    cross = unet.config.cross_attention_dim
    attention, number = {}, 1
    for name in unet.attn_processors:
        if "attn2" in name:
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            attention |= {f"ip_adapter.{number}.{part}_ip.weight": (width, cross) for part in ("to_k", "to_v")}
            number += 2
    plain = {"proj.weight": (4 * cross, 12), "proj.bias": (4 * cross,), "norm.weight": (cross,), "norm.bias": (cross,)}
    for name, projection in (("plain", plain), ("plus", _resampler(cross, 16))):
        shapes = attention | {f"image_proj.{key}": shape for key, shape in projection.items()}
        save_file({key: torch.randn(shape) for key, shape in shapes.items()}, place / f"{name}.safetensors")
    return place


def _resampler(cross: int, embed: int, width: int = 8, layers: int = 4) -> dict[str, tuple[int, ...]]:
    """Tensors of the image projection of a "plus" adapter in its own names: attention over the image's patches."""
    shapes = {
        "latents": (1, 4, width), "proj_in.weight": (width, embed), "proj_in.bias": (width,),
        "proj_out.weight": (cross, width), "proj_out.bias": (cross,), "norm_out.weight": (cross,),
        "norm_out.bias": (cross,),
    }  # fmt: skip
    for layer in range(layers):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{layer}.{norm}.{name}": (width,) for name in ("weight", "bias")}
        shapes |= {f"layers.{layer}.0.to_q.weight": (64, width), f"layers.{layer}.0.to_kv.weight": (128, width)}
        shapes |= {f"layers.{layer}.0.to_out.weight": (width, 64), f"layers.{layer}.1.1.weight": (4 * width, width)}
        shapes |= {f"layers.{layer}.1.3.weight": (width, 4 * width)}
    return shapes
