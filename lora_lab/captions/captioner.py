"""BLIP looks at pictures and says what is there."""

import re
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lora_lab.console import quiet_loading
from lora_lab.errors import InputError


@dataclass(frozen=True)
class Captioner:
    """A loaded BLIP. `prompt` is how each caption begins, or None; `max_tokens` is a caption's longest length.

    Of `beams` captions grown side by side the likeliest is taken: a picture unlike all that the model knows makes it
    stumble at one word, and greedily (1) it would not recover."""

    processor: Any
    model: Any
    prompt: str | None
    max_tokens: int
    beams: int
    batch_size: int

    def caption(self, images: list[Image.Image]) -> list[str]:
        """One caption for each RGB picture, which must be as training sees it: turned, opaque, whole."""
        import torch

        captions: list[str] = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            text = [self.prompt] * len(batch) if self.prompt else None
            inputs = self.processor(images=batch, text=text, return_tensors="pt")
            inputs = inputs.to(self.model.device, self.model.dtype)  # only the pixels are cast
            with torch.inference_mode():
                tokens = self.model.generate(
                    **inputs, max_new_tokens=self.max_tokens, min_length=1, do_sample=False, num_beams=self.beams
                )
            captions += map(clean_decoding, self.processor.batch_decode(tokens, skip_special_tokens=True))
        return captions


def load_captioner(
    base: str, device: str, *, prompt: str | None, max_tokens: int, beams: int, batch_size: int
) -> Captioner:
    """Load BLIP from a folder or a Hugging Face id: float16 on a GPU, float32 on a CPU.

    Raises InputError if it is not there, can't be reached, or is another kind of model."""
    import torch
    from transformers import AutoConfig, BlipForConditionalGeneration, BlipProcessor

    quiet_loading()
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    try:
        kind = AutoConfig.from_pretrained(base).model_type
        if kind != "blip":  # it would load, with random weights
            raise InputError(f"captioner.base={base} is a {kind} model, not BLIP: give a BLIP captioning model")
        processor = BlipProcessor.from_pretrained(base, backend="pil")  # no torchvision needed
        model = BlipForConditionalGeneration.from_pretrained(base, dtype=dtype).to(device).eval()
    except (OSError, ValueError) as error:  # not found, offline, damaged
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"can't load the captioner {base} ({reason}): check the name, or without a network give "
            f"a local folder with captioner.base="
        ) from error
    return Captioner(processor, model, prompt, max_tokens, beams, batch_size)


def clean_decoding(text: str) -> str:
    """Join what BLIP's tokenizer took apart.

    >>> clean_decoding("a big - head hana _ tofu 's hat , smiling")
    "a big-head hana_tofu's hat, smiling"
    """
    text = re.sub(r"(?<=\w)\s*([-_])\s*(?=[^\W_])", r"\1", text)
    text = re.sub(r"\s*'\s*(s|t|re|ve|ll|d|m)\b", r"'\1", text)
    return " ".join(re.sub(r"\s+([,.;:!?])", r"\1", text).split())
