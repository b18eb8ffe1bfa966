"""How well `resemblance` agrees with the eye, which ranks sheets of pictures without knowing what they are.

python -m experiments.tiny_base.blind OUT robot octopus

takes the sheets that recipes.py drew into OUT/sheets. Where a character has no OUT/blind/NAME.txt yet, it writes
OUT/blind/NAME.png, the photos and below them the character's sheets in random order, each with a letter. Write the
letters into NAME.txt, the best sheet first, a line for each rank and sheets of one rank in one line. Then the same
command scores the sheets as stage=img2img does, and prints Spearman's correlation with the ranks."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import mean
from string import ascii_lowercase, ascii_uppercase

import torch
from PIL import Image, ImageDraw
from scipy.stats import spearmanr

from experiments.tiny_base.recipes import CHARACTERS, SIDE, Bench
from lora_lab.adapters.inject import lora_attached
from lora_lab.evaluation.resemblance import DrawnImage, Resemblance, ResemblanceJudge
from lora_lab.images.pixels import fit, nearest_bucket, open_picture
from lora_lab.sampling.generate import photo_to_request

LETTERS = ascii_uppercase + ascii_lowercase
MEASURES = ("resemblance", "character", "kept")


def shuffled(out: Path, name: str) -> dict[str, Path]:
    """The character's sheets by the letters that stand for them."""
    files = sorted(file for file in (out / "sheets").glob(f"{name}-*.png") if "true_drawings" not in file.name)
    Random(name).shuffle(files)
    return dict(zip(LETTERS, files, strict=False))


def draw(sheets: dict[str, Path], photos: Sequence[Image.Image]) -> Image.Image:
    """The photos and the sheets below each other, each with its letter."""
    width = SIDE * len(photos)
    canvas = Image.new("RGB", (width + 24, SIDE * (len(sheets) + 1)), "white")
    for i, photo in enumerate(photos):
        canvas.paste(photo.resize((SIDE, SIDE)), (24 + i * SIDE, 0))
    for row, (letter, file) in enumerate(sheets.items(), start=1):
        canvas.paste(Image.open(file), (24, row * SIDE))
        ImageDraw.Draw(canvas).text((4, row * SIDE + SIDE // 2), letter, fill="black", font_size=20)
    return canvas


def ranks(text: str, letters: Sequence[str]) -> list[int]:
    """The rank of each letter in lines of letters, the best first. Raises KeyError for a letter that is missing."""
    lines = [[letter for letter in line if letter.isalpha()] for line in text.splitlines()]
    place = {letter: rank for rank, line in enumerate(line for line in lines if line) for letter in line}
    return [place[letter] for letter in letters]


def score(bench: Bench, name: str, sheets: Sequence[Path]) -> list[list[Resemblance]]:
    """The scores of every picture of each sheet, as stage=img2img gives them."""
    files = sorted(bench.lessons(name, "read").glob("*.png"))
    references = [fit(image, nearest_bucket(image.size, bench.buckets)).picture for image in map(open_picture, files)]
    trigger = CHARACTERS[name].trigger
    requests = [
        photo_to_request(*pair, bench.refiner, trigger, bench.buckets, strength=bench.strength).request
        for pair in zip(bench.pictures, bench.captions, strict=True)
    ]
    before, config = bench.draw(None, trigger, 1.0), bench.config
    found = []
    with lora_attached(bench.encoder.base, None):
        judge = ResemblanceJudge.load(
            *(config.model, config.captioner, bench.refiner, trigger, references),
            *([request.photo for request in requests], before, bench.encoder),
        )
        for file in sheets:
            sheet = Image.open(file)
            drawn = [sheet.crop((i * SIDE, 0, (i + 1) * SIDE, SIDE)) for i in range(len(requests))]
            images = [DrawnImage(image, i, requests[i].prompt) for i, image in enumerate(drawn)]
            found.append(judge.measure(images, bench.encoder)[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.tiny_base.blind", description=__doc__)
    parser.add_argument("out", type=Path, help="of recipes.py")
    parser.add_argument("characters", nargs="+", choices=CHARACTERS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(asked.out.resolve())
    (asked.out / "blind").mkdir(exist_ok=True)
    for name in asked.characters:
        sheets, place = shuffled(asked.out, name), asked.out / "blind" / name
        if not place.with_suffix(".txt").is_file():
            draw(sheets, bench.pictures).save(place.with_suffix(".png"))
            print(f"{place}.png has {len(sheets)} sheets: rank them in {place}.txt", flush=True)
            continue
        ranked = ranks(place.with_suffix(".txt").read_text(), list(sheets))
        scores = score(bench, name, [*sheets.values()])
        means = {key: [mean(getattr(each, key) for each in sheet) for sheet in scores] for key in MEASURES}
        rows = {
            file.stem: [rank, *(round(means[key][i], 3) for key in MEASURES)]
            for i, (file, rank) in enumerate(zip(sheets.values(), ranked, strict=True))
        }
        figures = {key: round(-spearmanr(ranked, values).statistic, 2) for key, values in means.items()}
        print(json.dumps({"name": name, "sheets": len(sheets), **figures, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
