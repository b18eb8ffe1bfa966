"""SDXL loads identically from a folder and from one checkpoint file; what cannot be read is refused."""

import itertools
import json
import re
import unicodedata
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from sdxl_structure import FULL, NARROW, pipeline, save_single_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from experiments.sdxl_config import byte_letters
from lora_lab.adapters.files import read_metadata
from lora_lab.base.load import SDXL_CONFIG, load_base, pick_device, pick_dtype, validate_prediction
from lora_lab.base.single_file import read_single_file
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage

CPU = torch.device("cpu")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def source():
    return pipeline(NARROW)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "folder"
    source.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def single(source, folder):
    return save_single_file(source, folder.parent / "juggernaut.safetensors")


@pytest.fixture(scope="module")
def model():
    return compose("model=tiny").model


@torch.no_grad()
@torch.no_grad()
def outputs(pipe):
    for part in PARTS:  # a product's last bit may depend on where a weight lies: files are mapped, copies are aligned
        for parameter in getattr(pipe, part).parameters():
            parameter.data = parameter.data.clone()
    tokens, _, pooled, _ = pipe.encode_prompt("A HANA_TOFU, smiling", do_classifier_free_guidance=False)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditions = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    drawn = pipe.unet(latents, 500, tokens, added_cond_kwargs=conditions).sample
    picture = pipe.vae.decode(latents).sample
    return tokens, pooled, drawn, picture, pipe.vae.encode(picture).latent_dist.mean


def test_a_folder_and_a_single_file_are_the_same_base(model, source, folder, single):
    expected = outputs(source)
    for settings in (
        replace(model, base=str(folder), variant="fp16"),  # variant is about the hub's files
        replace(model, base=str(single), config=str(folder)),
    ):
        pipe = load_base(settings, CPU).pipe
        for part in PARTS:
            ours, theirs = getattr(pipe, part).state_dict(), getattr(source, part).state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), part
        assert all(torch.equal(a, b) for a, b in zip(outputs(pipe), expected, strict=True))
        assert not any(p.requires_grad for part in PARTS for p in getattr(pipe, part).parameters())
        assert pipe.watermark is None


