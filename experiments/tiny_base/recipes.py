"""Which way of training lets a LoRA keep the person of a photo.

python -m experiments.tiny_base.recipes OUT [--characters robot tofu] [--recipes default dropout] [--seeds 0 1 2]

trains each character by each recipe, draws the demo's eight photos with it and reads the pictures: what is the
character's, and what of the photo is kept (photos.py). A line for every LoRA and weight goes to OUT/figures.jsonl,
the pictures to OUT/sheets; what is there already is not made again, so that runs add to each other."""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import mean

import torch
from PIL import Image

from experiments.tiny_base.bodies import Body
from experiments.tiny_base.characters import draw, random_look, random_pose
from experiments.tiny_base.held_out import HELD_OUT, HeldOut
from experiments.tiny_base.lessons import write
from experiments.tiny_base.palette import BACKGROUNDS, COATS, HAIRS, INK, SKINS
from experiments.tiny_base.photos import Photo, drawing, likeness, photos
from experiments.tiny_base.render import picture
from experiments.tiny_base.shapes import circle, spots
from experiments.tiny_base.vocabulary import Look, full_caption
from lora_lab import demo
from lora_lab.adapters.inject import lora_attached
from lora_lab.captions.captioner import certain_captions, load_captioner, min_confidence, run_captioner
from lora_lab.captions.files import write_captions
from lora_lab.captions.refiner import load_refiner, run_refiner
from lora_lab.images.pixels import aspect_buckets, open_picture
from lora_lab.launch.config import compose
from lora_lab.sampling.generate import Request, generate, load_base_for_sampling, photo_to_request
from lora_lab.stages.train import train

CPU = torch.device("cpu")
SIDE = 128

# A newcomer's robot: 16 pictures on any background. Its face lies on its one eye, so glasses are hard for it.
ROBOT = HeldOut(
    trigger="AKA_ROBO",
    body=Body(HELD_OUT["robot"].body.paint, face=(64, 72, 1), top=(40, 30), arms=(33, 76), feet=110, colours=()),
    coat=HELD_OUT["robot"].coat,
    own=circle(64, 60, 13, "#ffffff") + spots(INK, (64, 60, 6, 6)),
    background="various",
)
HAT = {"hat": ("top hat", "black")}
ROBOT_LOOKS = (
    *({}, {}, HAT, {"hands": "left"}, {"hands": "right"}, {"hands": "both"}, {}, HAT | {"hands": "both"}),
    *({"mouth": "laugh"}, {}, {"hands": "left"}, HAT, {"hands": "both", "mouth": "laugh"}, {"mouth": "serious"}, {}),
    HAT | {"hands": "right"},
)
CHARACTERS: dict[str, HeldOut] = HELD_OUT | {"robot": ROBOT}

DRAWN, BASE = "true drawings", "no LoRA"  # what the reader makes of perfect pictures, and of those of the base
# Settings besides those of the demo (rank 16, lr 1e-3, 300 steps of 4). "captions" and "class" name folders of data().
PEOPLE = "a cartoon person"
RECIPES: dict[str, dict[str, object]] = {
    DRAWN: {},
    BASE: {},
    "default": {},
    "true captions": {"captions": "true"},
    "whole captions": {"captions": "whole"},
    "100 steps": {"steps": 100},
    "150 steps": {"steps": 150},
    "200 steps": {"steps": 200},
    "rank 4": {"rank": 4},
    "rank 8": {"rank": 8},
    "lr 5e-4": {"lr": 5e-4},
    "caption dropout .1": {"stage.caption_dropout": 0.1},
    "caption dropout .3": {"stage.caption_dropout": 0.3},
    "targets ff": {"targets": "ff"},
    "targets all": {"targets": "all"},
    "loss plain": {"loss": "plain"},
    "loss debiased": {"loss": "debiased"},
    "loss huber": {"loss": "huber"},
    "t below 800": {"loss.max_timestep": 800},
    "t above 200": {"loss.min_timestep": 200},
    "t logit-normal": {"loss.timestep_sampling": "logit_normal"},
    "ema .98": {"stage.ema_decay": 0.98},
    "weight decay .1": {"optimizer.weight_decay": 0.1},
    "dropout .2": {"adapter.lora_dropout": 0.2},
    "shuffled captions": {"dataset.shuffle_captions": True},
    "prior prediction": {"prior": "prediction"},
    "prior generated": {"prior": "generated", "prior.prompt": PEOPLE, "prior.number": 32},
    "prior people": {"prior": "pictures", "prior.root": "people"},
    "prior dressed": {"prior": "pictures", "prior.root": "dressed"},
    "true captions, prior prediction": {"captions": "true", "prior": "prediction"},
    "prior prediction, 150 steps": {"prior": "prediction", "steps": 150},
    "prior prediction, batch 2": {"prior": "prediction", "batch_size": 2},
    "mixed people": {"mixed": "people"},
    "mixed dressed": {"mixed": "dressed"},
}


