"""Measure a bundle on fresh pictures and prompts.

python -m experiments.tiny_base.evaluation BUNDLE OUT --avatars FILE [--unseen FILE] [--against OLD] [--only vae ...]

FILE holds avatars of another seed than the training's, by dicebear/draw.mjs; --unseen ones in a style that was not in
the data; --against is an older tiny-sdxl to draw the same prompts and seeds. OUT gets figures.json, which later runs
add to, and pictures to look at.
"""

import argparse
import json
from pathlib import Path

from experiments.tiny_base.evaluation.autoencoder import vae
from experiments.tiny_base.evaluation.bench import Bench
from experiments.tiny_base.evaluation.captions import captions
from experiments.tiny_base.evaluation.identity import clip
from experiments.tiny_base.evaluation.learning import lora, sweep
from experiments.tiny_base.evaluation.prompts import look, prompts

PARTS = ("vae", "captions", "clip", "prompts", "look", "lora", "sweep")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tiny_base.evaluation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("bundle", type=Path, help="folder with tiny-sdxl, tiny-blip and tiny-clip")
    parser.add_argument("out", type=Path, help="folder for figures.json and pictures")
    parser.add_argument("--avatars", type=Path, required=True, help="fresh avatars of the styles in the data")
    parser.add_argument("--unseen", type=Path, help="avatars of a style that is not in the data")
    parser.add_argument("--against", type=Path, help="an older tiny-sdxl to draw beside")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
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
        "sweep": sweep,
    }
    file = asked.out / "figures.json"
    for name in asked.only:
        figures = json.loads(file.read_text()) if file.is_file() else {}
        figures[name] = parts[name](bench)
        file.write_text(json.dumps(figures, indent=2) + "\n")
        print(name, json.dumps(figures[name], indent=2), flush=True)


if __name__ == "__main__":
    main()
