"""The LoRA file, on every module name of SDXL: other programs load what was trained."""

import copy
import json
import math

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from sdxl_structure import NARROW, outputs, pipeline

from lora_lab.adapters import files
from lora_lab.adapters.files import keep_older, kohya_state, metadata, save_lora
from lora_lab.base.load import resolve_prediction_type
from lora_lab.base.sdxl import SDXL
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.settings.schema import Triggers

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
LINEAR = ["to_q", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out"]
RANKS = {"mid_block.attentions.0.transformer_blocks.9.attn2.to_k": 5, "down_blocks.1.attentions.1.*attn1.to_q": 1}

BASE = pipeline(NARROW)
RECIPES = {
    "alpha is the rank": ({"r": 4, "lora_alpha": 4}, ["to_k", "to_out.0"], False),
    "alpha is not the rank": ({"r": 4, "lora_alpha": 9}, ATTENTION, True),
    "rank-stabilised": ({"r": 4, "lora_alpha": 9, "use_rslora": True}, ["to_q", "to_out.0"], True),
    "patterns": (
        {"r": 3, "lora_alpha": 8, "rank_pattern": RANKS, "alpha_pattern": {"attn2.to_v": 0.5}},
        ["to_q", "to_k", "to_v"],
        False,
    ),
    "feed-forward and convolutions": ({"r": 2, "lora_alpha": 1}, LINEAR + CONVOLUTIONS, False),
}  # fmt: skip


def teach(config: dict, targets: list[str], with_text: bool) -> tuple[StableDiffusionXLPipeline, dict]:
    """A pipeline whose LoRAs hold random numbers, and its networks that have one."""
    pipe = copy.deepcopy(BASE)
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False, **config))
    parts = {"unet": pipe.unet}
    if with_text:
        parts |= {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
        for part in (pipe.text_encoder, pipe.text_encoder_2):
            part.add_adapter(LoraConfig(target_modules=TEXT, init_lora_weights=False, **config))
    return pipe, parts


@pytest.mark.parametrize("recipe", RECIPES)
def test_plain_diffusers_loads_exactly_what_was_trained(tmp_path, recipe):
    pipe, parts = teach(*RECIPES[recipe])
    file = save_lora(tmp_path / "lora.safetensors", kohya_state(parts, SDXL.lora_key), torch.float32, {})
    fresh = copy.deepcopy(BASE)
    base = outputs(fresh)
    fresh.load_lora_weights(str(file))
    loaded, trained = outputs(fresh), outputs(pipe)
    changed = trained if len(parts) == 3 else trained[2:]
    assert all(torch.equal(a, b) for a, b in zip(loaded, trained, strict=True))
    assert not any(torch.allclose(a, b, rtol=0.01) for a, b in zip(changed, base[-len(changed) :], strict=True))


def test_the_float16_file_is_the_lora_rounded_and_nothing_else(tmp_path):
    pipe, parts = teach({"r": 4, "lora_alpha": 9}, ["to_q", "to_v"], True)
    file = save_lora(tmp_path / "lora.safetensors", kohya_state(parts, SDXL.lora_key), torch.float16, {})
    exact = outputs(pipe)
    for part in parts.values():
        for name, parameter in part.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.half().float()
    fresh = copy.deepcopy(BASE)
    fresh.load_lora_weights(str(file))
    rounded = outputs(pipe)
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh), rounded, strict=True))
    assert not torch.equal(rounded[2], exact[2])
    kinds = {key.rsplit(".", 1)[1]: value.dtype for key, value in load_file(file).items()}
    assert kinds == {"weight": torch.float16, "alpha": torch.float32}


@pytest.fixture(scope="module")
def state():
    return kohya_state(teach({"r": 4, "lora_alpha": 9, "use_rslora": True}, ATTENTION, True)[1], SDXL.lora_key)


def test_the_names_are_those_that_kohya_and_comfyui_look_for(state):
    modules = {key.split(".", 1)[0] for key in state}
    prefixes = ("lora_unet_", "lora_te1_text_model_", "lora_te2_text_model_")
    counts = [sum(module.startswith(prefix) for module in modules) for prefix in prefixes]
    assert counts == [560, 4 * 12, 4 * 32]
    assert len(modules) == sum(counts)
    assert {key.split(".", 1)[1] for key in state} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert len(state) == 3 * len(modules)
    # As they stand in files that are shared on the web.
    assert modules >= {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q",
        "lora_unet_mid_block_attentions_0_transformer_blocks_9_attn2_to_out_0",
        "lora_unet_up_blocks_0_attentions_2_transformer_blocks_0_attn2_to_k",
        "lora_te1_text_model_encoder_layers_11_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
    }


def test_alpha_over_rank_is_the_scale_that_was_trained(state):
    alphas = {value.item() for key, value in state.items() if key.endswith(".alpha")}
    (alpha,) = alphas
    rank = state["lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"].shape[0]
    assert alpha / rank == pytest.approx(9 / math.sqrt(4))


def test_what_the_format_cannot_hold_is_refused_by_name():
    parts = teach({"r": 2, "lora_alpha": 2, "lora_bias": True}, ["mid_block.attentions.0.proj_in"], False)[1]
    with pytest.raises(InputError, match=r"mid_block\.attentions\.0\.proj_in.*no place in a LoRA file"):
        kohya_state(parts, SDXL.lora_key)


