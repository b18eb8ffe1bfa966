"""Structure of the photo: ControlNets and masks give the images of diffusers' pipelines."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from sdxl_structure import NARROW, pipeline, save_ip_adapters, unet_of
from toy_base import ToyBase

from lora_lab.adapters.files import kohya_state, save_lora
from lora_lab.adapters.inject import lora_attached
from lora_lab.base.encode import Cache, Encoder
from lora_lab.base.sdxl import SDXL
from lora_lab.demo import PHOTOS
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.sampling.generate import Control, Request, generate
from lora_lab.sampling.structure import check_conditions, controls_of, masks_of

CPU = torch.device("cpu")
SAMPLER = replace(compose().sampler, steps=6)
PROMPT = "a cartoon yellow star"


def photo(number=1, size=(64, 48)):
    return Image.open(PHOTOS / f"{number}.png").convert("RGB").resize(size)


def random_controlnet(unet, union=False):
    """Of the structure that diffusers gives it for `unet`; the layers that begin as zeros have random weights too."""
    torch.manual_seed(1)
    network = (ControlNetUnionModel if union else ControlNetModel).from_unet(unet)
    if union:
        sizes = {"num_trans_channel": 8, "num_proj_channel": 8, "num_trans_head": 2}
        network = ControlNetUnionModel.from_config(network.config, **sizes)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def structure_of(controlnet, kind="canny", **changes):
    images = {"images": str(PHOTOS)} if kind == "pose" else {}  # no model detects poses here
    return replace(compose("structure=canny").structure, kind=kind, controlnet=str(controlnet), **images, **changes)


def loaded(tmp_path, network, kind="canny"):
    network.save_pretrained(tmp_path / "controlnet")
    base = SDXL(pipeline(NARROW))
    base.load_control(structure_of(tmp_path / "controlnet", kind), CPU)
    return base


def draw(base, *requests, **changes):
    return [np.asarray(image) for image in generate(base, list(requests), replace(SAMPLER, **changes))]


@pytest.mark.parametrize(
    ("scheduler", "guidance", "scale", "end"),
    [
        pytest.param("euler", 5.0, 0.7, 1.0, marks=pytest.mark.slow),
        ("ddim", 1.0, 1.0, 1.0),
        ("dpmpp_2m_karras", 5.0, 1.3, 0.5),
        pytest.param("euler", 3.0, 0.5, 0.1, marks=pytest.mark.slow),
    ],
)
def test_images_of_a_controlnet_are_bit_identical_to_diffusers(tmp_path, scheduler, guidance, scale, end):
    pipe = pipeline(NARROW)
    network = random_controlnet(pipe.unet)
    base = loaded(tmp_path, network)
    edges = photo(2)
    solver = compose(f"sampler={scheduler}").sampler.scheduler
    requests = [
        Request(PROMPT, 4, (1, 1), photo(), 0.7, Control(edges, scale, end)),
        Request(PROMPT, 5, edges.size, control=Control(edges, scale, end)),
    ]
    ours = draw(base, *requests, scheduler=solver, guidance=guidance)
    parts = {**pipe.components, "scheduler": SDXL(pipe).solver(solver), "controlnet": network}
    common = {
        "prompt": PROMPT, "num_inference_steps": 6, "guidance_scale": guidance,
        "controlnet_conditioning_scale": scale, "control_guidance_end": end,
    }  # fmt: skip
    img2img, text_to_image = (
        kind(**parts, add_watermarker=False)
        for kind in (StableDiffusionXLControlNetImg2ImgPipeline, StableDiffusionXLControlNetPipeline)
    )
    for theirs in (img2img, text_to_image):
        theirs.set_progress_bar_config(disable=True)
    first, second = (torch.Generator().manual_seed(seed) for seed in (4, 5))
    expected = [
        img2img(**common, image=photo(), control_image=edges, strength=0.7, generator=first).images[0],
        text_to_image(**common, image=edges, generator=second).images[0],
    ]
    assert all(np.array_equal(one, np.asarray(other)) for one, other in zip(ours, expected, strict=True))
    plain = draw(base, replace(requests[0], control=None), scheduler=solver, guidance=guidance)
    assert np.array_equal(ours[0], plain[0]) is (end == 0.1)  # of four steps none ends before a tenth


@pytest.mark.parametrize(("kind", "number"), [("canny", 3), pytest.param("pose", 0, marks=pytest.mark.slow)])
def test_images_of_a_union_controlnet_are_bit_identical_to_diffusers(tmp_path, kind, number):
    pipe = pipeline(NARROW)
    network = random_controlnet(pipe.unet, union=True)
    base = loaded(tmp_path, network, kind)
    (ours,) = draw(base, Request(PROMPT, 4, (1, 1), photo(), 0.7, Control(photo(2), 0.7, 1.0)))
    parts = {**pipe.components, "scheduler": SDXL(pipe).solver(SAMPLER.scheduler), "controlnet": network}
    theirs = StableDiffusionXLControlNetUnionImg2ImgPipeline(**parts, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPT, image=photo(), control_image=[photo(2)], control_mode=[number], strength=0.7, num_inference_steps=6,
        guidance_scale=5.0, controlnet_conditioning_scale=0.7, generator=torch.Generator().manual_seed(4),
    ).images[0]  # fmt: skip
    assert np.array_equal(ours, np.asarray(expected))


@pytest.mark.parametrize(("scheduler", "apart"), [("euler", 0), ("ddim", 1), ("dpmpp_2m_karras", 0)])  # of 255
def test_a_mask_of_whole_latents_redraws_what_diffusers_inpainting_does(scheduler, apart):
    """Where the mask is hard and of whole latents; elsewhere the pixels are the photo's."""
    pipe, mask = pipeline(NARROW), Image.new("L", (64, 48))
    mask.paste(255, (16, 8, 48, 40))
    solver = compose(f"sampler={scheduler}").sampler.scheduler
    (ours,) = draw(SDXL(pipe), Request(PROMPT, 4, (1, 1), photo(), 0.7, mask=mask), scheduler=solver)
    parts = {**pipe.components, "scheduler": SDXL(pipe).solver(solver)}
    theirs = StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    pipe.vae.register_to_config(force_upcast=False)
    drawn = theirs(
        PROMPT, image=photo(), mask_image=mask, strength=0.7, num_inference_steps=6, guidance_scale=5.0,
        height=48, width=64, generator=torch.Generator().manual_seed(4),
    ).images[0]  # fmt: skip
    expected = np.asarray(Image.composite(drawn, photo(), mask)).astype(int)
    assert np.abs(ours - expected).max() <= apart
    inside = np.asarray(mask) > 0
    assert np.array_equal(ours[~inside], np.asarray(photo())[~inside]) and not np.array_equal(ours, np.asarray(photo()))


