"""Vision-language models of transformers as captioners: chat models (Qwen-VL, SmolVLM, LLaVA, ...) and Florence-2."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from lora_lab.base.locate import loading
from lora_lab.captions.captioner import CaptionModel
from lora_lab.console import quiet_loading, say_once
from lora_lab.errors import InputError, RunError
from lora_lab.runs import signals_deferred

if TYPE_CHECKING:
    import torch
    from PIL import Image

Precision = Literal["auto", "bf16", "fp16", "fp32", "nf4"]
# The parts that see, by their names in different models: small, and their attention may not run in 4 bits.
VISION = r"(?:.*\.)?(?:visual|vision_tower|vision_model|multi_modal_projector|connector)"
HINT = ": check the name, or without a network name a local folder with captioner.base="


@dataclass(frozen=True)
class VisionLanguageModel:
    """A loaded model, and the prompt that it answers for every image.

    Prompts are as the processor takes them: with the place of the image, and the marks of a chat."""

    processor: Any
    model: Any
    prompt: str
    hint_prompt: str  # for an image with a hint, which replaces {hint} in it
    max_tokens: int  # maximum length of a caption
    beams: int  # width of the beam search; 1 is greedy
    image_size: int  # pixels; larger images are reduced
    batch_size: int

    def caption(self, images: "list[Image.Image]") -> list[str]:
        """One caption for each image, on one line. Images are RGB, upright and opaque, of any size.

        A caption that `max_tokens` cuts off ends with its last whole sentence; that is told once."""
        return self.caption_with_hints(images, [""] * len(images))

    def caption_with_hints(self, images: "list[Image.Image]", hints: Sequence[str]) -> list[str]:
        """As `caption`, with what the user wrote of each image, or "".

        Raises RunError where the GPU's memory is too small."""
        captions: list[str] = []
        prompts = [self._prompt(hint) for hint in hints]
        for start in range(0, len(images), self.batch_size):
            batch = [self._reduced(image) for image in images[start : start + self.batch_size]]
            captions += map(self._caption, self._answers(batch, prompts[start : start + self.batch_size]))
        return captions

    def _prompt(self, hint: str) -> str:
        for mark in image_marks(self.processor):  # of which a prompt has one
            hint = hint.replace(mark, "")
        return self.hint_prompt.replace("{hint}", hint) if hint else self.prompt

    def _reduced(self, image: "Image.Image") -> "Image.Image":
        scale = min(1, self.image_size / max(image.size))
        return image.resize([max(1, round(side * scale)) for side in image.size]) if scale < 1 else image

    def _answers(self, images: "list[Image.Image]", prompts: list[str]) -> list[list[int]]:
        """The tokens of the answer to each prompt with its image."""
        import torch

        # A template has written the first token already, which the tokenizer would add.
        begun = self.prompt.startswith(self.processor.tokenizer.bos_token or "\0")
        inputs = self.processor(
            images=[[image] for image in images],
            text=prompts,
            padding=True,
            return_tensors="pt",
            **({"add_special_tokens": False} if begun else {}),
        ).to(self.model.device, self.model.dtype)  # casts only the pixels
        options = {"max_new_tokens": self.max_tokens, "do_sample": False, "num_beams": self.beams}
        try:
            with torch.inference_mode():
                tokens = self.model.generate(**inputs, **options)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"CUDA out of memory for {len(prompts)} images: lower captioner.batch_size or captioner.image_size, or "
                "set captioner.precision=nf4"
            ) from error
        start = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return tokens[:, start:].tolist()

    def _caption(self, answer: list[int]) -> str:
        tokenizer = self.processor.tokenizer
        text = " ".join(tokenizer.decode(answer, skip_special_tokens=True).split())
        ends = self.model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, tokenizer.pad_token_id, *(ends if isinstance(ends, list) else [ends])}
        if ends & {*answer}:
            return text
        say_once(f"captions over captioner.max_tokens={self.max_tokens} tokens are cut after their last whole sentence")
        return whole_sentences(text)


def whole_sentences(text: str) -> str:
    """`text` up to the end of its last whole sentence; all of it if it has none.

    >>> whole_sentences("A cat. It sits on a")
    'A cat.'
    """
    ends = [match.end() for match in re.finditer(r"[.!?。！？](?=\s|$)", text)]
    return text[: ends[-1]] if ends else text


def load_vlm(
    base: CaptionModel,
    device: "torch.device",
    prompt: str,
    hint_prompt: str = "{hint}",
    class_noun: str = "character",
    system: str | None = None,
    precision: Precision = "auto",
    max_tokens: PositiveInt = 100,
    image_size: PositiveInt = 1024,
    batch_size: PositiveInt = 1,
) -> VisionLanguageModel:
    """Load a chat model that sees images (transformers' image-text-to-text) from a folder or a Hugging Face id.

    `class_noun` replaces {class_noun} in the texts, and the hint of an image {hint} in `hint_prompt`.
    Raises InputError if it does not exist, cannot be reached, needs torchvision or code of its own, or has no chat
    template with a place for an image; and for a `precision` that the device does not have."""
    options = weight_options(precision, device)
    with _loading(base):
        processor = load_processor(base)
    texts = (text.replace("{class_noun}", class_noun).strip() for text in (system or "", prompt, hint_prompt))
    system, prompt, hint_prompt = texts
    prompts = [chat_prompt(base, processor, text, system) for text in (prompt, f"{prompt}\n{hint_prompt}")]
    processor.tokenizer.padding_side = "left"  # what is generated follows the last token
    processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
    model = _load_model(base, options)
    return VisionLanguageModel(processor, model, *prompts, max_tokens, 1, image_size, batch_size)


