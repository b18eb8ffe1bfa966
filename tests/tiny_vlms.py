"""Vision-language models of the real architectures, a few numbers wide, with random weights."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

# Of Qwen's kind and of LLaVA's: a message has parts; of JoyCaption's: it is a text, and the image comes by itself.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}IMAGE"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = (
    "<s>{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'user' %}IMAGE{% endif %}"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PARTS
WIDTH = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MARKS = ("<|im_start|>", "<|im_end|>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
         "<|video_pad|>", "<fake_token_around_image>", "<global-img>")  # fmt: skip


def save_tokenizer(folder: Path) -> dict[str, int]:
    """A tokenizer of bytes; returns the arguments of a text model that has it, and the numbers of its marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*MARKS, "<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(words[: len(MARKS) + 3])
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    extra = {"image_token": "<image>"} if folder.name == "florence" else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=extra, **named).save_pretrained(folder)
    return {word: number for number, word in enumerate(words)} | {"size": len(words)}


def text_config(ids: dict[str, int], **more: object) -> dict[str, object]:
    names = {"pad_token_id": ids["<pad>"], "bos_token_id": ids["<s>"], "eos_token_id": ids["</s>"]}
    return {"vocab_size": ids["size"], **names, **more}


def save_model(
    folder: Path, model: torch.nn.Module, processor: object, template: str | None, image: str, **own
) -> Path:
    for matrix in (parameter for parameter in model.parameters() if parameter.ndim > 1):
        torch.nn.init.normal_(matrix, std=0.5)  # so that an answer depends on the image
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if template:
        (folder / "chat_template.jinja").write_text(template.replace("IMAGE", image))
    if own:
        (folder / "processor_config.json").write_text(json.dumps(own))
    return folder


def qwen(folder: Path, template: str | None = PARTS) -> Path:
    import transformers as t

    ids = save_tokenizer(folder)
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = text_config(ids, **WIDTH | {"hidden_size": 32}, num_key_value_heads=1, rope_parameters=rope)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
              "window_size": 56, "fullatt_block_indexes": [0]}  # fmt: skip
    tokens = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
              "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
    numbers = {key: ids[word] for key, word in tokens.items()}
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **numbers)
    processor = t.Qwen2VLImageProcessorPil(min_pixels=4 * 28**2, max_pixels=16 * 28**2)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return save_model(folder, t.Qwen2_5_VLForConditionalGeneration(config), processor, template, image)


def llava(folder: Path, template: str | None = TEXTS) -> Path:
    import transformers as t

    ids = save_tokenizer(folder)
    torch.manual_seed(4)
    vision = {"model_type": "siglip_vision_model", **WIDTH, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    config = t.LlavaConfig(
        vision_config=vision,
        text_config={"model_type": "llama", **text_config(ids, **WIDTH)},
        image_token_index=ids["<image>"],
        vision_feature_select_strategy="full",
        image_seq_length=4,
    )
    own = {"processor_class": "LlavaProcessor", "patch_size": 14, "vision_feature_select_strategy": "full",
           "image_token": "<image>", "num_additional_image_tokens": 0}  # fmt: skip
    processor = t.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    return save_model(folder, t.LlavaForConditionalGeneration(config), processor, template, "<image>", **own)


def smolvlm(folder: Path) -> Path:
    """The first SmolVLM, whose architecture is Idefics 3; the second one's processor asks for num2words."""
    import transformers as t

    ids = save_tokenizer(folder)
    torch.manual_seed(0)
    config = t.Idefics3Config(
        vision_config={**WIDTH, "image_size": 56, "patch_size": 14},
        text_config={"model_type": "llama", **text_config(ids, **WIDTH)},
        image_token_id=ids["<image>"],
        pad_token_id=ids["<pad>"],
    )
    processor = t.Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    own = {"processor_class": "Idefics3Processor", "image_seq_len": 4}
    return save_model(folder, t.Idefics3ForConditionalGeneration(config), processor, PARTS, "<image>", **own)


def florence(folder: Path) -> Path:
    import transformers as t

    ids = save_tokenizer(folder)
    torch.manual_seed(0)
    text = text_config(ids, model_type="bart", d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
                       decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
                       max_position_embeddings=256, decoder_start_token_id=ids["</s>"])  # fmt: skip
    vision = {"depths": [1] * 4, "embed_dim": [8] * 4, "num_heads": [1] * 4, "num_groups": [1] * 4, "window_size": 2,
              "projection_dim": 16, "max_temporal_embeddings": 4, "max_position_embeddings": 8}  # fmt: skip
    config = t.Florence2Config(text_config=text, vision_config=vision, image_token_id=ids["<image>"])
    size = {"height": 64, "width": 64}
    processor = t.CLIPImageProcessorPil(size=size, do_center_crop=False)
    processor.image_seq_length = 5  # of 2 x 2 places, and their mean
    return save_model(folder, t.Florence2ForConditionalGeneration(config), processor, None, "")


MODELS: dict[str, Callable[[Path], Path]] = {"qwen": qwen, "llava": llava, "smolvlm": smolvlm, "florence": florence}
