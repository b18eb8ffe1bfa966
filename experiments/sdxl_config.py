"""Make lora_lab/base/sdxl_config: the configurations and the tokenizer of SDXL, for single-file checkpoints.

    pip download --no-deps open_clip_torch==3.3.0
    unzip open_clip_torch-*.whl open_clip/bpe_simple_vocab_16e6.txt.gz
    python -m experiments.sdxl_config open_clip/bpe_simple_vocab_16e6.txt.gz

The structure is that of tests/sdxl_structure.py (FULL); the merges are those of OpenAI's CLIP (MIT), which OpenCLIP's
wheel has. Nothing is downloaded."""

import gzip
import json
import sys
from pathlib import Path

from transformers import CLIPTextConfig

FOLDER = Path(__file__).parents[1] / "lora_lab" / "base" / "sdxl_config"
VOCABULARY = 49152 - 256 - 2  # merges that CLIP uses of those in the file
START, END = "<|startoftext|>", "<|endoftext|>"
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_num_groups": 32,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def text_encoder(name: str, width: int, layers: int, heads: int, activation: str) -> dict:
    """The configuration of a CLIP text encoder as SDXL's was published."""
    config = CLIPTextConfig(
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
    published = {k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"}
    return {"architectures": [name], **published, "vocab_size": 49408, "max_position_embeddings": 77}


def byte_letters() -> list[str]:
    """A printable character for each byte, in CLIP's order: the printable ones stand for themselves and come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]


def write_tokenizer(merges_file: Path, folder: Path) -> None:
    """Write vocab.json and merges.txt as transformers' CLIPTokenizer reads them."""
    lines = gzip.decompress(merges_file.read_bytes()).decode().split("\n")[1 : VOCABULARY + 1]
    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(line.split()) for line in lines), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special})


def write(file: Path, content: dict) -> None:
    """Write a dict as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the whole folder."""
    write(FOLDER / "model_index.json", INDEX)
    write(FOLDER / "scheduler" / "scheduler_config.json", SCHEDULER)
    write(FOLDER / "unet" / "config.json", UNET)
    write(FOLDER / "vae" / "config.json", VAE)
    first = text_encoder("CLIPTextModel", 768, 12, 12, "quick_gelu")
    write(FOLDER / "text_encoder" / "config.json", first)
    second = text_encoder("CLIPTextModelWithProjection", 1280, 32, 20, "gelu")
    write(FOLDER / "text_encoder_2" / "config.json", second)
    write_tokenizer(Path(sys.argv[1]), FOLDER / "tokenizer")


if __name__ == "__main__":
    main()
