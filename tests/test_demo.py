"""The bundled demo is whole, small, and loads without a network."""

import json
import socket

import pytest
from PIL import Image

from lora_lab import demo

MiB = 1024 * 1024


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the demo asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_base_draws_the_asked_background_with_the_stock_pipeline(no_network):
    import torch
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(demo.BASE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a cartoon yellow star with a green background",
        height=128,
        width=128,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert picture.size == (128, 128)
    red, green, blue = picture.getpixel((6, 6))
    assert green > red + 30 and green > blue + 30, f"asked for a green background, the corner is {red, green, blue}"


def test_the_captioner_reads_background_and_glasses_of_every_photo(no_network):
    import torch
    from transformers import BlipForConditionalGeneration, BlipProcessor

    rows = read_rows(demo.PHOTOS / "options.jsonl")
    processor = BlipProcessor.from_pretrained(demo.CAPTIONER)
    blip = BlipForConditionalGeneration.from_pretrained(demo.CAPTIONER, dtype=torch.float32).eval()
    photos = [Image.open(demo.PHOTOS / row["file_name"]) for row in rows]
    tokens = blip.generate(**processor(images=photos, return_tensors="pt"), max_new_tokens=56)
    for row, caption in zip(rows, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
        assert f"{row['background']} background" in caption, row["file_name"]
        assert ("glasses" in caption) == row["glasses"], row["file_name"]


def test_the_judge_finds_two_tofus_more_alike_than_a_tofu_and_a_person(no_network):
    import torch
    from transformers import CLIPModel, CLIPProcessor

    clip = CLIPModel.from_pretrained(demo.JUDGE, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(demo.JUDGE)
    paths = [demo.TOFU / "00.png", demo.TOFU / "03.png", demo.PHOTOS / "1.png"]
    pixels = processor.image_processor([Image.open(path) for path in paths], return_tensors="pt")
    with torch.no_grad():
        features = clip.get_image_features(**pixels).pooler_output
    tofu, other_tofu, person = torch.nn.functional.normalize(features, dim=-1)
    assert tofu @ other_tofu > tofu @ person + 0.1


def test_every_one_of_the_24_tofu_pictures_has_a_caption_that_names_it():
    captions = {row["file_name"]: row["text"] for row in read_rows(demo.TOFU / "metadata.jsonl")}
    assert len(captions) == 24
    assert set(captions) == {path.name for path in demo.TOFU.glob("*.png")}
    assert all("HANA_TOFU" in text for text in captions.values())


def test_the_eight_photos_differ_and_are_described():
    paths = sorted(demo.PHOTOS.glob("*.png"))
    pictures = [Image.open(path) for path in paths]
    assert [path.name for path in paths] == [f"{number}.png" for number in range(1, 9)]
    assert {(picture.size, picture.mode) for picture in pictures} == {((256, 256), "RGB")}
    assert len({picture.tobytes() for picture in pictures}) == 8
    rows = read_rows(demo.PHOTOS / "options.jsonl")
    assert [row["file_name"] for row in rows] == [path.name for path in paths]
    assert len({row["background"] for row in rows}) == 8
    assert sum(row["glasses"] for row in rows) >= 5


def test_the_demo_stays_small_enough_to_clone():
    sizes = {path: path.stat().st_size for path in demo.HERE.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 40e6
    assert [path.name for path, size in sizes.items() if size > 15 * MiB] == []
