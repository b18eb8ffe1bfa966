"""BLIP (Li et al. 2022, arXiv 2201.12086) as a captioner."""

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, PositiveInt

from lora_lab.base.locate import loading, locate_model
from lora_lab.console import quiet_loading
from lora_lab.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL import Image

BlipModel = Annotated[str, AfterValidator(partial(locate_model, "captioner.base"))]


@dataclass(frozen=True)
class Blip:
    """A loaded BLIP with the settings of its captions."""

    processor: Any
    model: Any
    prompt: str | None  # the first words of each caption
    max_tokens: int  # maximum length of a caption, without the prompt
    beams: int  # width of the beam search; 1 is greedy, which does not recover from one wrong word
    batch_size: int

    def caption(self, images: "list[Image.Image]") -> list[str]:
        """One caption for each image. Images are RGB, upright and opaque, of any size."""
        import torch

        captions: list[str] = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            text = [self.prompt] * len(batch) if self.prompt else None
            inputs = self.processor(images=batch, text=text, return_tensors="pt")
            inputs = inputs.to(self.model.device, self.model.dtype)  # casts only the pixels
            with torch.inference_mode():
                tokens = self.model.generate(
                    **inputs, max_new_tokens=self.max_tokens, min_length=1, do_sample=False, num_beams=self.beams
                )
            captions += map(clean_decoding, self.processor.batch_decode(tokens, skip_special_tokens=True))
        return captions


def load_blip(
    base: BlipModel,
    device: "torch.device",
    prompt: str | None = None,
    max_tokens: PositiveInt = 50,
    beams: PositiveInt = 3,
    batch_size: PositiveInt = 4,
) -> Blip:
    """Load BLIP from a folder or a Hugging Face id: float16 on a CUDA device, float32 elsewhere.

    Raises InputError if the model does not exist, cannot be reached, or is not BLIP."""
    import torch
    from transformers import AutoConfig, BlipForConditionalGeneration, BlipProcessor

    quiet_loading()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    hint = ": check the name, or without a network name a local folder with captioner.base="
    with loading(base, f"the captioner {base} cannot be loaded", hint):
        model_type = AutoConfig.from_pretrained(base, trust_remote_code=False).model_type
        if model_type != "blip":  # it would load, with random weights
            raise InputError(f"captioner.base={base} is a {model_type} model, not BLIP: name a BLIP captioning model")
        processor = BlipProcessor.from_pretrained(base, backend="pil", trust_remote_code=False)  # no torchvision needed
        model = BlipForConditionalGeneration.from_pretrained(base, dtype=dtype, trust_remote_code=False)
    return Blip(processor, model.to(device).eval(), prompt, max_tokens, beams, batch_size)


def clean_decoding(text: str) -> str:
    """Remove the spaces that BLIP's tokenizer puts around hyphens, apostrophes and punctuation.

    >>> clean_decoding("a big - head hana _ tofu 's hat , smiling")
    "a big-head hana_tofu's hat, smiling"
    """
    text = re.sub(r"(?<=\w)\s*([-_])\s*(?=[^\W_])", r"\1", text)
    text = re.sub(r"\s*'\s*(s|t|re|ve|ll|d|m)\b", r"'\1", text)
    return " ".join(re.sub(r"\s+([,.;:!?])", r"\1", text).split())
