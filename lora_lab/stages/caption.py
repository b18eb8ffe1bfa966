"""Caption the pictures of a folder. What a person wrote is never overwritten."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_lab.base.load import pick_device
from lora_lab.base.locate import locate_folder, locate_model, writable_folder
from lora_lab.captions.captioner import load_captioner
from lora_lab.captions.files import read_captions, write_captions
from lora_lab.captions.history import machine_made, record
from lora_lab.console import bar, say
from lora_lab.images.pixels import open_picture
from lora_lab.images.scan import find_pictures
from lora_lab.runs import write_text
from lora_lab.settings.schema import Captioner, Config


@dataclass(frozen=True)
class CaptionResult:
    stage: str
    captions: dict[str, str]  # what the captioner said, by picture
    kept: int  # pictures whose caption was left alone
    written: str | None  # the file that has them now


def caption(config: Config, folder: Path) -> CaptionResult:
    """Caption what `stage.mode` asks for in dataset.root. Raises InputError before the captioner is loaded."""
    mode = config.stage.mode
    root = locate_folder("dataset.root", config.dataset.folder)
    pictures, captions = find_pictures(root), read_captions(root)
    made = machine_made(root)
    wanted = {
        "missing": [name for name in pictures if not captions.get(name)],
        "replace": [name for name in pictures if not captions.get(name) or captions[name] in made.get(name, ())],
        "propose": list(pictures),
    }[mode]
    if not wanted:
        say(f"all {len(pictures)} pictures of {root} have a caption that stage.mode={mode} leaves alone")
        return CaptionResult("caption", {}, len(pictures), None)
    writable_folder("dataset.root", config.dataset.folder)
    new: dict[str, str] = {}
    written: Path | None = None
    try:
        for name, text in caption_pictures({name: pictures[name] for name in wanted}, config.captioner, config.device):
            new[name] = text
    finally:  # Ctrl-C or a broken picture: what was captioned so far is kept
        if new and mode == "propose":
            written = propose(root, new)
        elif new:
            record(root, config.captioner.name, captions, new)
            written = write_captions(root, captions | new)[0]
    say(f"captioned {len(new)} of {len(pictures)} pictures with {config.captioner.name}, written to {written}")
    return CaptionResult("caption", new, len(pictures) - len(new), str(written))


def propose(root: Path, captions: dict[str, str]) -> Path:
    """Write the captions beside the real ones, to be looked at: metadata.proposed.jsonl, which nothing reads."""
    rows = (json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items())
    return write_text(root / "metadata.proposed.jsonl", "".join(row + "\n" for row in rows))


def caption_pictures(pictures: dict[str, Path], settings: Captioner, device: str) -> Iterator[tuple[str, str]]:
    """Yield (name, caption) for each file, in batches. Every picture is opened before BLIP loads."""
    names = list(pictures)
    for name in names:
        open_picture(pictures[name])
    base = locate_model("captioner.base", settings.base)
    where = str(pick_device(device))
    say(f"captioning {len(names)} pictures with {settings.base} on {where}")
    captioner = load_captioner(
        base, where, prompt=settings.prompt, max_tokens=settings.max_tokens, beams=settings.beams,
        batch_size=settings.batch_size,
    )  # fmt: skip
    with bar(total=len(names), desc="caption", unit="picture") as shown:
        for start in range(0, len(names), settings.batch_size):
            batch = names[start : start + settings.batch_size]
            yield from zip(batch, captioner.caption([open_picture(pictures[name]) for name in batch]), strict=True)
            shown.update(len(batch))
