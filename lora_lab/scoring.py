"""How good a LoRA is, read from its pictures."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

# Identity is measured on these prompts: no background is one that the bundled character was seen with, and most
# accessories are new to it. A set of other prompts gives other figures, so it is part of the measure.
IDENTITY_PROMPTS = (
    "A {trigger} with a green background, wearing sunglasses, smiling",
    "A {trigger} with an orange background, wearing a yellow crown, winking with its left eye",
    "A {trigger} with a pink background, wearing a blue shirt, with long black hair, smiling",
    "A {trigger} with a blue background, raising both hands, with its eyes closed",
    "A {trigger} with a white background, wearing round glasses, smiling",
    "A {trigger} with a red background, wearing a white beanie, smiling",
    "A {trigger} with a teal background, with a moustache, smiling",
    "A {trigger} with a beige background, wearing a red bow, smiling",
)


def identity(pictures: Tensor, references: Tensor) -> float:
    """How much the pictures look like the character: the mean over pictures of the largest cosine to a reference.

    pictures (N, D) and references (M, D) are unit vectors; the result lies in [-1, 1]."""
    return (pictures @ references.T).amax(dim=1).mean().item()


@torch.inference_mode()
def embed_pictures(judge: Path, pictures: list[Image.Image]) -> Tensor:
    """CLIP's unit image embeddings (N, D), float32, on the CPU."""
    model = CLIPModel.from_pretrained(judge, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(judge)
    features = model.get_image_features(**processor(images=pictures, return_tensors="pt")).pooler_output
    return torch.nn.functional.normalize(features, dim=-1)
