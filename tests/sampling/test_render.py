"""Images of the base are cached by all that decides them, and rendered again if damaged."""

import numpy as np
import pytest
import torch
from PIL import Image

from lora_lab.launch.config import compose
from lora_lab.sampling.generate import image_specs, load_base_for_sampling, render_base, render_settings

CPU = torch.device("cpu")
FEW = ("sampler.steps=1",)


@pytest.fixture(scope="module")
def encoder():
    config = compose(*FEW)
    return load_base_for_sampling(config.model, config.memory, config.loss, CPU)


def drawn(encoder, folder, *overrides, prompts=("A {trigger}",), seeds=(0, 1), base="base"):
    """Names of the files, their pixels, and how many times the UNet was asked."""
    asked = []
    hook = encoder.base.network.register_forward_pre_hook(lambda unet, inputs: asked.append(1))
    config = compose(*FEW, f"cache={folder / 'cache'}", *overrides)
    render = render_settings(
        config.model, config.loss, config.memory, config.sampler, config.text, config.cache, base, torch.float32
    )
    pictures, files = render_base(image_specs(config.triggers.fill(prompts), seeds), render, folder / "run", encoder)
    hook.remove()
    assert all(np.array_equal(np.asarray(p), np.asarray(Image.open(f))) for p, f in zip(pictures, files, strict=True))
    return [file.relative_to(folder) for file in files], [np.asarray(p) for p in pictures], len(asked)


def test_images_of_the_base_are_rendered_once_for_all_runs(encoder, tmp_path):
    files, pixels, calls = drawn(encoder, tmp_path)
    assert calls == 2 and len(set(files)) == 2 and not np.array_equal(*pixels)
    again, same, calls = drawn(encoder, tmp_path, "lr=0.5", "rank=3", "score.seeds=[5]", seeds=(1, 0))
    assert calls == 0 and again == files[::-1] and np.array_equal(same[0], pixels[1])
    _, _, calls = drawn(encoder, tmp_path, seeds=(0, 1, 2))
    assert calls == 1


@pytest.mark.parametrize(
    "other", ["sampler.guidance=2", "sampler=ddim", "trigger=MINT", "model.vae=demo:tiny-sdxl/vae"]
)
def test_settings_that_change_the_image_have_another_key(encoder, tmp_path, other):
    files, _, _ = drawn(encoder, tmp_path, seeds=(0,))
    others, _, calls = drawn(encoder, tmp_path, other, *FEW, seeds=(0,))
    assert calls == 1 and others != files


def test_another_base_has_another_key(encoder, tmp_path):
    assert drawn(encoder, tmp_path, seeds=(0,))[0] != drawn(encoder, tmp_path, seeds=(0,), base="other")[0]


def test_a_damaged_image_is_rendered_again(encoder, tmp_path, capsys):
    (file,), (pixels,), _ = drawn(encoder, tmp_path, seeds=(0,))
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:200])
    _, (again,), calls = drawn(encoder, tmp_path, seeds=(0,))
    assert calls == 1 and np.array_equal(again, pixels) and f"{file.name} is damaged" in capsys.readouterr().out


def test_without_a_cache_images_are_in_the_run_folder(encoder, tmp_path):
    (file,), _, _ = drawn(encoder, tmp_path, "cache=null", seeds=(0,))
    assert file.parts[0] == "run" and not (tmp_path / "cache").exists()
