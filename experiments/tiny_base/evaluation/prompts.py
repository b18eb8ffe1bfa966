"""What prompts give, read by the judge that has learnt nothing."""

import time
from pathlib import Path

from PIL import Image

from experiments.tiny_base import judge
from experiments.tiny_base.evaluation.bench import COLUMNS, SIZE, Bench, image_of, spread, tally
from experiments.tiny_base.vocabulary import Look, full_caption
from lora_lab.base.load import load_base, pick_device
from lora_lab.images.sheet import contact_sheet
from lora_lab.sampling.generate import Request, generate

# What an older base knows too; for the picture that shows both.
SAMPLES = (
    "a flat cartoon person with a purple background, with curly brown hair, wearing sunglasses, smiling",
    "an inked cartoon person with a pink background, with long blue hair, wearing round glasses, looking surprised",
    "a toon cartoon person with a teal background, with spiky blond hair, with a full beard, laughing",
    "a cartoon green emoji with a black background, wearing sunglasses, laughing",
    "a cartoon red apple with a blue background, wearing a black top hat, smiling",
    "a cartoon white ghost with a purple background, winking with its left eye, smiling",
    "a cartoon pink cat with a gray background, wearing sunglasses, with a moustache, frowning",
    "a cartoon blue star with a yellow background, raising its left hand, laughing",
    "a cartoon brown bear with a green background, wearing a red party hat, wearing round glasses, smiling",
    "a cartoon green frog with a black background, wearing a yellow crown, smiling",
    "a ZUKO_MERI with an orange background, wearing round glasses, laughing",
    "a HANA_TOFU with a white background, with a moustache, smiling",
)


def prompts(bench: Bench) -> dict:
    """Text to picture on fresh prompts, read by the judge that has learnt nothing."""
    drawings = bench.drawings(bench.prompts * 3 // 10, bench.prompts - bench.prompts * 3 // 10)
    asked = [(d.look, d.backgrounds[0][0]) for d in drawings]
    config = bench.config("stage=train")
    pipe = load_base(config.model, pick_device("auto"))
    requests = [Request(full_caption(look, ground), seed, SIZE) for seed, (look, ground) in enumerate(asked)]
    begun = time.time()
    images = list(generate(pipe, requests, config.sampler))
    figures = {"seconds a picture": round((time.time() - begun) / len(images), 2)}
    bench.sheet("prompts", images[-6 * COLUMNS :])

    def score(pictures: list[Image.Image]) -> dict[str, float]:
        pairs = zip(pictures, asked, strict=True)
        return tally(judge.correct(judge.read(image, look), look, ground) for image, (look, ground) in pairs)

    figures |= score(images)
    figures["the judge itself, on true drawings"] = score([image_of(d) for d in drawings])
    return figures | {"seeds": seeds(pipe, config, asked[-8:])}


def seeds(pipe, config, asked: list[tuple[Look, str]], each: int = 4) -> float:
    """How much the seed changes: one minus the silhouettes' intersection over union, mean over pairs of seeds."""
    requests = [Request(full_caption(look, ground), seed, SIZE) for look, ground in asked for seed in range(each)]
    images = list(generate(pipe, requests, config.sampler))
    return spread(images[i : i + each] for i in range(0, len(images), each))


def look(bench: Bench, against: Path | None) -> dict:
    """No figures but a picture, base.png: SAMPLES with two seeds, by the bundle and by the older base."""
    bases = {"new": bench.bundle / "tiny-sdxl"} | ({"old": against} if against else {})
    rows, titles = [], []
    for name, base in bases.items():
        config = bench.config("stage=train", f"model.base={base}")
        pipe = load_base(config.model, pick_device("auto"))
        for seed in range(2):
            rows.append(list(generate(pipe, [Request(prompt, seed, SIZE) for prompt in SAMPLES], config.sampler)))
            titles.append(f"{name} base, seed {seed}" if against else f"seed {seed}")
    contact_sheet(rows, SAMPLES, titles, cell=160).save(bench.out / "base.png")
    return {"prompts": len(SAMPLES), "bases": list(bases)}
