"""Look at what a LoRA draws while and after it is trained."""

from pathlib import Path

from PIL import Image

from lora_lab.base.encode import Encoder
from lora_lab.sampling.render import RenderSettings, image_specs, render_base, render_with_lora, save_image
from lora_lab.settings.schema import Config


class ValidationImages:
    """Draws fixed prompts and seeds with a LoRA file on the base in training, by the function of inference."""

    def __init__(self, encoder: Encoder, config: Config, render: RenderSettings, folder: Path) -> None:
        self._encoder, self._config, self._render, self._folder = encoder, config, render, folder / "samples"
        self._asked = image_specs(config.stage.prompts, config.stage.seeds, config.trigger)

    def base(self) -> None:
        """Have what the base draws of the stage's prompts in samples/base."""
        drawn, _ = render_base(self._asked, self._render, self._folder.parent, self._encoder)
        for each, picture in zip(self._asked, drawn, strict=True):
            save_image(self._folder / "base" / f"{each.name}.png", picture, each, "none")

    def validate(self, lora: Path, step: int) -> dict[str, tuple[Image.Image, str]]:
        """Draw the stage's prompts into samples/step-NNNNNN; returns tracker key to (picture, caption)."""
        drawn = render_with_lora(lora, self._asked, self._folder / f"step-{step:06d}", self._render, self._encoder)
        run = f"rank {self._config.rank}, lr {self._config.rate:g}, step {step}"
        return {
            f"validation/{each.name}": (picture, f"{each.prompt} | {run}, seed {each.seed}")
            for each, picture in zip(self._asked, drawn, strict=True)
        }

    def samples(self) -> dict[str, list[str]]:
        """Step -> its validation pictures, those drawn before a resume included."""
        folders = sorted(self._folder.glob("step-*"))
        return {str(int(f.name.removeprefix("step-"))): sorted(map(str, f.glob("*.png"))) for f in folders}
