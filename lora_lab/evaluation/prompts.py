"""The prompts of a score: what is rendered, and what is expected of it."""

import re
from dataclasses import dataclass, replace

from lora_lab.sampling.render import ImageSpec, image_specs
from lora_lab.settings.schema import Score


@dataclass(frozen=True)
class ScorePrompts:
    """What is rendered, and what is expected of it."""

    character: list[ImageSpec]  # with the trigger
    others: list[ImageSpec]  # without it
    texts: list[str]  # all prompts for CLIP: the class noun in place of the trigger
    character_texts: list[int]  # for each of `character` the index of its text
    other_texts: list[int]
    patterns: list[re.Pattern]  # of the attributes

    @classmethod
    def of(cls, score: Score, trigger: str, class_noun: str) -> "ScorePrompts":
        """The prompts of `score` for one character."""
        others = [text.replace("{class_noun}", class_noun) for text in score.other_prompts]
        return cls(
            character=image_specs(score.prompts, score.seeds, trigger),
            others=[replace(spec, name=f"other-{spec.name}") for spec in image_specs(others, score.seeds[:1], trigger)],
            texts=[*(text.replace("{trigger}", class_noun) for text in score.prompts), *others],
            character_texts=[i for i in range(len(score.prompts)) for _ in score.seeds],
            other_texts=[len(score.prompts) + i for i in range(len(others))],
            patterns=[re.compile(pattern) for pattern in score.attributes],
        )

    @property
    def specs(self) -> list[ImageSpec]:
        """All images, in the order of rendering."""
        return [*self.character, *self.others]
