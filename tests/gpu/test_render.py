"""Sampling at SDXL's real size (random weights, 1024 px) on one GPU: the same images, faster and with less memory.

    python -m pytest tests/gpu/test_render.py -m gpu -n 0

Every test prints a line `MEASURED {json}`. LORA_LAB_GPU_DRY=1 runs the same lines on a CPU with narrow weights."""

import json
import statistics
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from gpu_memory import DRY, free, peak_gib
from peft import LoraConfig
from PIL import Image
from sdxl_structure import FULL, NARROW, pipeline

from lora_lab.adapters.files import kohya_state, save_lora
from lora_lab.adapters.inject import lora_attached
from lora_lab.base.encode import Cache, Encoder
from lora_lab.base.sdxl import SDXL
from lora_lab.launch.config import CONF, compose
from lora_lab.sampling import generate as drawing
from lora_lab.sampling.generate import Control, Request, generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE, SIDE, DEVICE = (NARROW, 64, torch.device("cpu")) if DRY else (FULL, 1024, torch.device("cuda"))
SAMPLER = replace(compose("sampler=euler").sampler, steps=4 if DRY else 40)
PROMPT = "A HANA_TOFU with a green background, smiling"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def pipe():
    made = pipeline(SHAPE, str(DEVICE), torch.bfloat16)
    yield made
    for name in PARTS:
        setattr(made, name, None)  # for the tests that come after


@pytest.fixture(scope="module")
def lora(pipe, tmp_path_factory):
    """Rank 16 on the attention's linear layers, of random numbers."""
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets, init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=2e-2)
    file = tmp_path_factory.mktemp("lora") / "made.safetensors"
    save_lora(file, kohya_state({"unet": pipe.unet}, SDXL.lora_key), torch.float32, {})
    pipe.unet.delete_adapters("default")
    return file


@pytest.fixture
def measured(capsys):
    def write(test: str, **numbers: object) -> None:
        device = "cpu" if DRY else torch.cuda.get_device_name()
        with capsys.disabled():
            print("\nMEASURED " + json.dumps({"test": test, "device": device, **numbers}))

    return write


@pytest.fixture(autouse=True)
def clean_gpu():
    free()
    yield
    free()


def photos(count: int) -> list[Request]:
    """img2img at strength 0.5: half of the sampler's steps."""
    photo = Image.effect_mandelbrot((SIDE, SIDE), (-2, -1, 1, 1), 80).convert("RGB")
    return [Request(PROMPT, seed, photo.size, photo, 0.5) for seed in range(count)]


def draw(base, requests, sampler=SAMPLER, encoder=None) -> tuple[list[np.ndarray], list[float]]:
    """The pictures, and when each of them was there, in seconds."""
    pictures, times = [], [time.perf_counter()]
    base = base if isinstance(base, SDXL) else SDXL(base)
    for picture in generate(base, requests, sampler, encoder):
        pictures.append(np.asarray(picture).astype(float))
        times.append(time.perf_counter())
    return pictures, times