def test_precision_applies_to_every_component(model, folder, single):
    for settings in (replace(model, base=str(folder)), replace(model, base=str(single), config=str(folder))):
        pipe = load_base(replace(settings, precision="bf16"), CPU).pipe
        assert {p.dtype for part in PARTS for p in getattr(pipe, part).parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_model_vae_replaces_the_vae_of_the_base(model, folder, single, tmp_path):
    other = pipeline(NARROW).vae
    with torch.no_grad():
        other.decoder.conv_out.bias.fill_(0.25)
    other.save_pretrained(tmp_path / "vae")
    for base, config in ((folder, None), (single, str(folder))):
        pipe = load_base(replace(model, base=str(base), config=config, vae=str(tmp_path / "vae")), CPU).pipe
        assert (pipe.vae.decoder.conv_out.bias == 0.25).all()
    save_file(without("first_stage_model.")(load_file(single)), str(tmp_path / "no-vae.safetensors"))
    settings = replace(model, base=str(tmp_path / "no-vae.safetensors"), config=str(folder), vae=str(tmp_path / "vae"))
    assert (load_base(settings, CPU).pipe.vae.decoder.conv_out.bias == 0.25).all()
    with pytest.raises(InputError, match=r"model\.vae=.*cannot be loaded"):
        load_base(replace(model, base=str(folder), vae=str(folder / "unet")), CPU)


def without(part):
    def cut(state):
        return {key: value for key, value in state.items() if not key.startswith(part)}

    return cut


def narrower(state):
    return {key: value[:2] if key.endswith("input_blocks.0.0.weight") else value for key, value in state.items()}


CUT = "cannot be loaded as SDXL"
BROKEN = {
    "an UNet alone": (
        lambda state: {k: v for k, v in state.items() if k.startswith("model.diffusion_model.")},
        "no first text encoder and no second text encoder",
    ),
    "no VAE": (without("first_stage_model."), "no VAE: name one with model.vae="),
    "no second text encoder": (without("conditioner.embedders.1."), "has no second text encoder"),
    "no first text encoder": (without("conditioner.embedders.0."), "has no first text encoder"),
    "a layer missing": (without("model.diffusion_model.middle_block.1.transformer_blocks.9.attn1.to_q"), CUT),
    "a text layer missing": (without("conditioner.embedders.1.model.transformer.resblocks.31.ln_1"), CUT),
    "other widths": (narrower, CUT),
}
# What is no SDXL checkpoint, by a tensor that it has.
OTHER_FILES = {
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": "this is a LoRA: name it with lora=",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "Flux",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": "Stable Diffusion 1",
    "cond_stage_model.model.token_embedding.weight": "Stable Diffusion 2",
    "conditioner.embedders.0.model.token_embedding.weight": "SDXL's refiner",
    "down_blocks.0.resnets.0.conv1.weight": "a UNet alone",
    "decoder.conv_in.weight": "a VAE alone: name it with model.vae=",
    "something.else": "none of its tensors belongs to a UNet",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_incomplete_checkpoint_is_refused(model, folder, single, tmp_path, fault):
    path, (damage, sentence) = tmp_path / "broken.safetensors", BROKEN[fault]
    save_file(damage(load_file(single)), str(path))
    with pytest.raises(InputError, match=rf"model\.base=.*broken\.safetensors: .*{sentence}"):
        load_base(replace(model, base=str(path), config=str(folder)), CPU)


@pytest.mark.parametrize("tensor", OTHER_FILES)
def test_a_file_that_is_no_checkpoint_of_sdxl_is_named_before_it_is_loaded(tmp_path, tensor):
    path = tmp_path / "other.safetensors"
    save_file({tensor: torch.zeros(2, 2)}, str(path))
    with pytest.raises(InputError, match=rf"model\.base=.*other\.safetensors: .*{OTHER_FILES[tensor]}"):
        read_single_file(path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "prediction", "zero", "line"),
    [
        ((), {}, "epsilon", False, ""),
        (("v_pred",), {}, "v_prediction", False, "v-prediction (read from the file)"),
        (("v_pred", "ztsnr"), {}, "v_prediction", True, "v-prediction and zero terminal SNR (read from the file)"),
        ((), {"modelspec.prediction_type": "v"}, "v_prediction", False, "v-prediction (read from the file)"),
        ((), {"modelspec.prediction_type": "epsilon"}, "epsilon", False, ""),
        ((), {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "v_prediction", True, "zero terminal"),
    ],
)
def test_what_a_file_says_of_its_prediction_is_followed(
    model, folder, single, tmp_path, capsys, tensors, metadata, prediction, zero, line
):
    state = load_file(single) | {name: torch.zeros(0) for name in tensors}
    save_file(state, str(tmp_path / "file.safetensors"), metadata)
    settings = replace(model, base=str(tmp_path / "file.safetensors"), config=str(folder))
    loss = validate_prediction(settings, compose("model=tiny").loss)
    assert (loss.prediction, loss.zero_terminal_snr) == (prediction, zero)
    assert line in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_of_v_prediction_is_trained_and_drawn_as_one(folder, single, tmp_path, monkeypatch, capsys):
    state = load_file(single) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(state, str(tmp_path / "noob.safetensors"))
    monkeypatch.chdir(tmp_path)
    config = compose(
        "stage=train", f"model.base={tmp_path / 'noob.safetensors'}", f"model.config={folder}", "model.judge=null",
        "steps=2", "sampler.steps=2", "tracker=off", "device=cpu", "stage.prompts=['A {trigger}']",
    )  # fmt: skip
    run_stage(config, tmp_path / "run")
    assert "v-prediction and zero terminal SNR (read from the file)" in capsys.readouterr().out
    stated = read_metadata(tmp_path / "run" / "lora" / "HANA_TOFU.safetensors")
    assert stated["modelspec.prediction_type"] == "v" and stated["ss_zero_terminal_snr"] == "True"
    assert list((tmp_path / "run" / "samples").rglob("p0-s0.png"))
    scheduler = load_base(config.model, CPU).pipe.scheduler.config
    assert (scheduler.prediction_type, scheduler.rescale_betas_zero_snr) == ("v_prediction", True)
    assert scheduler.timestep_spacing == "trailing"


def test_the_configurations_in_the_package_are_those_of_sdxl():
    published = pipeline(FULL, "meta")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL_CONFIG / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(SDXL_CONFIG / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(SDXL_CONFIG / "text_encoder"))
        text_2 = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(SDXL_CONFIG / "text_encoder_2"))
    for name, part in zip(PARTS, (unet, vae, text, text_2), strict=True):
        ours, theirs = part.state_dict(), getattr(published, name).state_dict()
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert (vae.config.scaling_factor, vae.config.force_upcast) == (0.13025, True)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),  # as OpenAI published them
        ("a diagram", [320, 22697]),
        ("A HANA_TOFU's hat, don't!!", None),
        ("1girl, solo, (white background:1.2)", None),
        ("두부 猫 🙂 naïve CAFÉ a_b-c", None),
    ],
)
def test_the_tokenizer_in_the_package_is_clips(text, ids):
    tokenizer = CLIPTokenizer.from_pretrained(SDXL_CONFIG / "tokenizer")
    assert len(tokenizer) == 49408
    assert tokenizer(text).input_ids == [49406, *(ids or byte_pairs(text, SDXL_CONFIG / "tokenizer")), 49407]


