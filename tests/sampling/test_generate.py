"""generate: an image depends on its request alone, and is that of diffusers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from hydra.utils import instantiate
from peft import LoraConfig
from PIL import Image
from sdxl_structure import NARROW, pipeline

from lora_lab.base import sdxl
from lora_lab.base.cuda_graph import GraphPool
from lora_lab.base.encode import Cache, Encoder
from lora_lab.base.load import load_base
from lora_lab.base.sdxl import SDXL
from lora_lab.demo import PHOTOS
from lora_lab.errors import InputError, RunError
from lora_lab.launch.config import CONF, compose
from lora_lab.sampling import generate as drawing
from lora_lab.sampling.generate import Request, check_strength, generate

CONFIG = compose("sampler.steps=4")
SAMPLER = CONFIG.sampler
PROMPT = "a cartoon yellow star with a green background"


@pytest.fixture(scope="module")
def pipe():
    return load_base(CONFIG.model, torch.device("cpu")).pipe


def draw(pipe, *requests, sampler=SAMPLER, encoder=None):
    return [np.asarray(picture) for picture in generate(SDXL(pipe), list(requests), sampler, encoder)]


def far(one, other):
    return np.abs(one.astype(int) - other).mean()


def test_an_image_depends_on_its_seed_and_not_on_its_neighbours(pipe):
    photo = Image.open(PHOTOS / "1.png").convert("RGB").resize((96, 64))
    first, again, other = (Request(PROMPT, seed, (64, 64)) for seed in (0, 0, 1))
    changed = Request(PROMPT, 2, (96, 64), photo, 0.8)
    alone = [draw(pipe, request)[0] for request in (first, changed)]
    together = draw(pipe, other, first, changed, again)
    assert np.array_equal(together[1], alone[0]) and np.array_equal(together[3], alone[0])
    assert np.array_equal(together[2], alone[1])
    assert np.abs(together[0].astype(int) - alone[0]).mean() > 1


def test_size_is_width_and_height_and_a_photo_keeps_its_size(pipe):
    photo = Image.open(PHOTOS / "1.png").convert("RGB").resize((48, 80))
    drawn, changed = draw(
        pipe, Request(PROMPT, 0, (96, 64)), Request(PROMPT, 0, (128, 128), photo, 0.5)
    )  # the photo decides, not the size
    assert drawn.shape == (64, 96, 3)
    assert changed.shape == (80, 48, 3)


def test_a_higher_strength_is_further_from_the_photo(pipe):
    photo = Image.open(PHOTOS / "1.png").convert("RGB").resize((128, 128))
    apart = [
        np.abs(draw(pipe, Request(PROMPT, 0, photo.size, photo, strength))[0].astype(int) - np.asarray(photo)).mean()
        for strength in (0.25, 1.0)
    ]
    assert apart[0] < apart[1] / 2


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "sampler").glob("*.yaml")))
def test_every_sampler_follows_the_prompt(pipe, name):
    sampler = replace(compose(f"sampler={name}").sampler, steps=8)
    (drawn,) = draw(pipe, Request(PROMPT, 0, (128, 128)), sampler=sampler)
    red, green, blue = drawn[:16, :16].reshape(-1, 3).mean(axis=0)
    assert green > max(red, blue) + 20
    assert drawn.std() > 20
    photo = Image.fromarray(drawn)
    assert draw(pipe, Request(PROMPT, 0, photo.size, photo, 0.5), sampler=sampler)[0].std() > 20


def test_the_negative_prompt_needs_guidance(pipe):
    request = Request(PROMPT, 0, (64, 64))
    away = replace(SAMPLER, negative_prompt="a green background")
    assert not np.array_equal(draw(pipe, request)[0], draw(pipe, request, sampler=away)[0])
    plain, unguided = (replace(sampler, guidance=1.0) for sampler in (SAMPLER, away))
    assert np.array_equal(draw(pipe, request, sampler=plain)[0], draw(pipe, request, sampler=unguided)[0])


def test_sampling_leaves_the_base_unchanged(pipe):
    scheduler = pipe.scheduler
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    draw(pipe, Request(PROMPT, 0, (64, 64)), sampler=replace(compose("sampler=ddim").sampler, steps=2))
    assert pipe.scheduler is scheduler
    assert all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())


def test_a_float16_vae_that_overflows_is_upcast_temporarily():
    pipe = pipeline(NARROW)
    photo = Image.open(PHOTOS / "1.png").convert("RGB").resize((64, 64))
    requests = Request("a star", 0, (64, 64)), Request("a star", 0, (64, 64), photo, 0.5)
    exact = draw(pipe, *requests)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.half()
    for ours, theirs in zip(draw(pipe, *requests), exact, strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 3
    assert pipe.vae.dtype == torch.float16


def test_a_strength_without_a_step_is_refused_with_one_that_works(pipe):
    photo = Image.new("RGB", (64, 64))
    with pytest.raises(InputError, match=r"stage\.strength=0\.2 with sampler\.steps=4 .*at least 0\.25 or more steps"):
        draw(pipe, Request(PROMPT, 0, (64, 64), photo, 0.2))
    for steps in range(1, 120):  # the strength that the message names does do
        with pytest.raises(InputError) as caught:
            check_strength(steps, 0.5 / steps)
        named = float(str(caught.value).split("at least ")[1].split()[0])
        check_strength(steps, named)


ANCESTRAL = {"_target_": "diffusers.EulerAncestralDiscreteScheduler.from_config", "_partial_": True}


@pytest.mark.parametrize(
    ("scheduler", "guidance", "negative"),
    [
        ("euler", 5.0, ""),
        ("euler", 3.0, "a green background"),
        ("euler", 1.0, "a green background"),
        ("ddim", 5.0, ""),
        ("dpmpp_2m_karras", 5.0, ""),
        (ANCESTRAL, 5.0, ""),
    ],
)
def test_images_are_bit_identical_to_diffusers(pipe, scheduler, guidance, negative):
    scheduler = scheduler if scheduler is ANCESTRAL else compose(f"sampler={scheduler}").sampler.scheduler
    sampler = replace(SAMPLER, scheduler=scheduler, steps=3, guidance=guidance, negative_prompt=negative)
    photo = Image.open(PHOTOS / "1.png").convert("RGB").resize((64, 48))
    ours = draw(pipe, Request(PROMPT, 3, (48, 64)), Request(PROMPT, 4, (1, 1), photo, 0.7), sampler=sampler)
    parts = {**pipe.components, "scheduler": instantiate(sampler.scheduler)(pipe.scheduler.config)}
    common = dict(
        prompt=PROMPT, negative_prompt=negative or None, num_inference_steps=3, guidance_scale=guidance,
    )  # fmt: skip
    text_to_image = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    img2img = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    for theirs in (text_to_image, img2img):
        theirs.set_progress_bar_config(disable=True)
    first, second = (torch.Generator().manual_seed(seed) for seed in (3, 4))
    expected = [
        text_to_image(**common, width=48, height=64, generator=first).images[0],
        img2img(**common, image=photo, strength=0.7, generator=second).images[0],
    ]
    assert all(np.array_equal(one, np.asarray(other)) for one, other in zip(ours, expected, strict=True))


def test_an_empty_negative_prompt_follows_the_configuration_of_the_base():
    """Zeros for SDXL itself; a base that learnt from "" says force_zeros_for_empty_prompt: false."""
    pipe, request = pipeline(NARROW), Request("a star", 0, (64, 64))
    (zeros,) = draw(pipe, request)
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    (empty,) = draw(pipe, request)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("a star", width=64, height=64, num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(empty, np.asarray(theirs.images[0])) and not np.array_equal(empty, zeros)


def test_batches_have_one_form_and_nearly_the_images_of_batch_size_1(pipe):
    photo, other = (Image.open(PHOTOS / f"{i}.png").convert("RGB").resize((64, 64)) for i in (1, 2))
    requests = [
        *(Request(prompt, seed, (64, 64)) for prompt, seed in ((PROMPT, 0), ("a red cat", 1), (PROMPT, 2))),
        Request(PROMPT, 3, (64, 48)),
        *(Request(PROMPT, seed, (64, 64), each, 0.8) for seed, each in ((4, photo), (5, other))),
        Request(PROMPT, 6, (64, 64), photo, 0.5),
    ]
    rows = []
    seen = pipe.unet.register_forward_pre_hook(lambda unet, inputs: rows.append(len(inputs[0])))
    together = draw(pipe, *requests, sampler=replace(SAMPLER, batch_size=2))
    seen.remove()
    # 4 steps, with guidance twice the rows: 2 and 1 of the three, the other size, the two photos, the other strength
    assert rows == [4] * 4 + [2] * 4 + [2] * 4 + [4] * 3 + [2] * 2
    for ours, alone in zip(together, draw(pipe, *requests), strict=True):
        assert ours.shape == alone.shape and far(ours, alone) < 0.1


GPU_POOL = GraphPool(torch.device("cuda"))  # its stream is made by the first real capture


class Replayed:
    """A CUDA graph as a CPU can have it: fixed inputs per shape, and one output that every call overwrites."""

    def __init__(self, function, pool):
        self.function, self.inputs, self.output, self.calls = function, {}, {}, 0

    def __call__(self, inputs):
        assert all(isinstance(value, torch.Tensor) for value in inputs.values())
        shapes = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        fixed = self.inputs.setdefault(shapes, {name: value.clone() for name, value in inputs.items()})
        for name, value in inputs.items():
            fixed[name].copy_(value)
        output = self.function(fixed)
        self.calls += 1
        return self.output.setdefault(shapes, output).copy_(output)


def test_one_graph_per_form_is_captured_as_a_function_of_tensors(pipe, monkeypatch):
    """PNDM keeps what the UNet said in the steps before, as it is where there is no guidance."""
    photo = Image.open(PHOTOS / "1.png").convert("RGB").resize((48, 32))
    requests = [*(Request(PROMPT, seed, (32, 32)) for seed in (0, 1)), Request(PROMPT, 2, photo.size, photo, 0.5)]
    captured, real = [], drawing.predictor

    def replayed(function, pool):
        captured.append(Replayed(function, pool))
        return captured[-1]

    pndm = {"_target_": "diffusers.PNDMScheduler.from_config", "_partial_": True, "skip_prk_steps": True}
    for scheduler, guidance in ((pndm, 1.0), (SAMPLER.scheduler, 5.0)):
        sampler = replace(SAMPLER, scheduler=scheduler, guidance=guidance)
        eager = draw(pipe, *requests, sampler=sampler)
        with monkeypatch.context() as patched:
            patched.setattr(drawing, "GraphedCallable", replayed)
            patched.setattr(drawing, "predictor", lambda base, _, capture: real(base, GPU_POOL, capture))
            again = draw(pipe, *requests, sampler=sampler)
            assert len(captured.pop().inputs) == 2 and not captured
            draw(pipe, *requests[:1], sampler=replace(sampler, capture=False))
            assert not captured
        assert all(np.array_equal(*pair) for pair in zip(eager, again, strict=True))


GPU = torch.device("cpu:0")  # to torch the CPU, but told apart by name


@pytest.fixture
def watched(monkeypatch):
    """A base whose parts write down when they go where."""
    pipe, moves, here = pipeline(NARROW), [], set()
    for name in ("vae", "text_encoder", "text_encoder_2", "unet"):
        part = getattr(pipe, name)

        def to(*arguments, name=name, part=part, **settings):
            if arguments and arguments[0] in (GPU, "cpu"):
                where = "gpu" if arguments[0] is GPU else "cpu"
                moves.append((name, where))
                (here.add if where == "gpu" else here.discard)(name)
                assert len(here) <= 1, f"{here} are on the device at once"
            return type(part).to(part, *arguments, **settings)

        monkeypatch.setattr(part, "to", to)
    return pipe, moves


def test_with_offload_one_component_at_a_time_gives_the_same_images(watched):
    pipe, moves = watched
    photo = Image.open(PHOTOS / "1.png").convert("RGB").resize((64, 64))
    requests = [Request("a star", 0, (64, 64)), *(Request("a cat", s, photo.size, photo, 0.5) for s in (1, 2))]
    plain = draw(pipe, *requests)
    moves.clear()
    taking_turns = draw(pipe, *requests, encoder=Encoder(SDXL(pipe), GPU, Cache(None), offload=True))
    order = ["text_encoder", "text_encoder_2", "vae", "unet", "vae"]
    assert moves == [(part, where) for part in order for where in ("gpu", "cpu")]
    assert all(np.array_equal(*pair) for pair in zip(plain, taking_turns, strict=True))


def test_with_offload_a_component_that_was_on_the_device_stays(watched):
    """Such as the UNet in training, whose weights a recorded step knows by where they lie."""
    pipe, moves = watched
    moves.clear()
    draw(
        pipe,
        Request("a star", 0, (64, 64)),
        encoder=Encoder(SDXL(pipe), torch.device("cpu"), Cache(None), offload=True),
    )
    assert "cpu" not in {where for _, where in moves}


def test_the_cache_is_not_used_with_a_lora_of_the_text_encoders(tmp_path):
    pipe, request = pipeline(NARROW), Request("a star", 0, (64, 64))
    encoder = Encoder(SDXL(pipe), torch.device("cpu"), Cache(tmp_path), offload=False)
    (plain,) = draw(pipe, request, encoder=encoder)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    for part in (pipe.text_encoder, pipe.text_encoder_2):
        part.register_forward_pre_hook(lambda *_: pytest.fail("a text was encoded again"))
    assert np.array_equal(draw(pipe, request, encoder=encoder)[0], plain)
    for part in (pipe.text_encoder, pipe.text_encoder_2):
        part._forward_pre_hooks.clear()
    pipe.text_encoder.add_adapter(
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), "attached"
    )
    (other,) = draw(pipe, request, encoder=encoder)
    assert not np.array_equal(other, plain) and np.array_equal(other, draw(pipe, request)[0])


def overflowing():
    """A base in float16 whose VAE has numbers inside that float16 has not, as SDXL's own."""
    pipe = pipeline(NARROW)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(3e4)  # what comes out is normalised again
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.half()
    return pipe


