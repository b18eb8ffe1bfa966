"""Validation images: fixed prompts and seeds, rendered from the saved LoRA file as inference renders them."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lora_lab.base.encode import Encoder
from lora_lab.sampling.render import ImageSpec, image_specs, render_base, render_with_lora, save_image
from lora_lab.track.base import Track
from lora_lab.training.artifacts import RunArtifacts
from lora_lab.training.observer import Observer
from lora_lab.training.resolve import ResolvedTraining


@dataclass
class ValidationImages(Observer):
    """Renders the stage's prompts at the start by the base, every stage.validate_every steps, and at the end."""

    resolved: ResolvedTraining
    artifacts: RunArtifacts
    encoder: Encoder
    tracker: Track

    @property
    def specs(self) -> list[ImageSpec]:
        """Every prompt with every seed."""
        return image_specs(self.resolved.settings.prompts, self.resolved.settings.seeds, self.resolved.trigger)

    @property
    def folder(self) -> Path:
        """Of all images."""
        return self.resolved.folder / "samples"

    def on_start(self, step: int) -> None:
        """Render what the base makes of the prompts, and what was due at `step` when the run stopped."""
        specs = self.specs
        images, _ = render_base(specs, self.resolved.render, self.resolved.folder, self.encoder)
        for spec, image in zip(specs, images, strict=True):
            save_image(self.folder / "base" / f"{spec.name}.png", image, spec, "none")
        if step and not all((self._folder_of(step) / f"{spec.name}.png").is_file() for spec in specs):
            self.on_step(step)

    def on_step(self, step: int) -> None:
        """Write the LoRA so far and render with it where that is due."""
        if self.resolved.is_due(self.resolved.settings.validate_every, step):
            self._render(self.artifacts.save_lora(step, f"{self.resolved.name}-{step:06d}"), step)

    def on_end(self, step: int) -> None:
        """Render with the finished LoRA."""
        self._render(self.artifacts.lora, step)

    def files(self) -> dict[str, list[str]]:
        """The files of all validation images by step, those from before a resume included."""
        folders = sorted(self.folder.glob("step-*"))
        return {str(int(f.name.removeprefix("step-"))): sorted(map(str, f.glob("*.png"))) for f in folders}

    def _folder_of(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _render(self, lora: Path, step: int) -> None:
        specs = self.specs
        images = render_with_lora(lora, specs, self._folder_of(step), self.resolved.render, self.encoder)
        run = f"rank {self.resolved.rank}, lr {self.resolved.lr:g}, step {step}"
        captioned: dict[str, tuple[Image.Image, str]] = {
            f"validation/{spec.name}": (image, f"{spec.prompt} | {run}, seed {spec.seed}")
            for spec, image in zip(specs, images, strict=True)
        }
        self.tracker.images(step, captioned)
