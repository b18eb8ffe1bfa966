"""Measure a bundle on fresh pictures and prompts.

python -m experiments.tiny_base.evaluate BUNDLE OUT --avatars FILE [--unseen FILE] [--against OLD] [--only vae ...]

FILE holds avatars of another seed than the training's, by dicebear/draw.mjs; --unseen ones in a style that was not in
the data; --against is an older tiny-sdxl to draw the same prompts and seeds. OUT gets figures.json, which later runs
add to, and pictures to look at.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random
from statistics import mean

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipProcessor, CLIPModel, CLIPProcessor

from experiments.tiny_base import judge
from experiments.tiny_base.augment import worn as spoilt
from experiments.tiny_base.avatars import random_avatar, read
from experiments.tiny_base.characters import random_character, random_look
from experiments.tiny_base.data import Drawn
from experiments.tiny_base.details import random_details
from experiments.tiny_base.held_out import HELD_OUT, HeldOut
from experiments.tiny_base.lessons import write
from experiments.tiny_base.palette import BACKGROUNDS, background
from experiments.tiny_base.render import picture, to_image
from experiments.tiny_base.vocabulary import Look, altered, full_caption, phrases
from lora_lab import demo
from lora_lab.adapters.wear import worn
from lora_lab.base.load import load_base, pick_device
from lora_lab.captions.captioner import clean_decoding
from lora_lab.config import compose
from lora_lab.generate import Request, generate
from lora_lab.images.sheet import contact_sheet
from lora_lab.stages.train import train

SEED = 2  # of everything drawn here; training's is 1
SIZE = (128, 128)
COLUMNS = 12  # of the pictures to look at


class Bench:
    """What the parts of an evaluation share: the bundle, fresh drawings, and where to leave pictures."""

    def __init__(self, bundle: Path, out: Path, avatars: Path, prompts: int):
        self.bundle, self.out, self.prompts = bundle, out, prompts
        self._avatars = read(avatars)

    def config(self, *overrides: str):
        models = {"model.base": "tiny-sdxl", "captioner.base": "tiny-blip", "model.judge": "tiny-clip"}
        return compose("tracker=off", *(f"{key}={self.bundle / name}" for key, name in models.items()), *overrides)

    def drawings(self, avatars: int, characters: int) -> list[Drawn]:
        """Fresh ones, always the same, each on one background."""
        rng = Random(f"{SEED}/drawings")
        lines = self._avatars[:avatars]
        pairs = [random_avatar(line, rng) for line in lines] + [random_character(rng) for _ in range(characters)]
        return [Drawn(svg, look, [background(rng)]) for svg, look in pairs]

    def sheet(self, name: str, pictures: list[Image.Image], columns: int = COLUMNS) -> None:
        rows = -(-len(pictures) // columns)
        sheet = Image.new("RGB", (columns * SIZE[0], rows * SIZE[1]), "white")
        for i, image in enumerate(pictures):
            sheet.paste(image.resize(SIZE), (i % columns * SIZE[0], i // columns * SIZE[1]))
        sheet.save(self.out / f"{name}.png")


def tensor(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def image_of(drawn: Drawn) -> Image.Image:
    return picture(drawn.svg, drawn.backgrounds[0][1])


# ---- The autoencoder


def vae(bench: Bench) -> dict:
    """PSNR in dB over all pixels, decoded from the latents' mean."""
    model = AutoencoderKL.from_pretrained(bench.bundle / "tiny-sdxl" / "vae", torch_dtype=torch.float32).eval()
    rng = Random(f"{SEED}/details")
    sets = {
        "held-out": [image_of(drawn) for drawn in bench.drawings(100, 160)],
        "tofu": [Image.open(file) for file in sorted(demo.TOFU.glob("*.png"))],
        "details": [picture(random_details(rng), (0, 0, 0)) for _ in range(40)],
    }
    figures, shown = {}, []
    for name, images in sets.items():
        with torch.inference_mode():
            pairs = [(x, model.decode(model.encode(x[None]).latent_dist.mean).sample[0]) for x in map(tensor, images)]
        squares = [(y.clamp(-1, 1) - x).square().mean().item() for x, y in pairs]
        figures[f"{name}, dB"] = round(10 * math.log10(4 / mean(squares)), 2)
        shown += pairs[-4:]
    bench.sheet("vae", [to_image(x) for x, _ in shown] + [to_image(y) for _, y in shown])
    return figures


