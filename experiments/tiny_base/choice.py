"""How well the judge of resemblance chooses: its numbers beside what judge/ reads, which it does not know.

python -m experiments.tiny_base.choice OUT NAME=LORA=FOLDER... [--seeds 0 1] [--words stage.budget=6]

draws the demo's eight photos with each LoRA of a character (tofu, mug, octopus, robot, lighthouse) whose training
images are in FOLDER, once at weight 1 and the usual strength and once as stage.auto chooses. For each it prints how
many of the usual and of the chosen pictures show the character's body, colour and own mark, what they keep of the
photo, what the best draft of each photo could give, and how the judge ranks the drafts of a photo beside the reading
(Spearman, mean over photos)."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from PIL import Image
from scipy.stats import spearmanr

from experiments.tiny_base.photos import Likeness, Photo, likeness, photos
from experiments.tiny_base.recipes import CHARACTERS
from lora_lab import demo
from lora_lab.launch.config import compose
from lora_lab.stages.img2img import img2img


def draw(lora: str, references: str, name: str, folder: Path, *words: str) -> list[dict]:
    """The lines of prompts.jsonl of the eight photos; a run that is there already is continued."""
    config = compose(
        *("stage=img2img", "tracker=off", "device=cpu", "dataset=folder", "refiner=avatars"),
        *(f"lora={lora}", f"dataset.root={references}", f"trigger={CHARACTERS[name].trigger}"),
        *(f"stage.photo={demo.PHOTOS}", f"resume={folder}" if folder.is_dir() else "resume=null", *words),
    )
    img2img(config, folder)
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


def read(line: dict, shown: dict[str, Photo], name: str, photo: str) -> Likeness:
    """What judge/ reads of a picture or draft of the file `photo`."""
    return likeness(Image.open(line["picture"]).convert("RGB"), shown[Path(photo).name], CHARACTERS[name])


def summary(read_pictures: Sequence[Likeness]) -> dict:
    """Means of the reading, and the geometric mean of character and kept of each picture."""
    return {
        "body": sum(each.kind for each in read_pictures),
        "colour": sum(each.colour for each in read_pictures),
        "own": sum(each.own for each in read_pictures),
        "character": round(mean(each.character for each in read_pictures), 3),
        "kept": round(mean(each.share for each in read_pictures), 3),
        "both": round(mean(both(each) for each in read_pictures), 3),
    }


def both(each: Likeness) -> float:
    return (each.character * each.share) ** 0.5


def agreement(lines: Sequence[dict], drafts: Sequence[Sequence[Likeness]]) -> dict:
    """Spearman's correlation of the judge's numbers and the reading over the drafts of each photo, where both vary."""
    readings = {"character": lambda each: each.character, "kept": lambda each: each.share, "resemblance": both}
    found = {}
    for measure, reading in readings.items():
        values = []
        for line, likenesses in zip(lines, drafts, strict=True):
            pairs = [(d["scores"][measure], reading(each)) for d, each in zip(line["drafts"], likenesses, strict=True)]
            if all(len({*side}) > 1 for side in zip(*pairs, strict=True)):
                values.append(spearmanr(pairs).statistic)
        found[measure] = [round(mean(values), 2), len(values)] if values else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.tiny_base.choice", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("loras", nargs="+", help="NAME=LORA=FOLDER of its training images")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--words", nargs="+", default=[], help="settings of the choice, or of what takes its place")
    asked = parser.parse_args()
    shown = {photo.file: photo for photo in photos()}
    for text in asked.loras:
        name, lora, references = text.split("=")
        seeds, place = f"stage.seeds={asked.seeds}".replace(" ", ""), asked.out / f"{name}-{Path(lora).stem}"
        asked.out.mkdir(parents=True, exist_ok=True)
        usual = draw(lora, references, name, Path(f"{place}-usual"), seeds, "stage.lora_weight=1")
        chosen = draw(lora, references, name, Path("-".join([f"{place}-auto", *asked.words])), seeds, *asked.words)
        figures = {
            "name": name,
            "usual": summary([read(line, shown, name, line["photo"]) for line in usual]),
            "chosen": summary([read(line, shown, name, line["photo"]) for line in chosen]),
            "variants": [[line["lora_weight"], line["strength"]] for line in chosen],
        }
        if all(line["drafts"] for line in chosen):
            drafts = [[read(draft, shown, name, line["photo"]) for draft in line["drafts"]] for line in chosen]
            figures["best drafts"] = summary([max(each, key=both) for each in drafts])
            figures["agreement"] = agreement(chosen, drafts)
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
