"""How many floating-point operations a training step has: counted, not measured."""

import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from tests.sdxl_structure import Shape, unet_of


def training_flops(shape: Shape, side: int) -> float:
    """Floating-point operations of one image's forward and backward pass with a LoRA of rank 16 on the attention.

    They are counted on tensors without memory. Recomputed activations (gradient checkpointing) do not count."""
    with torch.device("meta"):
        unet = unet_of(shape).requires_grad_(False)
        unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        config = unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        conditions = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        noisy, text = torch.empty(1, 4, side // 8, side // 8), torch.empty(1, 77, config.cross_attention_dim)
        with FlopCounterMode(display=False) as counted:
            unet(noisy, torch.empty(1), text, added_cond_kwargs=conditions, return_dict=False)[0].mean().backward()
    return float(counted.get_total_flops())
