"""A captioner and a refiner for tests: deterministic, and each may do something before one of its captions."""

from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image


@dataclass(repr=False)  # as a setting it is always the same
class Hook:
    """What happens before caption number `at`, counted from 0 over all runs."""

    at: int = -1
    action: Callable[[], None] = lambda: None
    count: int = 0
    seen: list = field(default_factory=list)

    def __call__(self, item: object) -> None:
        if self.count == self.at:
            self.at = -1
            self.action()
        self.count += 1
        self.seen.append(item)


@dataclass
class ToyCaptioner:
    device: object
    hook: Hook

    def caption(self, images: list[Image.Image]) -> list[str]:
        for image in images:
            self.hook(image.getpixel((0, 0)))
        return [f"a toy of colour {image.getpixel((0, 0))[0]}" for image in images]

    def phrases(self, images: list[Image.Image]) -> list[list[tuple[str, float]]]:
        """More certain of a hat the redder an image is, and never of the subject."""
        colours = [image.getpixel((0, 0))[0] / 10 for image in images]
        captions = zip(self.caption(images), colours, strict=True)
        return [[(caption, 0.0), ("with a hat", red), ("smiling", 0.9)] for caption, red in captions]


@dataclass
class ToyRefiner:
    hook: Hook

    def refine(self, captions: list[str], hints: list[str], trigger: str) -> list[str]:
        for caption in captions:
            self.hook(caption)
        return [f"{trigger}, {caption.removeprefix(trigger + ', ')}" for caption in captions]
