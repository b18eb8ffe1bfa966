"""What a LoRA learns on the base, and which settings are good for that."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random
from statistics import mean

from PIL import Image

from experiments.tiny_base import judge
from experiments.tiny_base.characters import random_look
from experiments.tiny_base.evaluation.bench import SEED, SIZE, Bench, lessons, pictures_in, spread, tally
from experiments.tiny_base.held_out import HELD_OUT, HeldOut
from experiments.tiny_base.palette import BACKGROUNDS
from experiments.tiny_base.photos import TOFU_LIKE
from experiments.tiny_base.vocabulary import full_caption, parsed
from lora_lab import demo
from lora_lab.adapters.inject import lora_attached
from lora_lab.base.load import load_base, pick_device
from lora_lab.sampling.generate import Request, generate
from lora_lab.stages.img2img import img2img
from lora_lab.stages.train import TrainResult, train

# The sweep: the bundled tofu with these settings, two training seeds; then the best LoRA's img2img with those.
TRAININGS = ((8, 1e-3, 300), (16, 5e-4, 300), (16, 1e-3, 200), (16, 1e-3, 300), (16, 1e-3, 400), (16, 2e-3, 300))
STRENGTHS, GUIDANCES = (0.8, 0.9, 0.95, 1.0), (3.0, 5.0, 7.0)


def lora(bench: Bench, looks: int = 12) -> dict:
    """Characters that the base has never seen, rank 16, 300 steps: its scores, and what the judge reads."""
    return {name: taught(bench, name, lessons(bench, c), looks) for name, c in HELD_OUT.items()}


def taught(bench: Bench, name: str, root: Path, looks: int, *overrides: str) -> dict:
    """Train on a character's pictures and draw random looks, on backgrounds other than theirs, with two seeds."""
    character = HELD_OUT[name]
    result = learnt(bench, character, root, *overrides)
    rng = Random(f"{SEED}/{name}")
    asked = []
    for _ in range(looks):
        # Clothes would hide what is the octopus's own.
        look = replace(random_look("", "white", rng), subject=character.trigger, shirt=None, mark=None, cheeks=False)
        asked.append((look, rng.choice([ground for ground in BACKGROUNDS if ground != character.background])))
    prompts = [full_caption(look, ground, f"A {character.trigger}") for look, ground in asked]
    config = bench.config("stage=train")
    pipe = load_base(config.model, pick_device("auto"))
    before = list(generate(pipe, [Request(prompt, 0, SIZE) for prompt in prompts], config.sampler))
    with lora_attached(pipe, Path(result.lora)):
        requests = [Request(prompt, seed, SIZE) for seed in range(2) for prompt in prompts]
        images = list(generate(pipe, requests, config.sampler))
    bench.sheet(f"lora-{name}", [*pictures_in(root)[:looks], *before, *images], looks)
    right = tally(
        judge.correct(judge.read(image, look, character), look, ground, character)
        for image, (look, ground) in zip(images, asked * 2, strict=True)
    )
    figures = {name: round(result.scores[name].value, 3) for name in ("score", "subject")}
    figures = {"subject before": round(result.scores_before["subject"].value, 3)} | figures
    return figures | {"seeds": spread(zip(images[:looks], images[looks:], strict=True))} | right


def learnt(bench: Bench, character: HeldOut, root: Path, *overrides: str) -> TrainResult:
    """A LoRA of the character, in a folder named by its settings."""
    folder = _folder(bench, character, overrides)
    config = bench.config(
        "stage=train",
        f"dataset.root={root}",
        f"trigger={character.trigger}",
        f"name={bench.out.name}_{folder.name.replace('.', '')}",
        "stage.validate_every=0",
        *overrides,
    )
    return train(config, folder)


def sweep(bench: Bench) -> dict:
    """The demo's settings on the bundled tofu: trainings first, then img2img of the eight photos with the best."""
    kept = ("score", "subject", "kind", "own", "background", "all attributes")
    figures: dict[str, dict] = {}
    for rank, rate, steps in TRAININGS:
        rows = [taught(bench, "tofu", demo.TOFU, 12, *_settings(rank, rate, steps, seed)) for seed in range(2)]
        name = f"rank {rank}, lr {rate:g}, {steps} steps"
        figures[name] = {key: round(mean(row[key] for row in rows), 3) for key in kept}
        print(name, figures[name], flush=True)
    worth = [row["subject"] + row["own"] + row["all attributes"] for row in figures.values()]
    best = _folder(bench, HELD_OUT["tofu"], _settings(*TRAININGS[worth.index(max(worth))], 0))
    for strength, guidance in product(STRENGTHS, GUIDANCES):
        name = f"strength {strength}, guidance {guidance:g}"
        figures[name] = photos(bench, next((best / "lora").glob("*.safetensors")), strength, guidance)
        print(name, figures[name], flush=True)
    return figures


def photos(bench: Bench, file: Path, strength: float, guidance: float) -> dict:
    """How many of the eight photos became a tofu, and what of their captions is kept."""
    character = HELD_OUT["tofu"]
    config = bench.config(
        "stage=img2img",
        f"lora={file}",
        f"stage.photo={demo.PHOTOS}",
        f"stage.strength={strength}",
        f"sampler.guidance={guidance}",
    )
    result = img2img(config, bench.out / "img2img" / f"{strength}-{guidance:g}")
    readings = []
    for drawn in result.pictures:
        look, ground = parsed(drawn.prompt)
        reading = judge.read(Image.open(drawn.picture), look, character)
        right = judge.correct(reading, look, ground or "", character)
        # The judge knows no people: whoever stayed one is taken for the kind that is least unlike.
        readings.append(right | {"kind": right["kind"] and reading.overlap > TOFU_LIKE})
    right = tally(readings)
    tofus = sum(reading["kind"] for reading in readings)
    return {"tofus of 8": tofus, **{key: right[key] for key in ("background", "own", "all attributes")}}


def _settings(rank: int, rate: float, steps: int, seed: int) -> tuple[str, ...]:
    return f"rank={rank}", f"lr={rate}", f"steps={steps}", f"seed={seed}"


def _folder(bench: Bench, character: HeldOut, overrides: tuple[str, ...]) -> Path:
    return bench.out / "lora" / "_".join([character.trigger, *(each.replace("=", "") for each in overrides)])