@pytest.mark.slow
@pytest.mark.parametrize("union", [False, True])
def test_a_single_file_gives_the_images_of_its_folder(tmp_path, union):
    network = random_controlnet(pipeline(NARROW).unet, union)
    if union:  # its number of heads is no shape of a tensor, so it must be the published one
        network = ControlNetUnionModel.from_config(network.config, num_trans_head=8)
    request = Request(PROMPT, 4, (1, 1), photo(), 0.7, Control(photo(2), 0.7, 1.0))
    base = loaded(tmp_path, network)
    (folder,) = draw(base, request)
    save_file(network.state_dict(), tmp_path / "one.safetensors")
    base.load_control(structure_of(tmp_path / "one.safetensors"), CPU)
    assert np.array_equal(folder, draw(base, request)[0])


@pytest.mark.slow
def test_requests_of_a_batch_have_their_own_control_and_mask(tmp_path):
    """Control images and weights may differ in a batch; another end, or no mask, is another batch."""
    base, mask = loaded(tmp_path, random_controlnet(pipeline(NARROW).unet)), Image.new("L", (64, 48), 255)
    mask.paste(0, (0, 0, 30, 48))
    requests = [
        Request(PROMPT, seed, (1, 1), photo(seed), 0.7, control, mask if seed > 3 else None)
        for seed, control in (
            (1, Control(photo(2), 0.3, 1.0)), (2, Control(photo(3), 1.5, 1.0)), (3, Control(photo(3), 1.5, 0.5)),
            (4, None), (5, None),
        )
    ]  # fmt: skip
    rows = []
    seen = base.network.register_forward_pre_hook(lambda unet, inputs: rows.append(len(inputs[0])))
    together = draw(base, *requests, batch_size=8)
    seen.remove()
    assert rows == [4] * 4 + [2] * 4 + [4] * 4
    for ours, request in zip(together, requests, strict=True):
        (alone,) = draw(base, request)
        assert np.abs(ours.astype(int) - alone).mean() < 0.2
    bare = draw(base, *(replace(request, control=None, mask=None) for request in requests))
    assert all(np.abs(ours.astype(int) - plain).mean() > 1 for ours, plain in zip(together, bare, strict=True))


