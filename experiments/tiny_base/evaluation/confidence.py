"""What captions invent and what they keep, by captioner.min_confidence, of the five held-out characters and the photos.

python -m experiments.tiny_base.evaluation.confidence

Of each character 48 drawings are captioned whose looks are known: 24 on its own background, 24 on all backgrounds.
`beams` is the caption of the beam search, with nothing left out. Its own marks and its blush, which are there to be
seen, count neither as invented nor as true. The photos are the eight of the demo, of which the beam search says nothing
wrong.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from experiments.tiny_base.held_out import HELD_OUT
from experiments.tiny_base.lessons import drawings
from experiments.tiny_base.palette import BACKGROUNDS
from experiments.tiny_base.recipe import SEED
from experiments.tiny_base.vocabulary import Look, meanings, phrases
from lora_lab.captions.captioner import load_captioner
from lora_lab.demo import PHOTOS
from lora_lab.images.pixels import open_picture
from lora_lab.launch.config import compose

LEAST = (0.0, 0.3, 0.4, 0.45, 0.5, 0.6)
OWN = {"tofu": "flower", "mug": "star", "octopus": "dots", "robot": None, "lighthouse": "stripes"}


def main() -> None:
    captioner = load_captioner(compose("captioner=blip_tiny").captioner, torch.device("cpu"))
    for name, character in HELD_OUT.items():
        drawn = [*drawings(character, [character.background], SEED), *drawings(character, [*BACKGROUNDS], SEED + 1)]
        images, looks = [image for image, _, _ in drawn], [look for _, look, _ in drawn]
        truth = sum(len(attributes(look)) for look in looks)
        searched = [[(phrase, 1.0) for phrase in text.split(", ")] for text in captioner.caption(images)]
        print(f"\n{name}: {truth} attributes on {len(images)} drawings")
        show("beams", [kept(said, 0) for said in searched], looks, OWN[name])
        certain = captioner.phrases(images)
        for least in LEAST:
            show(f"{least:5.2f}", [kept(said, least) for said in certain], looks, OWN[name])
    photos = [open_picture(path) for path in sorted(PHOTOS.glob("*.png"))]
    true = [set(text.split(", ")[1:]) for text in captioner.caption(photos)]
    certain = captioner.phrases(photos)
    print(f"\nphotos: the beam search says {sum(map(len, true))} phrases, all true")
    for least in LEAST:
        said = [set(kept(own, least)) for own in certain]
        same = sum(len(some & own) for some, own in zip(said, true, strict=True))
        print(f"  {least:5.2f}: {same} of them, and {sum(map(len, said)) - same} others")


def kept(said: Sequence[tuple[str, float]], least: float) -> list[str]:
    """The phrases after the subject's with a confidence of `least` or more."""
    return [phrase for phrase, confidence in said[1:] if confidence >= least]


def attributes(look: Look) -> list[str]:
    """What is to be said of a lesson's look: all but the blush that every lesson has."""
    return [phrase for phrase in phrases(look) if phrase != "with pink cheeks"]


def invented(said: Sequence[str], look: Look, own: str | None) -> list[str]:
    """The phrases that a drawing of `look` does not show; `own` is a word for the character's own mark."""
    return [phrase for phrase in said if phrase not in phrases(look) and not (own and own in phrase)]


def show(title: str, captions: Sequence[Sequence[str]], looks: Sequence[Look], own: str | None) -> None:
    """Print how much of the truth is kept, and how much is invented, by kind."""
    wrong = [p for said, look in zip(captions, looks, strict=True) for p in invented(said, look, own)]
    true = [p for said, look in zip(captions, looks, strict=True) for p in said if p in attributes(look)]
    share = len(true) / sum(len(attributes(look)) for look in looks)
    kinds = Counter(meanings()[phrase][0] if phrase in meanings() else "other" for phrase in wrong)
    print(f"  {title}: kept {share:.2f}, invented {len(wrong):3d} {dict(kinds.most_common())}")


if __name__ == "__main__":
    main()