# ---- Prompts


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
    figures |= tally(
        judge.correct(judge.read(i, look), look, ground) for i, (look, ground) in zip(images, asked, strict=True)
    )
    truth = [image_of(d) for d in drawings]
    ceiling = tally(
        judge.correct(judge.read(i, look), look, ground) for i, (look, ground) in zip(truth, asked, strict=True)
    )
    return figures | {"the judge itself, on true drawings": ceiling, "seeds": seeds(pipe, config, asked[-8:])}


def seeds(pipe, config, asked: list[tuple[Look, str]], each: int = 4) -> float:
    """How much the seed changes: one minus the silhouettes' intersection over union, mean over pairs of seeds."""
    requests = [Request(full_caption(look, ground), seed, SIZE) for look, ground in asked for seed in range(each)]
    silhouettes = [judge.silhouette(image) for image in generate(pipe, requests, config.sampler)]
    groups = [silhouettes[i : i + each] for i in range(0, len(silhouettes), each)]
    overlaps = [(a & b).sum() / (a | b).sum() for group in groups for a, b in combinations(group, 2)]
    return round(1 - mean(map(float, overlaps)), 3)


def tally(readings) -> dict[str, float]:
    """Field by field the share that is right, and of all fields together."""
    fields: dict[str, list[bool]] = defaultdict(list)
    for reading in readings:
        for field, right in reading.items():
            fields[field].append(right)
            if field not in ("background", "kind", "colour"):
                fields["all attributes"].append(right)
    return {field: round(mean(right), 3) for field, right in fields.items()}


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


# ---- Captions


def captions(bench: Bench, unseen: Path | None) -> dict:
    """The captioner on fresh pictures, whole and spoilt, and on avatars of a style that it never saw."""
    processor = BlipProcessor.from_pretrained(bench.bundle / "tiny-blip", backend="pil")
    blip = BlipForConditionalGeneration.from_pretrained(bench.bundle / "tiny-blip", dtype=torch.float32).eval()

    def score(drawings: list[Drawn], change: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, float]:
        right: dict[str, list[bool]] = defaultdict(list)
        for some in (drawings[i : i + 20] for i in range(0, len(drawings), 20)):
            images = [to_image(x) for x in change(torch.stack([tensor(image_of(drawn)) for drawn in some]))]
            with torch.inference_mode():
                ids = blip.generate(**processor(images=images, return_tensors="pt"), max_new_tokens=60, num_beams=1)
            for drawn, text in zip(some, processor.batch_decode(ids, skip_special_tokens=True), strict=True):
                compare(clean_decoding(text).split(", "), drawn, right)
        return {name: round(mean(values), 3) for name, values in right.items()}

    torch.manual_seed(SEED)
    figures = {
        "avatars": score(bench.drawings(120, 0)),
        "characters": score(bench.drawings(0, 120)),
        "spoilt": score(bench.drawings(60, 60), spoilt),
    }
    if unseen:
        rng = Random(f"{SEED}/unseen")
        figures["unseen style"] = score(
            [Drawn(*random_avatar(line, rng), [background(rng)]) for line in read(unseen)[:120]]
        )
    return figures


