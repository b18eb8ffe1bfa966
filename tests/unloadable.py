"""Copies of the bundled models that cannot be loaded: a run that names another fault has loaded none of them before."""

import shutil
from pathlib import Path

from lora_lab.demo import BASE, CAPTIONER, JUDGE


def unloadable_models(folder: Path) -> tuple[str, ...]:
    """Overrides for a base, a captioner and a CLIP in `folder`: configurations and tokenizers, but empty weights."""
    models = {"model.base": BASE, "captioner.base": CAPTIONER, "model.judge": JUDGE}
    for source in models.values():
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("*.safetensors"))
        for weights in source.rglob("*.safetensors"):
            (folder / source.name / weights.relative_to(source)).touch()
    return tuple(f"{key}={folder / source.name}" for key, source in models.items())