def load_florence(
    base: CaptionModel,
    device: "torch.device",
    task: str = "DETAILED_CAPTION",
    precision: Precision = "auto",
    max_tokens: PositiveInt = 100,
    beams: PositiveInt = 3,
    batch_size: PositiveInt = 4,
) -> VisionLanguageModel:
    """Load Florence-2 (Xiao et al. 2023, arXiv 2311.06242) from a folder or a Hugging Face id.

    Raises InputError if it does not exist, cannot be reached or is another model, for a task whose answers are places,
    and for a `precision` that the device does not have."""
    from transformers import AutoConfig

    options = weight_options(precision, device)
    with _loading(base):
        model_type = AutoConfig.from_pretrained(base, trust_remote_code=False).model_type
        if model_type != "florence2":
            raise InputError(
                f"captioner.base={base} is a {model_type} model, not Florence-2 in the form of transformers: name one "
                "such as florence-community/Florence-2-large"
            )
        processor = load_processor(base)
    prompt = f"<{task.strip('<>').upper()}>"
    if processor.tasks_answer_post_processing_type.get(prompt, "pure_text") != "pure_text":
        raise InputError(f"captioner.task={task}: its answers are places, use MORE_DETAILED_CAPTION or CAPTION")
    model = _load_model(base, options)
    return VisionLanguageModel(processor, model, prompt, prompt, max_tokens, beams, 2**16, batch_size)


def weight_options(precision: Precision, device: "torch.device") -> dict[str, Any]:
    """The options of transformers' from_pretrained() for the weights; nf4 is 4 bits (bitsandbytes), computed in `auto`.

    Raises InputError, before anything is loaded, for nf4 without a CUDA device and for fp16 on a CPU."""
    from lora_lab.base.load import pick_dtype

    if precision == "nf4" and device.type != "cuda":
        raise InputError(f"captioner.precision=nf4: needs a CUDA device, on {device.type} use captioner.precision=auto")
    if precision == "fp16" and device.type == "cpu":
        raise InputError("captioner.precision=fp16: needs a GPU, on a CPU use captioner.precision=auto")
    dtype = pick_dtype("auto" if precision == "nf4" else precision, device)
    options = {"dtype": dtype, "device_map": {"": device}}
    if precision == "nf4":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[VISION, "lm_head"],
        )
    return options


@contextmanager
def _loading(base: str) -> Iterator[None]:
    quiet_loading()
    with loading(base, f"the captioner {base} cannot be loaded", HINT):
        yield


def _load_model(base: str, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForImageTextToText

    with _loading(base):
        load = AutoModelForImageTextToText.from_pretrained
        return load(base, use_safetensors=True, trust_remote_code=False, **options).eval()


def load_processor(base: str) -> Any:
    """The processor of images and texts at `base`, without torchvision.

    Raises InputError for a model whose processor needs torchvision, and what transformers raises."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    try:
        with signals_deferred():
            return _image_processor(base, config)
    except Exception as error:
        if not re.search("torchvision|pil backend", str(error), re.IGNORECASE):
            raise
        raise InputError(
            f"captioner.base={base}: transformers reads images for {config.model_type} models with torchvision only, "
            "which this program does without: name another model, such as Qwen/Qwen3-VL-4B-Instruct"
        ) from error


def _image_processor(base: str, config: Any) -> Any:
    from transformers import AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    known = PROCESSOR_MAPPING.get(type(config), None)
    if known is None or known.get_attributes()[-1] != "video_processor":
        return AutoProcessor.from_pretrained(base, backend="pil", trust_remote_code=False)

    class ImageProcessor(known):
        """The processor without its last part, the one for videos, which needs torchvision."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return super().get_attributes()[:-1]

    return ImageProcessor.from_pretrained(base, backend="pil", trust_remote_code=False, video_processor=None)


def chat_prompt(base: str, processor: Any, prompt: str, system: str) -> str:
    """The text of a chat with one image, up to where the answer begins; "" is no system prompt.

    Raises InputError for a model without a chat template, and for a template that leaves out the image or a text."""
    template, reason = processor.chat_template or processor.tokenizer.chat_template, ""
    if not template:
        raise InputError(
            f"captioner.base={base} has no chat template: name a model that was trained to follow instructions"
        )
    for chat in _chats(prompt, system):
        try:
            render = processor.tokenizer.apply_chat_template
            with signals_deferred():
                text = render(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program that may raise anything
            reason = f" ({' '.join(str(error).split())[:200]})"
            continue
        has_image = any(mark in text for mark in image_marks(processor))
        if has_image and prompt in text and system in text and "'type'" not in text:
            return text
    hint = ": set captioner.system=null" if system else ""
    raise InputError(f"captioner.base={base}: its chat template does not take an image and a prompt{reason}{hint}")


def image_marks(processor: Any) -> list[str]:
    """What stands for an image in a prompt, or for its beginning."""
    marks = [getattr(processor, name, None) for name in ("image_token", "boi_token")]
    return [str(mark) for mark in marks if mark]


def _chats(prompt: str, system: str) -> Iterator[list[dict[str, Any]]]:
    """The chat as the templates of most models take it, whose messages have parts; and with messages that are texts,
    into which a template puts the image by itself."""
    parts = [{"type": "image"}, {"type": "text", "text": prompt}]
    of_system = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    yield [*of_system, {"role": "user", "content": parts}]
    of_system = [{"role": "system", "content": system}] if system else []
    yield [*of_system, {"role": "user", "content": prompt}]