# Fields of a Look and what of a caption belongs to them.
PARTS = {
    "hair": lambda look: replace(EMPTY, hair=look.hair),
    "hat": lambda look: replace(EMPTY, hat=look.hat),
    "glasses": lambda look: replace(EMPTY, glasses=look.glasses),
    "facial hair": lambda look: replace(EMPTY, facial_hair=look.facial_hair),
    "eyes": lambda look: replace(EMPTY, eyes=look.eyes, glasses=None) if look.glasses != "sun" else EMPTY,
    "mouth": lambda look: replace(EMPTY, mouth=look.mouth),
    "shirt": lambda look: replace(EMPTY, shirt=look.shirt),
    "mark": lambda look: replace(EMPTY, mark=look.mark),
    "hands": lambda look: replace(EMPTY, hands=look.hands),
}
EMPTY = Look("", mouth=None)


def compare(said: list[str], drawn: Drawn, right: dict[str, list[bool]]) -> None:
    """Add to `right` what a caption's phrases say truly of a drawing; glasses also where there are none."""
    look, ground = drawn.look, drawn.backgrounds[0][0]
    whole = full_caption(look, ground).split(", ")
    subject, _, where = said[0].rpartition(" with a")
    right["subject"].append(subject == whole[0].rpartition(" with a")[0])
    right["background"].append(where.removeprefix("n ").strip() == f"{ground} background")
    right["exact"].append(said == whole)
    right["wears glasses or not"].append(any("glasses" in phrase for phrase in said) == bool(look.glasses))
    if look.hair:
        right["hair's colour"].append(any(f" {look.hair[1]}" in phrase for phrase in said[1:]))
    for name, part in PARTS.items():
        for phrase in phrases(part(look)):
            right[name].append(phrase in said)


# ---- The judge of identity


