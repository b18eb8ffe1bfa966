"""Vision-language models on a GPU, in 16 and in 4 bits.

python -m pytest tests/gpu/test_vlm.py -m gpu -n 0"""

import pytest
import torch
from PIL import Image
from tiny_vlms import MODELS

from lora_lab.captions.captioner import load_captioner
from lora_lab.launch.config import compose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["auto", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_captions_on_a_gpu(tmp_path, name, precision):
    folder, option = MODELS[name](tmp_path / name), "florence" if name == "florence" else "vlm"
    overrides = (f"captioner={option}", f"captioner.base={folder}", f"captioner.precision={precision}")
    captioner = load_captioner(compose(*overrides, "captioner.max_tokens=8").captioner, torch.device("cuda", 0))
    linear = {type(module).__name__ for module in captioner.model.modules()}
    assert ("Linear4bit" in linear) == (precision == "nf4")
    captions = captioner.caption([Image.new("RGB", (64, 48), colour) for colour in ("red", "blue", "white")])
    assert len(captions) == 3 and all(captions)
