"""Look at what a LoRA draws while and after it is trained."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lora_lab.adapters.wear import worn
from lora_lab.base.encode import Encoder
from lora_lab.base.locate import locate_folder
from lora_lab.generate import Request, generate
from lora_lab.runs import save_picture
from lora_lab.schema import Config
from lora_lab.scoring import IDENTITY_PROMPTS, embed_pictures, identity


class Look:
    """Draws fixed prompts and seeds with a LoRA file on the base in training, by the function of inference."""

    def __init__(self, encoder: Encoder, config: Config, folder: Path) -> None:
        self._encoder, self._config, self._folder = encoder, config, folder
        self._judge = config.model.judge and locate_folder("model.judge", config.model.judge)

    def validate(self, lora: Path, step: int) -> dict[str, tuple[Image.Image, str]]:
        """Draw the stage's prompts into samples/step-NNNNNN; returns tracker key to (picture, caption)."""
        stage = self._config.stage
        asked = [(f"p{i}-s{seed}", text, seed) for i, text in enumerate(stage.prompts) for seed in stage.seeds]
        folder = self._folder / "samples" / f"step-{step:06d}"
        shown = {}
        for (name, prompt, picture), seed in zip(self._draw(lora, asked, folder), [a[2] for a in asked], strict=True):
            caption = f"{prompt} | rank {self._config.rank}, lr {self._config.rate:g}, step {step}, seed {seed}"
            shown[f"validation/{name}"] = (picture, caption)
        return shown

    def samples(self) -> dict[str, list[str]]:
        """Step -> its validation pictures, those drawn before a resume included."""
        folders = sorted((self._folder / "samples").glob("step-*"))
        return {str(int(f.name.removeprefix("step-"))): sorted(map(str, f.glob("*.png"))) for f in folders}

    def identity(self, lora: Path | None, references: Sequence[Image.Image]) -> float | None:
        """scoring.identity of the measure's own prompts against the training pictures; None without `model.judge`."""
        if self._judge is None:
            return None
        asked = [(str(i), text, 0) for i, text in enumerate(IDENTITY_PROMPTS)]
        folder = self._folder / "samples" / ("identity" if lora else "identity-before")
        drawn = [picture for _, _, picture in self._draw(lora, asked, folder)]
        return identity(embed_pictures(self._judge, drawn), embed_pictures(self._judge, list(references)))

    def _draw(
        self, lora: Path | None, asked: list[tuple[str, str, int]], folder: Path
    ) -> list[tuple[str, str, Image.Image]]:
        """Draw (name, prompt, seed)s, save them in `folder` as NAME.png, return (name, prompt, picture)s."""
        side, trigger = self._config.model.resolution, self._config.trigger
        requests = [Request(text.replace("{trigger}", trigger), seed, (side, side)) for _, text, seed in asked]
        pipe, sampler = self._encoder.pipe, self._config.sampler
        with worn(pipe, lora, fuse=sampler.fuse):
            pictures = list(generate(pipe, requests, sampler, self._encoder))
        drawn = []
        for (name, _, _), request, picture in zip(asked, requests, pictures, strict=True):
            notes = {"prompt": request.prompt, "seed": request.seed, "lora": lora.name if lora else "none"}
            save_picture(folder / f"{name}.png", picture, notes)
            drawn.append((name, request.prompt, picture))
        return drawn
