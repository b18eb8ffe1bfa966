"""The front page's second picture: one photo, drawn as several characters.

python -m experiments.tiny_base.front_picture OUT.png PHOTO NAME=LORA=FOLDER...

NAME is a character of recipes.py, FOLDER has its training images, of which the first is shown above what stage.auto
chooses for the photo. Runs that are beside OUT.png already are continued."""

import argparse
import json
from pathlib import Path

from PIL import Image

from experiments.tiny_base.recipes import CHARACTERS
from lora_lab.images.pixels import open_picture
from lora_lab.images.scan import pictures
from lora_lab.images.sheet import contact_sheet
from lora_lab.launch.config import compose
from lora_lab.stages.img2img import img2img


def drawn(photo: str, name: str, lora: str, references: str, folder: Path) -> Image.Image:
    """The photo as the character."""
    config = compose(
        *("stage=img2img", "tracker=off", "device=cpu", "dataset=folder", "refiner=avatars", f"stage.photo={photo}"),
        *(f"lora={lora}", f"dataset.root={references}", f"trigger={CHARACTERS[name].trigger}"),
        f"resume={folder}" if folder.is_dir() else "resume=null",
    )
    img2img(config, folder)
    (line,) = map(json.loads, (folder / "prompts.jsonl").read_text().splitlines())
    return open_picture(Path(line["picture"]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.tiny_base.front_picture", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("photo")
    parser.add_argument("characters", nargs="+", help="NAME=LORA=FOLDER")
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    taught, made = [None], [open_picture(Path(asked.photo))]
    for text in asked.characters:
        name, lora, references = text.split("=")
        taught.append(open_picture(next(iter(pictures(Path(references)).values()))))
        made.append(drawn(asked.photo, name, lora, references, asked.out.parent / f"{asked.out.stem}-{name}"))
    contact_sheet([taught, made], [""] * len(made), ["taught", "photo, and the photo as each"], cell=192).save(
        asked.out
    )


if __name__ == "__main__":
    main()
