"""Latents and embeddings are those of diffusers' own pipeline."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from sdxl_structure import NARROW, pipeline

from lora_lab.base.sdxl import SDXL
from lora_lab.errors import RunError


@pytest.fixture(scope="module")
def pipe():
    return pipeline(NARROW)


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_latents_have_an_eighth_of_the_side_and_are_scaled(pipe):
    latents = SDXL(pipe).encode_image(picture(64, 32), "a.png")
    assert latents.shape == (4, 4, 8) and latents.dtype == torch.float32
    pixels = torch.from_numpy(np.asarray(picture(64, 32))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean = pipe.vae.encode(pixels).latent_dist.mean
    assert torch.allclose(latents, mean[0] * 0.13025, atol=1e-6)
    assert not torch.equal(latents, SDXL(pipe).encode_image(picture(64, 32, seed=1), "b.png"))


def test_a_float16_vae_that_overflows_is_upcast_temporarily(pipe):
    half = copy.deepcopy(pipe)
    half.vae.half()
    latents = SDXL(half).encode_image(picture(64, 64), "a.png")
    assert half.vae.dtype == torch.float16
    assert torch.allclose(latents, SDXL(pipe).encode_image(picture(64, 64), "a.png"), atol=2e-3)


def test_non_finite_latents_are_reported_with_the_image_s_name(pipe):
    broken = copy.deepcopy(pipe)
    with torch.no_grad():
        broken.vae.encoder.conv_in.bias.fill_(float("nan"))
    with pytest.raises(RunError, match=r"sub/두부\.png: .*model\.vae"):
        SDXL(broken).encode_image(picture(64, 64), "sub/두부.png")


def test_caption_embeddings_equal_the_pipeline_s_prompt_embeddings(pipe):
    for caption in ("A HANA_TOFU, smiling", "", "한국어 두부", "many words " * 99):
        (ours,) = SDXL(pipe).encode_texts([caption], torch.device("cpu"), offload=False)
        tokens, _, pooled, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False)
        embeds = ours["prompt_embeds"]
        assert embeds.shape == (77, 16 + 24) and ours["pooled_prompt_embeds"].shape == (24,)
        assert torch.equal(embeds, tokens[0]) and torch.equal(ours["pooled_prompt_embeds"], pooled[0])
        assert not embeds.requires_grad


def kohya_chunks(tokenizer, text, limit):
    """Ids (N, 77) as sd-scripts splits the ids of a text that is padded to `limit` + 2: strategy_base.py."""
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=limit + 2).input_ids
    end, pad, chunks = tokenizer.eos_token_id, tokenizer.pad_token_id, []
    for start in range(1, limit + 1, 75):
        chunk = [ids[0], *ids[start : start + 75], ids[-1]]
        if chunk[-2] not in (end, pad):
            chunk[-1] = end
        if chunk[1] == pad:
            chunk[1] = end
        chunks.append(chunk)
    return torch.tensor(chunks)


@torch.no_grad()
def kohya_embeddings(pipe, text, limit):
    """(limit + 2, 40) and (24,) as sd-scripts joins the hidden states of the chunks: strategy_sdxl.py."""
    joined = []
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = kohya_chunks(tokenizer, text, limit)
        states = [encoder(chunk[None], output_hidden_states=True) for chunk in ids]
        hidden = [state.hidden_states[-2][0] for state in states]
        joined.append(torch.cat([hidden[0][:1], *(chunk[1:76] for chunk in hidden), hidden[-1][-1:]]))
    return torch.cat(joined, dim=-1), states[0].text_embeds[0]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])  # of SDXL's second tokenizer it is "!"
@pytest.mark.parametrize("limit", [150, 225])
def test_long_captions_are_read_in_chunks_as_by_sd_scripts(pipe, limit, pad):
    other = copy.copy(pipe)
    other.tokenizer_2 = copy.deepcopy(pipe.tokenizer_2)
    other.tokenizer_2.pad_token = pad
    base = SDXL(other)
    base.text_window = limit + 2
    texts = ["A HANA_TOFU, smiling", "", *("x " * count for count in (74, 75, 76, 149, 150, 151, 224, 225, 400))]
    for text, ours in zip(texts, base.encode_texts(texts, torch.device("cpu"), offload=False), strict=True):
        embeds, pooled = kohya_embeddings(other, text, limit)
        assert ours["prompt_embeds"].shape == embeds.shape == base.text_forms()["prompt_embeds"][0]
        assert torch.allclose(ours["prompt_embeds"], embeds, atol=1e-6)
        assert torch.allclose(ours["pooled_prompt_embeds"], pooled, atol=1e-6)
        read = base.tokenize(text, base.tokenizers)
        assert torch.equal(read["input_ids"][1], kohya_chunks(other.tokenizer_2, text, limit))
        step = base.encode_tokens({name: value[None] for name, value in read.items()})  # inside of a training step
        assert all(torch.allclose(step[name][0], value, atol=1e-6) for name, value in ours.items())


def test_a_short_text_begins_alike_whatever_the_limit(pipe):
    base = SDXL(pipe)
    (short,) = base.encode_texts(["a tofu"], torch.device("cpu"), False)
    key = base.text_identity()
    base.text_window = 227
    (long,) = base.encode_texts(["a tofu"], torch.device("cpu"), False)
    assert torch.allclose(long["prompt_embeds"][:76], short["prompt_embeds"][:76], atol=1e-6)
    assert torch.allclose(long["pooled_prompt_embeds"], short["pooled_prompt_embeds"], atol=1e-6)
    assert base.text_identity()[:-1] == key  # short windows keep the names of what is cached


def test_micro_conditioning_has_sdxl_s_order(pipe):
    sizes = (1000, 700), (10, 20), (1152, 896)  # height before width, top before left
    theirs = pipe._get_add_time_ids(*sizes, dtype=torch.float32, text_encoder_projection_dim=24)
    ours = SDXL(pipe).size_conditioning(*sizes)["time_ids"]
    assert torch.equal(ours, theirs[0]) and ours.tolist() == [1000, 700, 10, 20, 1152, 896]