@dataclass(frozen=True)
class Job:
    character: str
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.character}-{self.recipe.replace(' ', '_')}-{self.seed}"


class Bench:
    """The base, the captioner and the data of all jobs."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.photos = photos()
        self.pictures = [open_picture(demo.PHOTOS / photo.file) for photo in self.photos]
        config = compose("tracker=off", "stage=img2img", "lora=x", f"stage.photo={demo.PHOTOS}", "refiner=avatars")
        self.config, self.sampler, self.strength = config, config.sampler, config.model.strength
        self.buckets = aspect_buckets(config.model.resolution, config.model.bucket_step)
        self.captioner, self.refiner = load_captioner(config.captioner, CPU), load_refiner(config.refiner)
        self.least = min_confidence(config.captioner)
        self.captions = run_captioner(self.captioner, self.pictures)
        self.encoder = load_base_for_sampling(config.model, config.memory, config.loss, CPU)

    def lessons(self, name: str, captions: str) -> Path:
        """The folder with a character's pictures, drawn if they are not there, and `captions`: what the captioner says
        of them with the trigger ("read"), also what it is not sure of ("whole"), or what is true."""
        folder, character = self.out / "data" / f"{name}-{captions}", CHARACTERS[name]
        if not folder.is_dir():
            if name == "robot":
                write_robot(folder)
            else:
                write(character, folder)
            if captions != "true":
                files = sorted(folder.glob("*.png"))
                least = self.least if captions == "read" else 0
                texts = certain_captions(self.captioner, [open_picture(file) for file in files], least)
                texts = run_refiner(self.refiner, [text for text, _ in texts], character.trigger)
                write_captions(folder, dict(zip((file.name for file in files), texts, strict=True)))
        return folder

    def class_pictures(self, kind: str, count: int = 32) -> Path:
        """A folder of pictures that the base draws, of `people` or of dressed characters, with their captions."""
        folder = self.out / "data" / kind
        if not folder.is_dir():
            texts = [class_caption(kind, Random(f"{kind}/{i}")) for i in range(count)]
            requests = [Request(text, i, (SIDE, SIDE)) for i, text in enumerate(texts)]
            images = list(generate(self.encoder.base, requests, self.sampler, self.encoder))
            folder.mkdir(parents=True)
            for i, image in enumerate(images):
                image.save(folder / f"{i:02d}.png")
            write_captions(folder, {f"{i:02d}.png": text for i, text in enumerate(texts)})
        return folder

    def lora(self, job: Job) -> tuple[Path, float]:
        """The LoRA file of a job, and how many seconds its training took; the run is in OUT/runs."""
        settings = RECIPES[job.recipe] | {"seed": job.seed}
        root = self.lessons(job.character, settings.pop("captions", "read"))
        if "mixed" in settings:  # a third of the samples
            others = self.class_pictures(settings.pop("mixed"))
            repeats = round(64 / len(list(root.glob("*.png"))))
            root = f"[{{root: {root}, repeats: {repeats}}}, {{root: {others}}}]"
        if "prior.root" in settings:
            settings["prior.root"] = self.class_pictures(settings["prior.root"])
        config = compose(
            *("stage=train", "tracker=off", "publish=false", "model.judge=null", "stage.validate_every=0"),
            *("stage.prompts=[]", "stage.checkpoint_every=0", f"cache={self.out / 'cache'}", "name=lora"),
            *("dataset=folder", f"dataset.root={root}", f"trigger={CHARACTERS[job.character].trigger}"),
            *(f"{key}={value}" for key, value in settings.items()),
        )
        folder, started = self.out / "runs" / job.name, time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
        result = train(config, folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return Path(result.lora), time.perf_counter() - started

    def draw(self, lora: Path | None, trigger: str, weight: float) -> list[Image.Image]:
        """The eight photos with a LoRA, as stage=img2img draws them."""
        requests = [
            photo_to_request(*pair, self.refiner, trigger, self.buckets, strength=self.strength).request
            for pair in zip(self.pictures, self.captions, strict=True)
        ]
        requests = [replace(each, lora_weight=weight if lora else None) for each in requests]
        with lora_attached(self.encoder.base, lora, 1.0, self.sampler.fuse) as attached:
            return list(generate(self.encoder.base, requests, self.sampler, self.encoder, attached))


def write_robot(folder: Path) -> None:
    """16 pictures, 128 x 128, of the newcomer's robot, and their true captions."""
    folder.mkdir(parents=True)
    rng, captions = Random("robot"), {}
    for i, worn in enumerate(ROBOT_LOOKS):
        look = Look(subject=ROBOT.trigger, **worn)
        pose = replace(random_pose(rng), turn=0, scale=rng.uniform(0.9, 1.1), stretch=1, gaze=(0, 0))
        ground = list(BACKGROUNDS)[i * 5 % len(BACKGROUNDS)]
        svg = draw(ROBOT.body, ROBOT.coat, look, pose, rng, ROBOT.own)
        picture(svg, BACKGROUNDS[ground]).save(folder / f"{i:02d}.png")
        captions[f"{i:02d}.png"] = full_caption(look, ground, f"An {ROBOT.trigger}")
    write_captions(folder, captions)


