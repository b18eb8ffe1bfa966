"""What the documented commands make of characters that the defaults were not tuned for.

python -m experiments.tiny_base.newcomers OUT robot octopus lighthouse [--seeds 0] [--words stage.budget=6]

draws a character's pictures into OUT/data, without captions, and runs what a user would: stage=caption, stage=refine,
stage=train and stage=img2img with the demo's eight photos, with the defaults (and with --words in the last one). It
prints what judge/ reads of the pictures, and lays them below their photos in OUT/sheets. Runs that are there are not
made again."""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from experiments.tiny_base.lessons import write
from experiments.tiny_base.photos import photos
from experiments.tiny_base.recipes import CHARACTERS, figures, write_robot
from lora_lab import demo

SIZE = 192


def command(run: Path, root: Path, *words: str) -> None:
    """One command, in a folder of its own that is not there yet."""
    if not (run / "result.json").is_file():
        fixed = (f"dataset.root={root}", f"hydra.run.dir={run}", f"cache={run.parent / 'cache'}", "tracker=off")
        subprocess.run([sys.executable, "-m", "lora_lab", *words, *fixed], check=True)


def drawn(out: Path, name: str, seed: int, words: Sequence[str]) -> list[dict]:
    """The lines of prompts.jsonl of the eight photos."""
    root, runs, character = out / "data" / name, out / "runs", CHARACTERS[name]
    if not root.is_dir():
        if name == "robot":
            write_robot(root)
        else:
            write(character, root)
        (root / "metadata.jsonl").unlink()  # with the true captions, which nobody has
    trigger, lora = f"trigger={character.trigger}", runs / f"{name}-train-{seed}"
    command(runs / f"{name}-caption", root, "stage=caption")
    command(runs / f"{name}-refine", root, "stage=refine", trigger)
    quick = ("stage.prompts=[]", "stage.validate_every=0", "model.judge=null")  # neither changes the LoRA
    command(lora, root, "stage=train", trigger, f"seed={seed}", "publish=false", *quick)
    pictures = runs / "-".join([name, "photos", str(seed), *words])
    command(pictures, root, "stage=img2img", trigger, f"lora={lora}", f"stage.photo={demo.PHOTOS}", *words)
    return [json.loads(line) for line in (pictures / "prompts.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.tiny_base.newcomers", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("characters", nargs="+", choices=CHARACTERS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the trainings")
    parser.add_argument("--words", nargs="+", default=[], help="settings of stage=img2img")
    asked = parser.parse_args()
    out, shown = asked.out.resolve(), photos()
    (out / "sheets").mkdir(parents=True, exist_ok=True)
    for name, seed in ((name, seed) for name in asked.characters for seed in asked.seeds):
        lines = drawn(out, name, seed, asked.words)
        images = [Image.open(line["picture"]).convert("RGB") for line in lines]
        sheet = Image.new("RGB", (SIZE * len(lines), 2 * SIZE))
        for i, (line, image) in enumerate(zip(lines, images, strict=True)):
            sheet.paste(Image.open(line["photo"]).convert("RGB").resize((SIZE, SIZE)), (i * SIZE, 0))
            sheet.paste(image.resize((SIZE, SIZE)), (i * SIZE, SIZE))
        sheet.save(out / "sheets" / f"{'-'.join([name, str(seed), *asked.words])}.png")
        print(json.dumps({"name": name, "seed": seed, **figures(images, shown, CHARACTERS[name])}), flush=True)


if __name__ == "__main__":
    main()
