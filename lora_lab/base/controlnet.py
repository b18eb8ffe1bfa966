"""Load a ControlNet or union ControlNet of diffusers for a UNet: a folder, a hub id or a single file."""

from pathlib import Path

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from safetensors.torch import load_file

from lora_lab.base.locate import loading, locate_model, refuse_pickle
from lora_lab.errors import InputError
from lora_lab.settings.schema import Structure

ControlNet = ControlNetModel | ControlNetUnionModel
# The numbers of the control images that the published union ControlNets tell apart; the first has no tile.
UNION_TYPES = {"pose": 0, "depth": 1, "canny": 3, "tile": 6}


def load_controlnet(
    structure: Structure, unet: UNet2DConditionModel, pixels_per_latent: int, dtype: torch.dtype
) -> ControlNet:
    """The frozen ControlNet of `structure`, for `unet` and its autoencoder, on the CPU.

    Raises InputError if it cannot be read, was made for another base, or does not know `structure.kind`."""
    name = structure.controlnet
    refuse_pickle("structure.controlnet", name)
    location = locate_model("structure.controlnet", name)
    with loading(location, f"structure.controlnet={name}: cannot be loaded as a ControlNet"):
        if Path(location).is_file():
            network = _controlnet_from_file(location, unet)
        else:
            config = ControlNetModel.load_config(location)
            union = "num_control_type" in config or "Union" in config.get("_class_name", "")
            kind = ControlNetUnionModel if union else ControlNetModel
            network = kind.from_pretrained(location, dtype=dtype, use_safetensors=True)  # never a pickle
    _refuse_unfit(network, structure, unet, pixels_per_latent)
    return network.to(dtype).requires_grad_(False).eval()


def is_union(network: ControlNet) -> bool:
    """Whether it must be told what kind of control image it gets."""
    return isinstance(network, ControlNetUnionModel)


def _controlnet_from_file(file: str, unet: UNet2DConditionModel) -> ControlNet:
    """Such a file has only weights: its configuration is that of the UNet, and what the shapes of its tensors say."""
    state = load_file(file)
    if "controlnet_mid_block.weight" not in state:
        raise ValueError("it has no controlnet_mid_block.weight, which ControlNets for diffusers have")
    layers = [key for key in state if key.startswith("controlnet_cond_embedding.blocks.") and key.endswith(".weight")]
    widths = ["controlnet_cond_embedding.conv_in.weight", *sorted(layers, key=lambda key: int(key.split(".")[2]))[1::2]]
    channels = tuple(len(state[key]) for key in widths)
    with torch.device("meta"):
        network = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=channels, load_weights_from_unet=False
        )
        if "task_embedding" in state:
            types, width = state["task_embedding"].shape
            sizes = {"num_trans_channel": width, "num_proj_channel": len(state["spatial_ch_projs.weight"])}
            network = ControlNetUnionModel.from_config(network.config, num_control_type=types, **sizes)
    network.load_state_dict(state, assign=True)
    return network


def _refuse_unfit(network: ControlNet, structure: Structure, unet: UNet2DConditionModel, factor: int) -> None:
    """Raise InputError for a ControlNet of another base, and for a union that does not know the kind of structure."""
    name, config = f"structure.controlnet={structure.controlnet}", network.config
    shapes = ("block_out_channels", "layers_per_block", "cross_attention_dim")
    theirs = [tuple(config[key]) if isinstance(config[key], list) else config[key] for key in shapes]
    ours = [tuple(unet.config[key]) if isinstance(unet.config[key], list) else unet.config[key] for key in shapes]
    if theirs != ours or 2 ** (len(config.conditioning_embedding_out_channels) - 1) != factor:
        raise InputError(f"{name}: it was made for another base model than model.base, name one that was made for it")
    if is_union(network) and UNION_TYPES[structure.kind] >= config.num_control_type:
        raise InputError(
            f"{name}: this union ControlNet knows {config.num_control_type} kinds of control images and not "
            f"{structure.kind}: name one that does"
        )
