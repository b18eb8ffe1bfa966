"""The bundled demo: a tiny SDXL, its captioner and judge, the tofu pictures and eight "photos" (see README.md)."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
BASE = HERE / "tiny-sdxl"
CAPTIONER = HERE / "tiny-blip"
JUDGE = HERE / "tiny-clip"
TOFU = HERE / "tofu"
PHOTOS = HERE / "photos"
