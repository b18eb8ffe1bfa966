"""The embedders, on CLIP and DINOv2 with the real architectures and random weights."""

import gc
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

from lora_lab.base.encode import Cache, Encoder
from lora_lab.base.load import load_base
from lora_lab.demo import HERE, TOFU
from lora_lab.errors import InputError
from lora_lab.evaluation import metrics
from lora_lab.evaluation.embedders import base_parts, caption_images, embed
from lora_lab.launch.config import compose

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A CLIP of clip-vit-large-patch14's settings and a DINOv2 of dinov2-base's, but for width and depth."""
    torch.manual_seed(0)
    clip, dino = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("dino")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=size | {"vocab_size": 1143, "projection_dim": 24},
        vision_config=size | {"patch_size": 14, "image_size": 224, "projection_dim": 24},
        projection_dim=24,
    )
    CLIPModel(config).half().save_pretrained(clip)
    CLIPImageProcessor().save_pretrained(clip)  # 224 px, cut at the centre
    for file in (HERE / "tiny-clip").iterdir():
        if "token" in file.name or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, clip)
    size = {key: value for key, value in size.items() if key != "intermediate_size"}
    Dinov2Model(Dinov2Config(**size, patch_size=14, image_size=518)).save_pretrained(dino)
    (dino / "preprocessor_config.json").write_text(
        '{"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "crop_size": {"height": 224, '
        '"width": 224}, "do_center_crop": true, "do_convert_rgb": true, "do_normalize": true, "do_rescale": true, '
        '"do_resize": true, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3, '
        '"rescale_factor": 0.00392156862745098}'
    )
    return replace(compose().model, judge=str(clip), dino=str(dino))


@pytest.fixture(scope="module")
def pictures():
    return [Image.open(TOFU / f"{i:02d}.png").convert("RGB").resize((128 + 32 * (i % 2), 128)) for i in range(18)]


def test_embeddings_are_unit_vectors_of_every_image_and_text(large, pictures):
    seen = embed(large, pictures, ["a tofu", "a tofu with a hat " * 40], CPU)
    assert seen.clip.shape == (18, 24) and seen.dino.whole.shape == (18, 32) and seen.texts.shape == (2, 24)
    assert seen.dino.parts.shape == (18, 16 * 16, 32)
    for vectors in (seen.clip, seen.dino.whole, seen.texts):
        assert vectors.dtype == torch.float32 and torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)))
    alone = embed(large, pictures[17:], [], CPU)
    for view, among in ((alone.clip, seen.clip), (alone.dino.whole, seen.dino.whole)):
        assert torch.allclose(view[0], among[17], atol=1e-5), "a picture does not depend on its company"
    assert torch.allclose(alone.dino.parts[0], seen.dino.parts[17], atol=1e-4)


def test_embeddings_of_clip_are_those_of_its_forward_pass(pictures):
    """The bundled CLIP finds the caption of a picture, and two tofus more alike than a tofu and a face."""
    texts = ["A character with a purple background, wearing round glasses", "A cartoon person with a red background"]
    photo = Image.open(HERE / "photos" / "1.png").convert("RGB")
    seen = embed(compose().model, [pictures[3], pictures[4], photo], texts, CPU)
    assert seen.dino is None
    tofu, another, face = seen.clip
    own, other = seen.texts @ tofu
    assert own > other + 0.2 and tofu @ another > tofu @ face


@pytest.fixture(scope="module")
def encoder():
    return Encoder(load_base(compose().model, CPU), CPU, Cache(None), offload=False)


@pytest.mark.slow
def test_parts_of_the_base_are_in_the_order_of_the_image_and_do_not_depend_on_the_others(pictures, encoder):
    """Painted over at the upper left, the parts there change most."""
    over = pictures[4].copy()
    over.paste("black", (0, 0, 48, 48))
    seen = base_parts([pictures[4], over], 128, encoder)
    assert seen.shape == (2, 8 * 8, 128) and seen.dtype == torch.float32
    changed = (seen[0] - seen[1]).norm(dim=1).view(8, 8)
    assert changed[:3, :3].mean() > 2 * changed[4:, 4:].mean()
    assert torch.allclose(base_parts([over], 128, encoder)[0], seen[1], atol=1e-4)
    assert base_parts([over], 512, encoder).shape == (1, 16 * 16, 128), "neighbours are averaged"


def test_parts_of_the_character_are_found_in_its_images_and_not_in_photos_or_noise(pictures, encoder):
    photos = [Image.open(file).convert("RGB") for file in sorted((HERE / "photos").glob("*.png"))]
    noise = Image.effect_noise((128, 128), 120).convert("RGB")
    parts = base_parts([*pictures[:10], *photos, noise], 128, encoder)
    character = metrics.DistinctiveParts.of(parts[:8], parts[10:14])
    tofus, others, scribble = character.found(parts[8:]).split([2, 8, 1])
    assert tofus.min() > 0.7 and others.abs().max() < 0.3 and scribble < 0.1


def test_the_captioner_captions_a_generated_image(pictures):
    (caption,) = caption_images(compose().captioner, pictures[4:5], CPU)
    assert "purple background" in caption and "glasses" in caption


def test_an_embedder_is_freed_after_its_call(large, pictures):
    embed(large, pictures[:1], ["a tofu"], CPU)
    gc.collect()
    assert not [True for held in gc.get_objects() if isinstance(held, (CLIPModel, Dinov2Model))]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"judge": "demo:tiny-blip"}, r"model\.judge=.*tiny-blip is a blip model, not one of clip"),
        ({"dino": "demo:tiny-clip"}, r"model\.dino=.*tiny-clip is a clip model, not one of dino: .*model\.dino=null"),
        ({"judge": "demo:tofu"}, r"model\.judge=.*tofu: cannot be loaded \("),
        ({"judge": "demo:tiny-clop"}, r"model\.judge=demo:tiny-clop: there is no such .* did you mean .*tiny-clip\?"),
    ],
)  # fmt: skip
def test_a_model_of_another_kind_is_refused(pictures, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        embed(replace(compose().model, **changes), pictures[:1], ["a tofu"], CPU)
