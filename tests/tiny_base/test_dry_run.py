"""The one command that makes the base, on a CPU with next to no data: what it leaves loads with the stock classes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AVATARS = Path(__file__).with_name("avatars.jsonl.xz")
CHECKOUT = Path(__file__).resolve().parents[2]


def run(module, *argv):
    command = [sys.executable, "-m", f"experiments.tiny_base{module}", *map(str, argv)]
    return subprocess.run(
        command, cwd=CHECKOUT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


@pytest.mark.slow
def test_from_nothing_to_a_bundle_in_two_pieces(tmp_path):
    work = tmp_path / "work"
    command = ("", work, "--dry-run", "--avatars", AVATARS, "--piece")
    first = run(*command, 75)
    assert first.returncode == 0, first.stderr
    assert "run the same command again" in first.stdout and (work / "parts" / "vae.done").is_file()
    assert not (work / "bundle").exists()
    second = run(*command, 600)
    assert second.returncode == 0, second.stderr
    bundle = work / "bundle"
    sizes = [file.stat().st_size for file in bundle.rglob("*") if file.is_file()]
    assert sum(sizes) < 39e6 and max(sizes) < 15 * 2**20

    import torch
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(bundle / "tiny-sdxl", torch_dtype=torch.float32)
    assert pipe("a red apple", height=128, width=128, num_inference_steps=2).images[0].size == (128, 128)

    from diffusers import ControlNetModel

    controlnet = ControlNetModel.from_pretrained(bundle / "tiny-controlnet")
    assert controlnet.config.cross_attention_dim == pipe.unet.config.cross_attention_dim
    assert any(layer.weight.any() for layer in controlnet.controlnet_down_blocks), "it has learnt something"

    out = tmp_path / "evaluation"
    figures = run(".evaluation", bundle, out, "--avatars", AVATARS, "--only", "vae", "captions", "clip")
    assert figures.returncode == 0, figures.stderr
    measured = json.loads((out / "figures.json").read_text())
    assert measured["vae"]["held-out, dB"] > 5 and measured["captions"]["avatars"]["exact"] < 0.5
    assert (out / "vae.png").is_file()


@pytest.mark.slow
def test_training_without_a_gpu_is_refused(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run("", tmp_path / "work")
    assert done.returncode == 2 and "--dry-run" in done.stderr