def byte_pairs(text, folder):
    """Token ids by CLIP's rules, word by word: the pair of the lowest rank is merged until none is left."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    letters = byte_letters()
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    of_byte = dict(zip([*printable, *(b for b in range(256) if b not in printable)], letters, strict=True))
    found = []
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+"
    normal = " ".join(unicodedata.normalize("NFC", text).lower().split())
    for word in re.findall(pattern, normal):
        parts = [of_byte[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            merged, i = [], 0
            while i < len(parts):
                together = tuple(parts[i : i + 2]) == best
                merged.append("".join(parts[i : i + 2]) if together else parts[i])
                i += 2 if together else 1
            parts = merged
        found += [vocabulary[part] for part in parts]
    return found


@pytest.mark.parametrize("content", [b"", b"not tensors at all" * 9, b"\x40\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_checkpoint_is_refused(model, folder, tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.safetensors: cannot be read .*copy it again"):
        load_base(replace(model, base=str(path), config=str(folder)), CPU)


def test_a_folder_that_is_not_a_model_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="cannot be loaded as SDXL"):
        load_base(replace(model, base=str(tmp_path)), CPU)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded as SDXL"):
        load_base(replace(model, base=str(tmp_path)), CPU)


def test_an_unavailable_device_is_refused():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "gpu", "npu", ""):
        with pytest.raises(InputError, match=rf"device={name}: not usable here"):
            pick_device(name)


def test_auto_precision_follows_the_device(monkeypatch):
    cuda = torch.device("cuda")
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("auto", torch.device("mps")) == torch.float16
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=supported, **_: answer)
        assert pick_dtype("auto", cuda) == dtype
    assert [pick_dtype(name, cuda) for name in ("fp32", "bf16", "fp16")] == [
        torch.float32, torch.bfloat16, torch.float16
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"model\.precision=fp16: .*bf16 or fp32"):
        pick_dtype("fp16", CPU)


def test_a_base_that_waits_on_the_cpu_has_the_gpu_s_precision(model, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    pipe = load_base(replace(model, base=str(folder), precision="auto"), torch.device("cuda"), waiting=True).pipe
    assert {p.dtype for part in PARTS for p in getattr(pipe, part).parameters()} == {torch.bfloat16}
    assert pipe.device.type == "cpu"