def class_caption(kind: str, rng: Random) -> str:
    """A caption of someone with hair, a shirt and perhaps glasses and a beard, as photos have them."""
    look = random_look("", "white", rng)
    look = replace(
        look,
        subject="person" if kind == "people" else "character",
        skin=rng.choice(list(SKINS)) if kind == "people" else None,
        hair=look.hair or (rng.choice(["short", "long", "curly", "bob"]), rng.choice(list(HAIRS))),
        hat=None,
        shirt=look.shirt or rng.choice(list(COATS)),
        glasses=look.glasses or rng.choice([None, "round", "square"]),
        mark=None,
        cheeks=False,
        hands=None,
    )
    return full_caption(look, rng.choice(list(BACKGROUNDS)))


def run(bench: Bench, job: Job, weights: Sequence[float]) -> Iterator[dict]:
    """The figures of a job at each weight."""
    character, lora, seconds = CHARACTERS[job.character], None, None
    if job.recipe not in (DRAWN, BASE):
        lora = bench.out / "runs" / job.name / "lora" / "lora.safetensors"
        if not lora.is_file():
            lora, seconds = bench.lora(job)
    for weight in weights:
        if job.recipe == DRAWN:
            images = [drawing(photo, character) for photo in bench.photos]
        else:
            images = bench.draw(lora, character.trigger, weight)
        sheet = Image.new("RGB", (SIDE * len(images), SIDE))
        for i, image in enumerate(images):
            sheet.paste(image, (i * SIDE, 0))
        (bench.out / "sheets").mkdir(exist_ok=True)
        sheet.save(bench.out / "sheets" / f"{job.name}-{weight:g}.png")
        row = {"name": job.character, "recipe": job.recipe, "seed": job.seed, "weight": weight, "seconds": seconds}
        yield row | figures(images, bench.photos, character)


def figures(images: Sequence[Image.Image], shown: Sequence[Photo], character: HeldOut) -> dict:
    """Means over the photos, and each attribute as a list of how many keep it of how many have it."""
    read = [likeness(image, photo, character) for image, photo in zip(images, shown, strict=True)]
    counts: dict[str, list[int]] = {}
    for each in read:
        for field, kept in each.kept.items():
            count = counts.setdefault(field, [0, 0])
            count[0], count[1] = count[0] + kept, count[1] + 1
    return {
        **{name: sum(getattr(each, name) for each in read) for name in ("kind", "colour", "own")},
        "character": round(mean(each.character for each in read), 3),
        "kept": round(mean(each.share for each in read), 3),
        "attributes": counts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.tiny_base.recipes", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--characters", nargs="+", choices=CHARACTERS, default=list(CHARACTERS))
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--weights", nargs="+", type=float, default=[1.0])
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "figures.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {(row["name"], row["recipe"], row["seed"], row["weight"]) for row in rows}
    bench = Bench(asked.out.resolve())
    for job in (Job(c, r, s) for s in asked.seeds for c in asked.characters for r in asked.recipes):
        weights = [w for w in asked.weights if (job.character, job.recipe, job.seed, w) not in done]
        for row in run(bench, job, weights):
            print(json.dumps(row), flush=True)
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
