"""stage=caption: write captions for the images of a folder. A caption that a person wrote is never overwritten."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_lab.base.load import pick_device
from lora_lab.base.locate import locate_folder, writable_folder
from lora_lab.captions.captioner import (
    Captioner,
    captioner_name,
    check_captioner,
    images_per_call,
    load_captioner,
    run_captioner,
)
from lora_lab.captions.files import read_captions, write_captions
from lora_lab.captions.history import machine_made, record
from lora_lab.console import bar, say
from lora_lab.images.pixels import open_picture
from lora_lab.images.scan import find_pictures
from lora_lab.runs import write_text
from lora_lab.settings.schema import Config


@dataclass(frozen=True)
class CaptionResult:
    stage: str
    captions: dict[str, str]  # image name -> new caption
    kept: int  # number of images whose caption was not changed
    written: str | None  # the file with the new captions


def caption(config: Config, folder: Path) -> CaptionResult:
    """Caption the images of dataset.root that `stage.mode` selects.

    Raises InputError, before the captioner is loaded, for an unreadable image, a folder that cannot be written to, and
    wrong settings of the captioner."""
    settings, mode = config.captioner, config.stage.mode
    root = locate_folder("dataset.root", config.dataset.folder)
    paths, captions = find_pictures(root), read_captions(root)
    names = select_images(paths, captions, machine_made(root), mode)
    if not names:
        say(f"all {len(paths)} pictures of {root} have a caption, which stage.mode={mode} does not change")
        return CaptionResult("caption", {}, len(paths), None)
    writable_folder("dataset.root", config.dataset.folder)
    check_captioner(settings)
    for name in names:
        open_picture(paths[name])
    author, device = captioner_name(settings), pick_device(config.device)
    say(f"captioning {len(names)} pictures with {author} on {device}")
    captioner = load_captioner(settings, device)
    new_captions: dict[str, str] = {}
    written: Path | None = None
    try:
        for name, text in _captions({n: paths[n] for n in names}, captioner, images_per_call(settings)):
            new_captions[name] = text
    finally:  # after Ctrl-C or an error too: finished captions are kept
        if new_captions and mode == "propose":
            written = propose(root, new_captions)
        elif new_captions:
            record(root, author, captions, new_captions)
            written = write_captions(root, captions | new_captions)[0]
    say(f"captioned {len(new_captions)} of {len(paths)} pictures with {author}, written to {written}")
    return CaptionResult("caption", new_captions, len(paths) - len(new_captions), str(written))


def select_images(
    names: Collection[str], captions: Mapping[str, str], machine_captions: Mapping[str, set[str]], mode: str
) -> list[str]:
    """The names that `stage.mode` selects: missing, replace or propose. `machine_captions` is from history."""
    if mode == "propose":
        return list(names)
    missing = {name for name in names if not captions.get(name)}
    if mode == "replace":
        missing |= {name for name in names if captions.get(name) in machine_captions.get(name, ())}
    return [name for name in names if name in missing]


def propose(root: Path, captions: dict[str, str]) -> Path:
    """Write the captions to metadata.proposed.jsonl, which no stage reads, for comparison; returns its path."""
    rows = (json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items())
    return write_text(root / "metadata.proposed.jsonl", "".join(row + "\n" for row in rows))


def _captions(paths: dict[str, Path], captioner: Captioner, batch_size: int) -> Iterator[tuple[str, str]]:
    """Yield (name, caption) for each image file, captioned `batch_size` at a time."""
    names = list(paths)
    with bar(total=len(names), desc="caption", unit="picture") as progress:
        for start in range(0, len(names), batch_size):
            batch = names[start : start + batch_size]
            yield from zip(batch, run_captioner(captioner, [open_picture(paths[name]) for name in batch]), strict=True)
            progress.update(len(batch))
