"""The bundled demo: a tiny SDXL, a captioner and a CLIP for its images, the tofu images, and eight "photos"."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE = HERE / "tiny-sdxl"
CAPTIONER = HERE / "tiny-blip"
JUDGE = HERE / "tiny-clip"
TOFU = HERE / "tofu"
PHOTOS = HERE / "photos"