def notes_of(*overrides):
    loss = resolve_prediction_type(compose(*overrides).loss, {})
    return metadata(
        name="두부", base="demo:tiny-sdxl", triggers=Triggers({"": "HANA_TOFU"}), lr=1e-4, steps=300, batch_size=4,
        seed=7, resolution=1024,
        captions={"a": "A HANA_TOFU, smiling", "b": "A HANA_TOFU, winking, smiling", "c": "한 두부"},
        text=compose(*overrides).text, loss=loss, prediction=loss.prediction, kind_of_base=SDXL.lora_metadata,
        dataset_hash="d" * 64, base_hash="b" * 64,
        network={"ss_network_dim": "16", "ss_network_alpha": "8.0"},
    )  # fmt: skip


NOTES = notes_of()


def test_the_metadata_has_what_other_programs_show(tmp_path, state):
    few = {key: value for key, value in state.items() if "te1" in key}
    file = save_lora(tmp_path / "lora.safetensors", few, torch.float16, NOTES)
    with safe_open(str(file), "pt") as opened:
        read = opened.metadata()
    assert all(isinstance(value, str) for value in NOTES.values())
    assert read == NOTES
    assert read["ss_base_model_version"].startswith("sdxl_")  # or Forge does not list the file
    assert read["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert read["modelspec.sai_model_spec"] == "1.0.0"
    assert read["modelspec.trigger_phrase"] == "HANA_TOFU"
    assert read["ss_output_name"] == read["modelspec.title"] == "두부"
    assert (read["ss_network_dim"], float(read["ss_network_alpha"])) == ("16", 8)
    assert (read["ss_num_train_images"], read["ss_steps"], read["ss_seed"]) == ("3", "300", "7")
    assert read["ss_resolution"] == "(1024, 1024)" and read["modelspec.resolution"] == "1024x1024"
    assert json.loads(read["ss_tag_frequency"]) == {
        "HANA_TOFU": {"A HANA_TOFU": 2, "smiling": 2, "winking": 1, "한 두부": 1}
    }


@pytest.mark.parametrize(
    ("overrides", "notes"),
    [
        ([], {"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "False", "ss_min_snr_gamma": "5.0"}),
        (["loss.prediction=v_prediction"], {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "False"}),
        (["loss=zero_snr"], {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}),
        (["loss.snr_gamma=2"], {"ss_min_snr_gamma": "2.0"}),
        ([], {"ss_debiased_estimation": "False", "ss_loss_type": "l2", "ss_huber_c": "None"}),
        (["loss=debiased"], {"ss_min_snr_gamma": "None", "ss_debiased_estimation": "True"}),
        (["loss=huber"], {"ss_loss_type": "huber", "ss_huber_schedule": "snr", "ss_huber_c": "0.1"}),
        ([], {"ss_noise_offset": "None", "ss_multires_noise_iterations": "None", "modelspec.timestep_range": "0,1000"}),
        (["loss.noise_offset=0.05"], {"ss_noise_offset": "0.05"}),
        (["loss.pyramid_iterations=6"], {"ss_multires_noise_iterations": "6", "ss_multires_noise_discount": "0.3"}),
        (["loss.min_timestep=200", "loss.max_timestep=700"], {"modelspec.timestep_range": "200,700"}),
        (["loss=plain"], {"ss_min_snr_gamma": "None"}),
        (["text.max_tokens=225"], {"ss_max_token_length": "225"}),
    ],
)
def test_the_metadata_says_what_was_minimised(overrides, notes):
    assert notes_of(*overrides).items() >= notes.items()


def test_the_comment_says_that_there_were_masks_but_not_where():
    assert notes_of("loss.mask=/home/me/masks")["ss_training_comment"].endswith(", masks: folder")
    assert notes_of("loss.mask=alpha")["ss_training_comment"].endswith(", masks: alpha")
    assert "mask" not in NOTES["ss_training_comment"]
    assert "ss_max_token_length" not in NOTES


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    state = {"lora_unet_x.lora_down.weight": torch.ones(2, 2)}
    file = save_lora(tmp_path / "lora.safetensors", state, torch.float32, {})

    def half(tensors, name, metadata):
        with open(name, "wb") as stream:  # noqa: PTH123
            stream.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        save_lora(file, {key: 2 * value for key, value in state.items()}, torch.float32, {})
    assert load_file(file)["lora_unet_x.lora_down.weight"].tolist() == [[1, 1], [1, 1]]
    assert list(tmp_path.iterdir()) == [file]


def test_older_files_are_numbered_in_the_order_they_came(tmp_path):
    file = tmp_path / "HANA.v1.safetensors"
    assert keep_older(file) is None
    for content in ("first", "second", "third"):
        file.write_text(content)
        if content != "third":
            keep_older(file)
    (tmp_path / "HANA.v1.9.safetensors").write_text("of the user")
    assert keep_older(file).name == "HANA.v1.10.safetensors"
    assert not file.exists()
    assert (tmp_path / "HANA.v1.1.safetensors").read_text() == "first"
    assert (tmp_path / "HANA.v1.2.safetensors").read_text() == "second"
    assert (tmp_path / "HANA.v1.9.safetensors").read_text() == "of the user"
