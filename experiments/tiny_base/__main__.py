"""Make the bundled models, from nothing: draw, train, assemble.

python -m experiments.tiny_base WORK [--piece 540] [--dry-run] [--avatars FILE] [--bundle FOLDER] [--share 0.3]

WORK is a folder that holds everything while it is being made; the same command goes on from what stands there, so the
30 minutes may be cut into pieces. At the end WORK/bundle has tiny-sdxl, tiny-blip, tiny-clip and tiny-controlnet.
"""

import argparse
import importlib
import subprocess
import sys
import time
from pathlib import Path

from experiments.tiny_base.recipe import DRY, FULL, SEED, shared

DICEBEAR = Path(__file__).resolve().parent / "dicebear"
TRAININGS = ("vae", "unet", "blip", "clip", "controlnet")  # in this order: the UNet needs the VAE, the last both
SMALLEST = 60  # seconds: a training is not begun for less


def main() -> int:
    started = time.time()
    parser = argparse.ArgumentParser(prog="python -m experiments.tiny_base", description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder in which everything is made")
    parser.add_argument(
        "--piece", type=float, default=float("inf"), help="stop after so many seconds; run again to go on"
    )
    parser.add_argument("--dry-run", action="store_true", help="very little of everything, two minutes on a CPU")
    parser.add_argument("--avatars", type=Path, help="avatars drawn elsewhere (default: draw them here, with node)")
    parser.add_argument("--bundle", type=Path, help="a finished bundle: only what is trained on its models is trained")
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures of the recipe that are drawn")
    asked = parser.parse_args()
    recipe = shared(DRY if asked.dry_run else FULL, asked.share)
    work = asked.work
    work.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        line = f"[{time.time() - started:6.1f}] {line}"
        print(line, flush=True)
        with (work / "log.txt").open("a") as file:
            file.write(line + "\n")

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not asked.dry_run:
        parser.error("training needs a CUDA GPU; --dry-run shows the way through on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch.manual_seed(SEED)

    from experiments.tiny_base.assemble import assemble, unpack
    from experiments.tiny_base.data import Pictures, prepare

    if asked.bundle:
        unpack(asked.bundle, work)
    prepare(work / "data", recipe, asked.avatars or draw_avatars(work, recipe.avatars, log))
    pictures = Pictures(work / "data", device)
    log(f"{len(pictures.subjects)} pictures with captions, {len(pictures.pixels)} in all")
    until = started + asked.piece
    for name in TRAININGS:
        done = work / "parts" / f"{name}.done"
        if done.is_file():
            continue
        training = importlib.import_module(f"experiments.tiny_base.train_{name}")
        if until - time.time() < SMALLEST or not training.train(work, recipe, pictures, until, log):
            log(f"the piece is over; run the same command again to go on with {name}")
            return 0
        done.touch()
        if device == "cuda":
            torch.cuda.empty_cache()

    assemble(work, work / "bundle")
    log(f"done: {work / 'bundle'}")
    return 0


def draw_avatars(work: Path, count: int, log) -> Path:
    """DiceBear's avatars, by node, into work/avatars.jsonl."""
    file = work / "avatars.jsonl"
    if file.is_file():
        return file
    log("drawing avatars with DiceBear")
    try:
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=DICEBEAR, check=True)
        partial = file.with_suffix(".partial")
        scale = str(count / FULL.avatars)
        subprocess.run(["node", DICEBEAR / "draw.mjs", partial.resolve(), str(SEED), scale], cwd=DICEBEAR, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"can't draw the avatars ({error}): install node and npm, or give --avatars a file drawn elsewhere")
    partial.replace(file)
    return file


if __name__ == "__main__":
    sys.exit(main())