def test_with_offload_the_controlnet_is_on_the_device_while_the_unet_is(tmp_path, monkeypatch):
    network, moves, device = random_controlnet(pipeline(NARROW).unet), [], torch.device("cpu:0")
    base = loaded(tmp_path, network)
    for name, part in (("unet", base.network), ("controlnet", base.controlnet), ("vae", base.autoencoder)):

        def to(where, name=name, part=part):
            moves.append((name, str(where)))
            return type(part).to(part, where)

        monkeypatch.setattr(part, "to", to)
    request = Request(PROMPT, 4, (1, 1), photo(), 0.7, Control(photo(2), 0.7, 0.5))
    (plain,) = draw(base, request)
    moves.clear()
    (offloaded,) = generate(base, [request], SAMPLER, Encoder(base, device, Cache(None), offload=True))
    assert np.array_equal(plain, np.asarray(offloaded))
    assert [move for move in moves if "vae" not in move] == [
        ("unet", "cpu:0"), ("controlnet", "cpu:0"), ("controlnet", "cpu"), ("unet", "cpu"),
    ]  # fmt: skip


@pytest.mark.slow
def test_half_precision_is_near_the_whole(tmp_path):
    network = random_controlnet(pipeline(NARROW).unet)
    request = Request(PROMPT, 4, (1, 1), photo(), 0.7, Control(photo(2), 0.7, 0.5))
    (exact,) = draw(loaded(tmp_path, network), request)
    base = SDXL(pipeline(NARROW, dtype=torch.bfloat16))
    base.load_control(structure_of(tmp_path / "controlnet"), CPU)
    assert base.controlnet.dtype == torch.bfloat16
    assert np.abs(draw(base, request)[0].astype(int) - exact).mean() < 8


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (lambda unet: random_controlnet(unet, union=True), "tile", "knows 6 kinds of control images and not tile"),
        (lambda unet: random_controlnet(unet_of(replace(NARROW, channels=(8, 16, 16)))), "canny", "for another base"),
        (
            lambda unet: ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8)),
            "canny",
            "another",
        ),
    ],
)
def test_a_controlnet_that_does_not_fit_is_refused(tmp_path, make, kind, sentence):
    with pytest.raises(InputError, match=rf"structure\.controlnet=.*{sentence}"):
        loaded(tmp_path, make(pipeline(NARROW).unet), kind)


def test_what_is_no_controlnet_is_refused_by_name(tmp_path):
    base = SDXL(pipeline(NARROW))
    (tmp_path / "empty").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "code.pt").write_bytes(b"")
    for name, words in (
        ("empty", "cannot be loaded as a ControlNet"), ("other.safetensors", r"no controlnet_mid_block\.weight"),
        ("code.pt", "can hold code"), ("missing/here/x", "no such file or folder"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"structure\.controlnet=.*{words}"):
            base.load_control(structure_of(tmp_path / name), CPU)


def checked(base, *overrides):
    config = compose(*overrides)
    check_conditions(config.structure, config.likeness, config.memory, base, config.model.name)


@pytest.mark.parametrize(
    ("options", "base", "sentence"),
    [
        (["structure=canny"], ToyBase, "structure=canny: model=tiny takes no control images"),
        (["likeness=ip_adapter"], ToyBase, "likeness=ip_adapter: model=tiny takes no control images and no photos"),
        (["likeness=ip_adapter", "memory=low"], SDXL, r"likeness=ip_adapter: .* set memory\.linear_weights=base"),
    ],
)
def test_what_a_base_cannot_do_is_refused(options, base, sentence):
    with pytest.raises(InputError, match=sentence):
        checked(base, *options)
    checked(SDXL, "structure=canny", "likeness=ip_adapter")
    checked(ToyBase)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("structure.scale=0.5",), r"structure\.scale=0\.5: structure is off, set structure=canny or"),
        (("structure=depth",), r"structure=depth: model\.controlnet has none for it, name one with structure"),
        (("structure=depth", "model=sdxl", "structure.detector=null"), r"structure\.detector is missing"),
        (("likeness.scale=0.5",), r"likeness\.scale=0\.5: likeness is off, set likeness=ip_adapter"),
        (("likeness=ip_adapter", "likeness.weights=null"), r"likeness\.weights is missing"),
        (("structure=canny", "structure.low=300"), r"structure\.low=300: low is at most high, which is 200"),
        (("structure=canny", "structure.end=0"), r"structure\.end=0.*above 0 and at most 1"),
    ],
)
def test_wrong_settings_are_refused(overrides, sentence):
    with pytest.raises(InputError, match=sentence):
        compose(*overrides)


