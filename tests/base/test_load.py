"""SDXL loads identically from a folder and from one checkpoint file; what cannot be read is refused."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sdxl_structure import NARROW, pipeline, save_single_file

from lora_lab.base.load import load_base, pick_device, pick_dtype
from lora_lab.errors import InputError
from lora_lab.launch.config import compose

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


BROKEN = {
    "an UNet alone": lambda state: {k: v for k, v in state.items() if k.startswith("model.diffusion_model.")},
    "no VAE": without("first_stage_model."),
    "no second text encoder": without("conditioner.embedders.1."),
    "no first text encoder": without("conditioner.embedders.0."),
    "a layer missing": without("model.diffusion_model.middle_block.1.transformer_blocks.9.attn1.to_q"),
    "a text layer missing": without("conditioner.embedders.1.model.transformer.resblocks.31.ln_1"),
    "other widths": narrower,
    "a LoRA": lambda state: {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 32)},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_incomplete_checkpoint_is_refused(model, folder, single, tmp_path, fault):
    path = tmp_path / "broken.safetensors"
    save_file(BROKEN[fault](load_file(single)), str(path))
    with pytest.raises(InputError, match=r"model\.base=.*broken\.safetensors: cannot be loaded as SDXL"):
        load_base(replace(model, base=str(path), config=str(folder)), CPU)


@pytest.mark.parametrize("content", [b"", b"not tensors at all" * 9, b"\x40\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_checkpoint_is_refused(model, folder, tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"broken\.safetensors: cannot be loaded as SDXL"):
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