def far(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Mean difference of pixels, of 255."""
    return round(float(np.mean([np.abs(a - b).mean() for a, b in zip(one, other, strict=True)])), 4)


def test_captured_and_fused_img2img_gives_the_same_pictures(pipe, lora, measured):
    requests, drawn = photos(2 if DRY else 5), {}
    ways = {"eager": (False, False), "captured": (True, False), "captured, fused": (True, True)}
    for way, (capture, fuse) in {"warm-up": (False, False), **ways}.items():
        free()
        with lora_attached(SDXL(pipe), lora, fuse=fuse):
            drawn[way], times = draw(pipe, requests, replace(SAMPLER, capture=capture))
        each = [round(after - before, 3) for before, after in pairwise(times)]
        seconds = statistics.median(each[1:])  # the first one encodes and records
        measured(f"img2img, {way}", seconds_a_picture=seconds, each=each, peak_gib=peak_gib())
    with lora_attached(SDXL(pipe), None):
        bare, _ = draw(pipe, requests)
    apart = {way: far(drawn[way], drawn["eager"]) for way in ways} | {"without the LoRA": far(bare, drawn["eager"])}
    again = far(drawn["warm-up"], drawn["eager"])
    measured("img2img, mean pixel differences to eager", again=again, **apart)
    assert all(picture.std() > 1 for picture in drawn["eager"])
    assert apart["captured"] <= max(2 * again, 0.5)
    assert apart["captured, fused"] < apart["without the LoRA"]


@pytest.fixture
def controlled(pipe):
    """The base with a ControlNet of SDXL's size, whose layers that begin as zeros have random weights."""
    with torch.device(DEVICE):
        network = ControlNetModel.from_unet(pipe.unet).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    base = SDXL(pipe)
    base.controlnet = network.requires_grad_(False).eval()
    return base


def test_captured_img2img_with_a_controlnet_and_a_mask_gives_the_same_pictures(controlled, measured):
    """Two graphs: with the ControlNet, and without it after the end of the control."""
    edges, mask = Image.effect_noise((SIDE, SIDE), 90).convert("RGB"), Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (SIDE // 4, 0, SIDE, SIDE))
    plain = photos(2 if DRY else 4)
    controls = {"to the end": Control(edges, 0.8, 1.0), "to the half": Control(edges, 0.8, 0.5)}
    requests = {name: [replace(request, control=control) for request in plain] for name, control in controls.items()}
    requests["to the half, in a mask"] = [replace(request, mask=mask) for request in requests["to the half"]]
    bare, _ = draw(controlled, plain)
    for name, each in requests.items():
        eager, _ = draw(controlled, each, replace(SAMPLER, capture=False))
        again, _ = draw(controlled, each[:1], replace(SAMPLER, capture=False))
        captured, times = draw(controlled, each, replace(SAMPLER, capture=True))
        apart, noise = far(captured, eager), far(again, eager[:1])
        seconds = statistics.median([round(after - before, 3) for before, after in pairwise(times)][1:])
        measured(f"controlnet {name}", seconds_a_picture=seconds, apart=apart, again=noise, peak_gib=peak_gib())
        assert apart <= max(2 * noise, 0.5) and far(eager, bare) > 1
        if each[0].mask is not None:
            outside = np.asarray(mask) == 0
            assert all(np.array_equal(picture[outside], np.asarray(plain[0].photo)[outside]) for picture in captured)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_captured_network_follows_weights_that_change(pipe, lora, measured, fuse):
    base, weights = SDXL(pipe), (1.0, 0.4, 1.0)
    (request,) = photos(1)
    alone = []
    for weight in weights[:2]:
        with lora_attached(base, lora, weight, fuse):
            alone += draw(pipe, [request], replace(SAMPLER, capture=False))[0]
    with lora_attached(base, lora, fuse=fuse) as attached:
        requests = [replace(request, lora_weight=weight) for weight in weights]
        images = [np.asarray(image).astype(float) for image in generate(base, requests, SAMPLER, lora=attached)]
    first, second, third = images
    apart = [far([first], alone[:1]), far([second], alone[1:]), far([third], alone[:1])]
    measured(f"img2img, weights that change, fuse={fuse}", apart=apart, between_weights=far(alone[:1], alone[1:]))
    assert max(apart) < far(alone[:1], alone[1:]) / 4


@pytest.mark.parametrize("size", [2, 4])
def test_images_of_a_batch_are_nearly_those_of_batch_size_1(pipe, lora, measured, size):
    requests = photos(2 * size)
    with lora_attached(SDXL(pipe), lora, fuse=True):
        alone, _ = draw(pipe, requests)
        free()
        together, times = draw(pipe, requests, replace(SAMPLER, batch_size=size))
    seconds = round((times[-1] - times[size]) / size, 3)
    measured(f"img2img, batch {size}", seconds_a_picture=seconds, peak_gib=peak_gib(), apart=far(together, alone))
    assert far(together, alone) < 3


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "sampler").glob("*.yaml")))
def test_no_step_waits_for_the_device(pipe, monkeypatch, name):
    sampler, real = replace(compose(f"sampler={name}").sampler, steps=6, capture=False), drawing.predictor
    calls = []

    def watched(base, graphs, capture):
        predict = real(base, graphs, capture)

        def each(inputs):
            calls.append(inputs["timestep"].device.type)
            output = predict(inputs)
            if not DRY:  # from the first call to the last nothing may wait
                torch.cuda.set_sync_debug_mode("default" if len(calls) in (6, 9) else "error")
            return output

        return each

    monkeypatch.setattr(drawing, "predictor", watched)
    try:
        draw(pipe, [Request(PROMPT, 0, (SIDE, SIDE)), *photos(1)], sampler)
    finally:
        if not DRY:
            torch.cuda.set_sync_debug_mode("default")
    assert calls == [DEVICE.type] * 9


def test_offload_and_tiles_take_less_memory_for_the_same_images(pipe, lora, measured):
    requests = photos(2)
    with lora_attached(SDXL(pipe), lora):
        whole, _ = draw(pipe, requests)
        measured("img2img, all on the device", peak_gib=peak_gib())
    for name in PARTS:
        getattr(pipe, name).to("cpu")
    encoder = Encoder(SDXL(pipe), DEVICE, Cache(None), offload=True)
    for tiled in (False, True):
        if tiled:
            encoder.base.enable_tiling(SIDE // 2)
        free()
        with lora_attached(SDXL(pipe), lora):
            drawn, times = draw(pipe, requests, encoder=encoder)
        seconds = round(times[-1] - times[0], 2)
        measured(f"img2img, offload, tiled={tiled}", peak_gib=peak_gib(), seconds=seconds, apart=far(drawn, whole))
        # A VAE of random weights lives from its attention and norms, which tiles do not share.
        assert all(picture.std() > 1 for picture in drawn) if tiled else far(drawn, whole) < 0.5
        assert DRY or all(next(getattr(pipe, name).parameters()).device.type == "cpu" for name in PARTS)
    pipe.vae.disable_tiling()
    pipe.to(DEVICE)


def test_a_float16_vae_that_overflows_still_gives_images(pipe, measured):
    """Random weights stay small; so its decoder is made to pass float16's 65504 where it begins."""
    kept = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(1e4)
    dtypes = []
    seen = pipe.vae.decoder.register_forward_pre_hook(lambda vae, inputs: dtypes.append(str(inputs[0].dtype)))
    for name in PARTS:
        getattr(pipe, name).half()
    half = pipe.vae.decoder.conv_in.weight.clone()
    ((picture,), _) = draw(pipe, [Request(PROMPT, 0, (SIDE, SIDE))], replace(SAMPLER, steps=4))
    seen.remove()
    measured("text to image, fp16", decoded_in=dtypes, spread=round(float(picture.std()), 1), peak_gib=peak_gib())
    assert picture.std() > 1 and torch.equal(pipe.vae.decoder.conv_in.weight, half)
    assert DRY or dtypes == ["torch.bfloat16"]
    for name in PARTS:
        getattr(pipe, name).to(torch.bfloat16)
    pipe.vae.load_state_dict(kept)
