"""W&B without a key, a home or a network, and what its offline runs hold, as W&B itself reads them."""

import json
import os
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
WANDB = str(Path(sysconfig.get_path("scripts")) / "wandb")


def isolated(root: Path, **more: str) -> dict[str, str]:
    """The environment of somebody whose home and temporary folder are in `root`; they work in `root`/here."""
    kept = {name: value for name, value in os.environ.items() if "WANDB" not in name and name != "NETRC"}
    folders = {"HOME": root / "home", "TMPDIR": root / "temporary"}
    for folder in (*folders.values(), root / "here"):
        folder.mkdir(parents=True, exist_ok=True)
    return kept | {name: str(path) for name, path in folders.items()} | {"PYTHONPATH": str(ROOT)} | more


def inspect(path, *options):
    """What `wandb leet inspect` shows of a run: a dict with --summary, else the list of its records."""
    command = [WANDB, "leet", "inspect", *options, "--json", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(text) if options else [json.loads(line) for line in text.splitlines()]
