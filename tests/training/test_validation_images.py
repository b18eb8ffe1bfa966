"""Pictures of a LoRA while it is trained are drawn as the sampler's options say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig

from lora_lab.adapters.files import kohya_state, save_lora
from lora_lab.base.encode import Cache, Encoder
from lora_lab.base.load import load_base
from lora_lab.launch.config import compose
from lora_lab.track.base import NO_TRACK
from lora_lab.training.observers import RunArtifacts, ValidationImages
from lora_lab.training.resolve import resolve_training

CPU = torch.device("cpu")
FEW = ("stage=train", "model.judge=null", "sampler.steps=2", "stage.seeds=[0,1]", "stage.prompts=['A {trigger}']")


@pytest.fixture(scope="module")
def base():
    return load_base(compose("model.precision=bf16").model, CPU)  # its rounding shows which way was taken


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    torch.manual_seed(0)
    base.network.add_adapter(LoraConfig(r=4, lora_alpha=1, target_modules=["to_q", "to_v"], init_lora_weights=False))
    file = tmp_path_factory.mktemp("lora") / "made.safetensors"
    save_lora(file, kohya_state({"unet": base.network}, base.lora_key), torch.float32, {})
    base.network.delete_adapters("default")
    return file


def looked(base, lora, folder, *overrides):
    """The validation pictures, and how many rows the UNet had in each call."""
    rows = []
    hook = base.network.register_forward_pre_hook(lambda unet, inputs: rows.append(len(inputs[0])))
    resolved = resolve_training(compose(*FEW, *overrides), folder)
    rendered: dict = {}
    tracker = replace(NO_TRACK, images=lambda step, images: rendered.update(images))
    artifacts = RunArtifacts(resolved, None, lora)
    ValidationImages(resolved, artifacts, Encoder(base, CPU, Cache(None), False), tracker).on_end(1)
    hook.remove()
    return [np.asarray(picture).astype(int) for picture, _ in rendered.values()], rows


@pytest.mark.slow
def test_fuse_and_batch_size_reach_the_pictures_of_validation(base, lora, tmp_path):
    plain, rows = looked(base, lora, tmp_path)
    assert rows == [2] * 4
    fused, _ = looked(base, lora, tmp_path, "sampler.fuse=true")
    together, rows = looked(base, lora, tmp_path, "sampler.batch_size=2")
    assert rows == [4] * 2
    for one, other, both in zip(plain, fused, together, strict=True):
        assert 0 < np.abs(one - other).mean() < 3 and np.abs(one - both).mean() < 3
    again, _ = looked(base, lora, tmp_path)
    assert all(np.array_equal(*pair) for pair in zip(plain, again, strict=True))
