"""BLIP (Li et al. 2022, arXiv 2201.12086) as a captioner."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from lora_lab.base.locate import loading
from lora_lab.captions.captioner import CaptionModel
from lora_lab.console import quiet_loading
from lora_lab.errors import InputError

if TYPE_CHECKING:
    import torch
    from PIL import Image

VIEWS = 6  # of an image, from which `phrases` writes one caption


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
        captions: list[str] = []
        for start in range(0, len(images), self.batch_size):
            tokens = self._generate(images[start : start + self.batch_size], num_beams=self.beams)
            captions += map(clean_decoding, self.processor.batch_decode(tokens, skip_special_tokens=True))
        return captions

    def phrases(self, images: "list[Image.Image]") -> list[list[tuple[str, float]]]:
        """The phrases between the commas of each image's caption, each with the captioner's confidence, in [0, 1].

        The caption is what BLIP writes of VIEWS slightly changed views of the image together; a phrase's confidence is
        the probability of its words, the mean over the views. What it only imagines changes from view to view. The
        search is greedy. Images are RGB, upright and opaque, of any size."""
        import torch

        captions: list[list[tuple[str, float]]] = []
        size = max(1, self.batch_size * self.beams // VIEWS)  # as many rows at once as in the beam search
        for start in range(0, len(images), size):
            agreement = Agreement(VIEWS)
            tokens = self._generate(images[start : start + size], VIEWS, num_beams=1, logits_processor=[agreement])
            given = tokens.shape[1] - len(agreement.log_probabilities)  # words of the prompt
            logs = torch.stack(agreement.log_probabilities, -1)  # (images, views, tokens)
            logs = torch.cat([logs.new_zeros(*logs.shape[:2], given), logs], -1)
            captions += map(self._phrases, tokens[::VIEWS].tolist(), logs)
        return captions

    def _generate(self, images: "list[Image.Image]", count: int = 1, **options: Any) -> "torch.Tensor":
        """Token ids, (len(images) * count, L), of the captions of `count` views of each image."""
        import torch

        text = [self.prompt] * len(images) * count if self.prompt else None
        inputs = self.processor(images=images, text=text, return_tensors="pt")
        if count > 1:
            inputs["pixel_values"] = views(inputs["pixel_values"], count)
        inputs = inputs.to(self.model.device, self.model.dtype)  # casts only the pixels
        with torch.inference_mode():
            return self.model.generate(
                **inputs, max_new_tokens=self.max_tokens, min_length=1, do_sample=False, **options
            )

    def _phrases(self, tokens: list[int], logs: "torch.Tensor") -> list[tuple[str, float]]:
        """The phrases of one caption with their confidence; `logs` are log-probabilities, (views, L)."""
        tokenizer, found, start = self.processor.tokenizer, [], 0
        comma, stop = tokenizer.convert_tokens_to_ids(","), tokenizer.sep_token_id
        length = tokens.index(stop) if stop in tokens else len(tokens)
        for end in [i for i, token in enumerate(tokens[:length]) if token == comma] + [length]:
            words = clean_decoding(tokenizer.decode(tokens[start:end], skip_special_tokens=True)).removeprefix(",")
            if words.strip():
                found.append((words.strip(), logs[:, start:end].sum(-1).exp().mean().item()))
            start = end
        return found


@dataclass
class Agreement:
    """A logits processor that gives all views of an image the mean of their probabilities, so that they write one
    caption, and keeps the log-probability of each word in each view."""

    views: int
    log_probabilities: "list[torch.Tensor]" = field(default_factory=list)  # of each step's word, (images, views)

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """Scores of the next token, (images * views, vocabulary)."""
        logs = scores.float().log_softmax(-1).unflatten(0, (-1, self.views))
        means = logs.exp().mean(1)
        words = means.argmax(-1)[:, None, None].expand(-1, self.views, 1)
        self.log_probabilities.append(logs.gather(-1, words)[..., 0])
        return means.log().repeat_interleave(self.views, 0)


def load_blip(
    base: CaptionModel,
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
        options = {"use_safetensors": True, "trust_remote_code": False}
        model = BlipForConditionalGeneration.from_pretrained(base, dtype=dtype, **options)
    return Blip(processor, model.to(device).eval(), prompt, max_tokens, beams, batch_size)


def views(pixels: "torch.Tensor", count: int) -> "torch.Tensor":
    """Each image of `pixels`, (B, 3, H, W), `count` times: a little moved, turned, zoomed, lit and coloured otherwise,
    always in the same ways; (B * count, 3, H, W). Borders are continued."""
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    changes = 2 * torch.quasirandom.SobolEngine(6).draw(count + 1)[1:] - 1  # evenly spread in [-1, 1]
    zoom, x, y, turn, light, colour = changes.repeat(len(pixels), 1).T  # image by image
    size, angle = 1.08 + 0.2 * zoom, 0.21 * turn  # of what is seen, and in radians
    rows = torch.stack([size * angle.cos(), -size * angle.sin(), 0.18 * x], -1)
    columns = torch.stack([size * angle.sin(), size * angle.cos(), 0.18 * y], -1)
    pixels = pixels.repeat_interleave(count, 0)
    grid = affine_grid(torch.stack([rows, columns], 1), list(pixels.shape), align_corners=False)
    moved = grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    lit = moved * (1 + 0.15 * light[:, None, None, None])
    gray = lit.mean(1, keepdim=True)
    return gray + (lit - gray) * (0.9 + 0.3 * colour[:, None, None, None])


def clean_decoding(text: str) -> str:
    """Remove the spaces that BLIP's tokenizer puts around hyphens, apostrophes and punctuation.

    >>> clean_decoding("a big - head hana _ tofu 's hat , smiling")
    "a big-head hana_tofu's hat, smiling"
    """
    text = re.sub(r"(?<=\w)\s*([-_])\s*(?=[^\W_])", r"\1", text)
    text = re.sub(r"\s*'\s*(s|t|re|ve|ll|d|m)\b", r"'\1", text)
    return " ".join(re.sub(r"\s+([,.;:!?])", r"\1", text).split())