@torch.inference_mode()
def clip(bench: Bench, size: int = 256) -> dict:
    """Which of 256 captions a picture has; a caption against one with a single lie; which picture shows one subject."""
    model = CLIPModel.from_pretrained(bench.bundle / "tiny-clip", dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(bench.bundle / "tiny-clip")
    rng = Random(f"{SEED}/clip")

    def see(images: list[Image.Image]) -> Tensor:
        features = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
        return torch.nn.functional.normalize(features, dim=-1)

    def understand(texts: list[str]) -> Tensor:
        tokens = processor(text=texts, return_tensors="pt", padding="max_length", truncation=True)
        return torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)

    drawings = bench.drawings(size // 2, size - size // 2)
    told = [(drawn.look, drawn.backgrounds[0][0]) for drawn in drawings]
    pictures, texts = see([image_of(drawn) for drawn in drawings]), understand([full_caption(*each) for each in told])
    lies = understand([full_caption(*altered(*each, rng)) for each in told])
    taught = {name: see(lesson(bench, character)) for name, character in HELD_OUT.items()}
    own = torch.arange(len(drawings))
    return {
        "picture to text, first of 256": round(((pictures @ texts.T).argmax(1) == own).float().mean().item(), 3),
        "text to picture, first of 256": round(((texts @ pictures.T).argmax(1) == own).float().mean().item(), 3),
        "truth before a lie in one attribute": round(((pictures * (texts - lies)).sum(1) > 0).float().mean().item(), 3),
        "subject, nearest other picture": subject_retrieval(see),
        "cosine within a held-out character": {
            n: round((f @ f.T).fill_diagonal_(0).sum().item() / 552, 3) for n, f in taught.items()
        },
        "cosine of other pictures to the nearest tofu": round((pictures @ taught["tofu"].T).amax(1).mean().item(), 3),
    }


def subject_retrieval(see: Callable, kinds: int = 60) -> float:
    """Of two pictures each of so many characters, dressed and set differently: is the twin the nearest of all?"""
    rng = Random(f"{SEED}/subjects")
    pairs: dict[str, list[Image.Image]] = defaultdict(list)
    while sum(len(images) >= 2 for images in pairs.values()) < kinds:
        svg, look = random_character(rng)
        if not look.subject.endswith("blob"):
            pairs[look.subject].append(picture(svg, background(rng)[1]))
    twins = [images[:2] for images in pairs.values() if len(images) >= 2]
    features = see([image for pair in twins for image in pair])
    nearest = (features @ features.T).fill_diagonal_(-1).argmax(1)
    return round((nearest == torch.arange(len(features)).bitwise_xor(1)).float().mean().item(), 3)


def lesson(bench: Bench, character: HeldOut) -> list[Image.Image]:
    folder = bench.out / "lessons" / character.trigger
    if not folder.is_dir():
        write(character, folder)
    return [Image.open(file) for file in sorted(folder.glob("*.png"))]


# ---- Learning


def lora(bench: Bench, looks: int = 12) -> dict:
    """Three characters that the base has never seen, rank 16, 300 steps: identity, and what the judge reads.

    The looks asked for are random, on backgrounds other than the one in the training pictures."""
    figures = {}
    for name, character in HELD_OUT.items():
        lesson(bench, character)
        folder = bench.out / "lora" / name
        config = bench.config(
            "stage=train",
            f"dataset.root={bench.out / 'lessons' / character.trigger}",
            f"trigger={character.trigger}",
            "stage.validate_every=0",
            f"name={bench.out.name}_{name}",
        )
        result = train(config, folder)
        rng = Random(f"{SEED}/{name}")
        asked = []
        for _ in range(looks):
            # Clothes would hide what is the octopus's own.
            look = replace(
                random_look("", "white", rng), subject=character.trigger, shirt=None, mark=None, cheeks=False
            )
            asked.append((look, rng.choice([ground for ground in BACKGROUNDS if ground != character.background])))
        requests = [
            Request(full_caption(look, ground, f"A {character.trigger}"), seed, SIZE)
            for look, ground in asked
            for seed in range(2)
        ]
        pipe = load_base(config.model, pick_device("auto"))
        before = list(generate(pipe, requests[::2], config.sampler))
        with worn(pipe, Path(result.lora)):
            images = list(generate(pipe, requests, config.sampler))
        bench.sheet(f"lora-{name}", [*lesson(bench, character)[:looks], *before, *images[::2], *images[1::2]], looks)
        read_as = [judge.read(image, asked[i // 2][0], character) for i, image in enumerate(images)]
        right = tally(judge.correct(r, *asked[i // 2], character) for i, r in enumerate(read_as))
        silhouettes = [judge.silhouette(image) for image in images]
        same = [(a & b).sum() / (a | b).sum() for a, b in zip(silhouettes[::2], silhouettes[1::2], strict=True)]
        figures[name] = {
            "identity before": round(result.identity_before, 3),
            "identity": round(result.identity, 3),
            "seeds": round(1 - mean(map(float, same)), 3),
            **right,
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tiny_base.evaluate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("bundle", type=Path, help="folder with tiny-sdxl, tiny-blip and tiny-clip")
    parser.add_argument("out", type=Path, help="folder for figures.json and pictures")
    parser.add_argument("--avatars", type=Path, required=True, help="fresh avatars of the styles in the data")
    parser.add_argument("--unseen", type=Path, help="avatars of a style that is not in the data")
    parser.add_argument("--against", type=Path, help="an older tiny-sdxl to draw beside")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=PARTS_OF_EVALUATION, default=PARTS_OF_EVALUATION)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.bundle.resolve(), asked.out.resolve(), asked.avatars, asked.prompts)
    parts = {
        "vae": vae,
        "captions": lambda bench: captions(bench, asked.unseen),
        "clip": clip,
        "prompts": prompts,
        "look": lambda bench: look(bench, asked.against),
        "lora": lora,
    }
    file = asked.out / "figures.json"
    for name in asked.only:
        figures = json.loads(file.read_text()) if file.is_file() else {}
        figures[name] = parts[name](bench)
        file.write_text(json.dumps(figures, indent=2) + "\n")
        print(name, json.dumps(figures[name], indent=2), flush=True)


PARTS_OF_EVALUATION = ("vae", "captions", "clip", "prompts", "look", "lora")

if __name__ == "__main__":
    main()