def test_control_images_come_from_the_photo_or_from_a_folder_of_its_names(tmp_path):
    paths = [tmp_path / name for name in ("a.jpg", "b.png")]
    photos = [photo(i, (96, 64)) for i in (1, 2)]
    for path, image in zip(paths, photos, strict=True):
        image.save(path)
    (tmp_path / "edges").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (192, 128), "red").save(tmp_path / "edges" / f"{name}.png")
    settings = structure_of("x", scale=0.4, end=0.6)
    edges = controls_of(settings, paths, photos, CPU)
    assert [(c.scale, c.end, c.image.size) for c in edges] == [(0.4, 0.6, (96, 64))] * 2
    assert set(np.unique(np.asarray(edges[0].image))) == {0, 255}
    (tile, _) = controls_of(replace(settings, kind="tile"), paths, photos, CPU)
    assert np.array_equal(np.asarray(tile.image), np.asarray(photos[0]))
    given = controls_of(replace(settings, kind="depth", images=str(tmp_path / "edges")), paths, photos, CPU)
    assert all(c.image.size == (96, 64) and c.image.getpixel((5, 5)) == (255, 0, 0) for c in given)
    assert controls_of(compose().structure, paths, photos, CPU) == [None, None]
    Image.new("RGB", (192, 192)).save(tmp_path / "edges" / "b.png")
    with pytest.raises(InputError, match=r"b\.png is 192x192, but .*b\.png is 96x64: give it the shape of its photo"):
        controls_of(replace(settings, images=str(tmp_path / "edges")), paths, photos, CPU)
    (tmp_path / "edges" / "b.png").unlink()
    with pytest.raises(InputError, match=r"structure\.images=.*no image for b\.png, add b\.png"):
        controls_of(replace(settings, images=str(tmp_path / "edges")), paths, photos, CPU)


def test_masks_of_person_background_and_file(tmp_path):
    place, plain = tmp_path / "photo.png", Image.new("RGB", (64, 64), "skyblue")
    plain.paste("brown", (24, 16, 44, 64))
    plain.save(place)

    def mask_of(name, feather=0.1, image=plain):
        (mask,) = masks_of(name, feather, None, [place], [image], CPU)
        return np.asarray(mask)

    person, background = mask_of("person"), mask_of("background")
    assert (person[16:, 24:44] == 255).all() and person[0, 0] == 0
    assert (person[30, 18:24] == 255).all() and (np.diff(person[30, :24].astype(int)) >= 0).all()
    assert 0 < person[30, 14] < 255 and person[30, 8] == 0, "larger by a tenth, and fading over a tenth"
    assert (background[16:, 24:44] == 0).all() and 0 < background[30, 20] < 255 and (background[30, :17] == 255).all()
    hard = Image.new("L", (128, 128))
    hard.paste(255, (0, 0, 64, 128))
    hard.save(tmp_path / "mask.png")
    assert np.array_equal(
        mask_of(str(tmp_path / "mask.png"), 0.0), np.asarray(hard.resize((64, 64), Image.Resampling.NEAREST))
    )
    assert masks_of(None, 0.1, None, [place], [plain], CPU) == [None]
    noise = Image.effect_noise((64, 64), 100).convert("RGB")
    for name, image, words in (
        ("person", noise, r"has no plain background, name a segmentation model with model\.segmenter="),
        ("person", Image.new("RGB", (64, 64)), "nothing of .* would be drawn"),
        (str(tmp_path / "none.png"), plain, "no such file or folder"),
    ):
        with pytest.raises(InputError, match=rf"stage\.mask={name}.*{words}"):
            mask_of(name, image=image)


