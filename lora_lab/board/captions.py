"""The comparison page of captions: a row for each image, a column for each run of stage=caption, differences marked."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, FileSystemLoader

from lora_lab.board.page import GENERATOR, HERE, add_thumbnail, label, words
from lora_lab.board.read import Sweep, TrainedRun, dataset_root
from lora_lab.captions.files import PROPOSED
from lora_lab.images.scan import natural_key

WORD = re.compile(r"(\w(?:[\w'-]*\w)?)")
Parts = list[tuple[str, bool]]  # of a caption: text, and whether it is a word that no other caption of the image has


def html(sweep: Sweep, sentence: Mapping[str, str], assets: Path) -> str:
    """index.html; `sentence` by language stands at its top, thumbnails are put into the folder `assets`.

    Raises InputError for a link in the place of a folder of thumbnails."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    several = len({dataset_root(run) for run in sweep.runs}) > 1
    files = [file for images in sweep.images.values() for file in images.values()]
    folder = assets / "captioned"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        added = pool.map(lambda pair: add_thumbnail(pair[1], folder, pair[0]), enumerate(files))
        thumbnails = {file: name for file, name in zip(files, added, strict=True) if name}
    rows = []
    for root, name in _images(sweep):
        captions = [run.captions.get(name, "") if dataset_root(run) == root else "" for run in sweep.runs]
        thumbnail = thumbnails.get(sweep.images.get(root, {}).get(name))
        rows.append(
            {"name": f"{root}/{name}" if several else name, "thumbnail": thumbnail, "captions": marked(captions)}
        )
    return environment.get_template("captions.html").render(
        title=sweep.title,
        generator=GENERATOR,
        words=words(),
        sentence=sentence,
        runs=[_column(run, sweep) for run in sweep.runs],
        rows=rows,
    )


def marked(captions: Sequence[str]) -> list[Parts]:
    """The parts of each caption of an image; nothing is marked where it is the only one.

    >>> marked(["a red hat", "a hat"])
    [[('a ', False), ('red', True), (' hat', False)], [('a hat', False)]]
    """
    words_of = [{word.casefold() for word in WORD.findall(caption)} for caption in captions]
    marked_captions = []
    for i, caption in enumerate(captions):
        others = set().union(*words_of[:i], *words_of[i + 1 :])
        parts: Parts = []
        for part in filter(None, WORD.split(caption)):
            alone = bool(others) and WORD.fullmatch(part) is not None and part.casefold() not in others
            if parts and parts[-1][1] == alone:
                parts[-1] = (parts[-1][0] + part, alone)
            else:
                parts.append((part, alone))
        marked_captions.append(parts)
    return marked_captions


def _images(sweep: Sweep) -> list[tuple[str, str]]:
    """dataset.root and name of every image, in natural order."""
    names = {(root, name) for root, images in sweep.images.items() for name in images}
    names |= {(dataset_root(run), name) for run in sweep.runs for name in run.captions}
    return sorted(names, key=lambda image: (image[0], natural_key(image[1])))


def _column(run: TrainedRun, sweep: Sweep) -> dict[str, Any]:
    """What stands at the top of a run's column."""
    lengths, proposed = [len(WORD.findall(text)) for text in run.captions.values()], run.folder / PROPOSED
    use = ["stage=convert", "dataset=folder", f"dataset.root={dataset_root(run)}", f"stage.source={proposed}"]
    return {
        "label": label(run, sweep),
        "status": run.status,
        "error": run.error,
        "captions": str(len(lengths)),
        "words": f"{mean(lengths):.0f}" if lengths else "0",
        "rate": f"{run.rate:.2f}" if run.rate else None,
        "use": shlex.join(["python", "-m", "lora_lab", *use]) if proposed.is_file() else None,
    }