@pytest.mark.parametrize(("best", "instead"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_a_vae_that_overflows_decodes_in_a_wider_range_and_is_restored(monkeypatch, best, instead):
    """In bfloat16 where the device has it (there `auto` is that), else in float32."""
    pipe, dtypes = overflowing(), []
    monkeypatch.setattr(sdxl, "pick_dtype", lambda precision, device: best)
    before = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    pipe.vae.decoder.register_forward_pre_hook(lambda vae, inputs: dtypes.append(inputs[0].dtype))
    (drawn,) = draw(pipe, Request("a star", 0, (64, 64)), sampler=replace(SAMPLER, steps=2))
    assert dtypes == [instead] and drawn.std() > 1
    assert all(torch.equal(value, before[name]) for name, value in pipe.vae.state_dict().items())


def test_non_finite_values_are_reported_with_the_request():
    pipe = overflowing()
    pipe.vae.register_to_config(force_upcast=False)
    with pytest.raises(RunError, match=r"'a star' with seed 7: the VAE gave .* not finite; .*another model\.vae"):
        draw(pipe, Request("a star", 7, (64, 64)), sampler=replace(SAMPLER, steps=1))
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(RunError, match=r"'a cat' with seed 8: the unet gave .* not finite; use model\.precision"):
        draw(pipe, Request("a cat", 8, (64, 64)), sampler=replace(SAMPLER, steps=1))


def test_a_tiled_vae_is_nearly_the_same_and_has_other_cache_keys(tmp_path):
    pipe = load_base(CONFIG.model, torch.device("cpu")).pipe
    photo = Image.open(PHOTOS / "1.png").convert("RGB").resize((128, 96))
    requests = Request(PROMPT, 0, (128, 96)), Request(PROMPT, 1, photo.size, photo, 0.25)
    encoder = Encoder(SDXL(pipe), torch.device("cpu"), Cache(tmp_path), offload=False)
    whole, ((latents,), _) = draw(pipe, *requests), encoder.encode_images([("1.png", photo)])
    encoder.base.enable_tiling(64)
    (tiled,), made = replace(encoder).encode_images([("1.png", photo)])
    assert made == 1 and not torch.equal(tiled, latents)
    assert (tiled - latents).abs().mean() < 0.1 * latents.std()
    for ours, theirs in zip(draw(pipe, *requests), whole, strict=True):
        assert ours.shape == theirs.shape and 0 < far(ours, theirs) < 4


def test_after_out_of_memory_the_vae_decodes_in_tiles(capsys):
    pipe = load_base(CONFIG.model, torch.device("cpu")).pipe
    requests = [Request(PROMPT, seed, (128, 128)) for seed in (0, 1)]
    whole, decoder = draw(pipe, *requests), pipe.vae.decoder

    def small(module, inputs):
        if inputs[0].shape[-1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with decoder.register_forward_pre_hook(small):
        tiled = draw(pipe, *requests)
    assert all(0 < far(one, other) < 12 for one, other in zip(whole, tiled, strict=True))
    assert capsys.readouterr().out.count("in tiles") == 1
