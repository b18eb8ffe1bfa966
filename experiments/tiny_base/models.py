"""The architectures: SDXL's own classes, small. Everything in fp32 here; the bundle stores fp16."""

from diffusers import AutoencoderKL, ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    PreTrainedTokenizerBase,
)

from experiments.tiny_base.recipe import PIXELS

LATENT_PIXELS = PIXELS // 4  # the VAE halves twice; SDXL's halves three times
TEXT_WIDTHS = (96, 160)  # of the two text encoders; the UNet attends to both, side by side
POOLED = 128  # width of the second encoder's projection
TIME_ID_WIDTH = 32


def vae(scaling_factor: float = 1.0) -> AutoencoderKL:
    """3.2 M parameters: RGB in [-1, 1], (B, 3, 128, 128), to latents (B, 4, 32, 32)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=PIXELS,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        force_upcast=False,
        scaling_factor=scaling_factor,
    )


def unet() -> UNet2DConditionModel:
    """7.4 M parameters, SDXL's plan: a plain block, then two with cross-attention, text_time conditioning."""
    return UNet2DConditionModel(
        sample_size=LATENT_PIXELS,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 3, 4),
        cross_attention_dim=sum(TEXT_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_ID_WIDTH + POOLED,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def controlnet() -> ControlNetModel:
    """1.4 M parameters: the UNet's downward half without attention. Of the text it gets the pooled embedding only, for
    what it adds follows from the control image, (B, 3, 128, 128) in [0, 1]."""
    network, strides = unet(), (16, 32, 64)  # two of 2, as the VAE has
    config = ControlNetModel.from_unet(network, conditioning_embedding_out_channels=strides).config
    plain = {"down_block_types": ("DownBlock2D",) * 3, "mid_block_type": "UNetMidBlock2D"}
    return ControlNetModel.from_config(config, **plain)


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
        interpolation_type="linear",
        use_karras_sigmas=False,
    )


def _text_config(tokenizer: CLIPTokenizerFast, width: int, layers: int, heads: int, projection: int, activation: str):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=projection,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def text_encoder(tokenizer: CLIPTokenizerFast) -> CLIPTextModel:
    return CLIPTextModel(_text_config(tokenizer, TEXT_WIDTHS[0], 3, 3, TEXT_WIDTHS[0], "quick_gelu"))


def text_encoder_2(tokenizer: CLIPTokenizerFast) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(_text_config(tokenizer, TEXT_WIDTHS[1], 4, 5, POOLED, "gelu"))


def blip(tokenizer: PreTrainedTokenizerBase) -> BlipForConditionalGeneration:
    """3.0 M parameters: patches of 8 px, five layers of sight, three of text."""
    width = 160
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "encoder_hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "max_position_embeddings": tokenizer.model_max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    sight = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "image_size": PIXELS,
        "patch_size": 8,
        "projection_dim": 128,
    }
    config = BlipConfig(
        vision_config=sight, text_config=text, projection_dim=128, image_text_hidden_size=128, label_smoothing=0.0
    )
    # BlipConfig writes its own over these.
    for key in ("bos_token_id", "sep_token_id", "pad_token_id", "eos_token_id"):
        setattr(config.text_config, key, text[key])
    return BlipForConditionalGeneration(config)


def clip(tokenizer: CLIPTokenizerFast) -> CLIPModel:
    """1.7 M parameters: patches of 16 px, embeddings of 128."""
    sight = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": PIXELS,
        "patch_size": 16,
        "projection_dim": 128,
    }
    text = _text_config(tokenizer, 128, 3, 4, 128, "quick_gelu").to_dict()
    return CLIPModel(CLIPConfig(text_config=text, vision_config=sight, projection_dim=128))