@pytest.fixture(scope="module")
def ip_adapters(tmp_path_factory):
    return save_ip_adapters(pipeline(NARROW).unet, tmp_path_factory.mktemp("ip"))


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("plain", 5.0),
        pytest.param("plus", 5.0, marks=pytest.mark.slow),
        pytest.param("plus", 1.0, marks=pytest.mark.slow),
    ],
)
def test_images_of_an_ip_adapter_are_bit_identical_to_diffusers(tmp_path, ip_adapters, name, guidance):
    """With a ControlNet beside it; without the adapter the images are those of before."""
    network, request = random_controlnet(pipeline(NARROW).unet), Request(PROMPT, 4, (1, 1), photo(), 0.7)
    base = loaded(tmp_path, network)
    (plain,) = draw(base, request, guidance=guidance)
    options = ["likeness=ip_adapter", f"likeness.adapter={ip_adapters}", f"likeness.weights={name}.safetensors"]
    base.load_likeness(compose(*options, "likeness.encoder=encoder", "likeness.scale=0.8").likeness, CPU)
    faced = replace(request, likeness=photo(3), control=Control(photo(2), 0.7, 0.5))
    (ours,) = draw(base, faced, guidance=guidance)
    pipe = pipeline(NARROW)
    parts = {**pipe.components, "scheduler": SDXL(pipe).solver(SAMPLER.scheduler), "controlnet": network}
    theirs = StableDiffusionXLControlNetImg2ImgPipeline(**parts, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    weights = f"{name}.safetensors"
    theirs.load_ip_adapter(str(ip_adapters), subfolder="", weight_name=weights, image_encoder_folder="encoder")
    theirs.set_ip_adapter_scale(0.8)
    expected = theirs(
        PROMPT, image=photo(), control_image=photo(2), ip_adapter_image=photo(3), strength=0.7, num_inference_steps=6,
        guidance_scale=guidance, controlnet_conditioning_scale=0.7, control_guidance_end=0.5,
        generator=torch.Generator().manual_seed(4),
    ).images[0]  # fmt: skip
    assert np.array_equal(ours, np.asarray(expected)) and not np.array_equal(ours, plain)
    base.load_likeness(compose().likeness, CPU)
    assert np.array_equal(draw(base, request, guidance=guidance)[0], plain)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_lora_is_attached_to_a_unet_with_an_ip_adapter_and_a_controlnet(tmp_path, ip_adapters, fuse):
    base = loaded(tmp_path, random_controlnet(pipeline(NARROW).unet))
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    base.network.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    save_lora(tmp_path / "made.safetensors", kohya_state({"unet": base.network}, SDXL.lora_key), torch.float32, {})
    base.network.delete_adapters("default")
    options = [f"likeness.adapter={ip_adapters}", "likeness.weights=plain.safetensors", "likeness.encoder=encoder"]
    base.load_likeness(compose("likeness=ip_adapter", *options).likeness, CPU)
    request = Request(PROMPT, 4, (1, 1), photo(), 0.7, Control(photo(2), 0.7, 1.0), likeness=photo(3))
    (plain,) = draw(base, request)
    with lora_attached(base, tmp_path / "made.safetensors", fuse=fuse):
        (attached,) = draw(base, request)
    assert np.abs(attached.astype(int) - plain).mean() > 1 and np.array_equal(draw(base, request)[0], plain)
    assert not any("lora" in name for name, _ in base.controlnet.named_parameters())


def test_what_is_no_ip_adapter_is_refused_by_name(tmp_path, ip_adapters):
    base = SDXL(pipeline(NARROW))
    save_file(
        {"image_proj.proj.weight": torch.zeros(8, 3), "ip_adapter.1.x": torch.zeros(1)}, tmp_path / "x.safetensors"
    )
    shutil.copytree(ip_adapters / "encoder", tmp_path / "encoder")
    for weights, encoder, words in (
        ("missing.safetensors", "encoder", "cannot be loaded with likeness.weights=missing"),
        ("x.safetensors", "missing", r"likeness\.encoder=missing"), ("x.bin", "encoder", "can hold code"),
        ("x.safetensors", "encoder", "is no IP-Adapter of this base"),
    ):  # fmt: skip
        names = f"likeness.adapter={tmp_path}", f"likeness.weights={weights}", f"likeness.encoder={encoder}"
        with pytest.raises(InputError, match=words):
            base.load_likeness(compose("likeness=ip_adapter", *names).likeness, CPU)
