"""Settings of the captioner and of the refiner."""

from lora_lab.settings.setting import ModelLocation, Section, section, setting

# Training compares the captions themselves, by their hash; the refined caption of a photo is a prompt of img2img.
TEXT = {"decides": ("weights", "request"), "hashed_as": "captions"}


@section
class Captioner(Section):
    name: str = setting("name of the author in captions.history.jsonl", decides="nothing")
    base: ModelLocation = setting("BLIP model: hub id or folder; demo: is the package's folder", **TEXT)
    prompt: str | None = setting("how every caption begins; null leaves it to the model", **TEXT, default=None)
    max_tokens: int = setting("longest caption, in tokens", **TEXT, default=50, ge=1)
    beams: int = setting("beams of the beam search; 1 is greedy decoding", **TEXT, default=3, ge=1)
    batch_size: int = setting("images in one forward pass", decides="cost", default=4, ge=1)


@section
class Rule(Section):
    pattern: str = setting("regular expression; case is ignored", **TEXT)
    replacement: str = setting("text in its place", **TEXT, default="")


@section
class Refiner(Section):
    replace: list[Rule] = setting("rules that run first, on each phrase of a caption", **TEXT, default_factory=list)
    vocabulary: list[Rule] = setting(
        "rules that run second: from the captioner's words to those of the captions", **TEXT, default_factory=list
    )
    subjects: list[str] = setting(
        "nouns that the trigger replaces, with their adjectives", **TEXT, default_factory=list
    )
    article: str = setting("word before the trigger where it replaces a subject; empty for none", **TEXT, default="A")
    drop_repeats: bool = setting("drop repeated words and phrases", **TEXT, default=True)
