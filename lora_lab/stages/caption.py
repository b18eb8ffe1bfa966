"""stage=caption: write captions for the images of a folder. A caption that a person wrote is never overwritten."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_lab.base.load import pick_device
from lora_lab.base.locate import locate_folder, writable_folder
from lora_lab.captions.captioner import (
    Captioner,
    Settings,
    captioner_name,
    certain_captions,
    check_captioner,
    images_per_call,
    left_out_line,
    load_captioner,
    min_confidence,
)
from lora_lab.captions.files import PROPOSED, read_captions, refuse_links
from lora_lab.captions.history import CaptionUpdate, machine_made
from lora_lab.captions.refiner import read_hints
from lora_lab.console import bar, say
from lora_lab.errors import InputError
from lora_lab.images.dataset import list_names, say_unused
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
    left_out: dict[str, list[str]]  # image name -> phrases of which the captioner was not certain enough


def caption(config: Config, folder: Path) -> CaptionResult:
    """Caption the images of dataset.root that `stage.mode` selects; each batch is written before the next one.

    Raises InputError, before the captioner is loaded, for an unreadable image, a folder that cannot be written to, and
    wrong settings of the captioner; later, if the caption files cannot be read any more."""
    settings, mode, follow_links = config.captioner, config.stage.mode, config.dataset.follow_links
    root = locate_folder("dataset.root", config.dataset.folder)
    paths, captions = find_pictures(root, follow_links=follow_links), read_captions(root, follow_links)
    say_unused([root], follow_links)
    names = select_images(paths, captions, machine_made(root), mode)
    if not names:
        say(f"all {len(paths)} pictures of {root} have a caption, which stage.mode={mode} does not change")
        return CaptionResult("caption", {}, len(paths), None, {})
    writable_folder("dataset.root", config.dataset.folder)
    refuse_links(root)
    check_captioner(settings)
    for name in names:
        open_picture(paths[name])
    author, device = captioner_name(settings), pick_device(config.device)
    say(f"captioning {len(names)} pictures with {author} on {device}")
    captioner, hints = load_captioner(settings, device), read_hints(root, follow_links)
    if hasattr(captioner, "estimate"):
        say(captioner.estimate(open_picture(paths[name]) for name in names))
    left_out: dict[str, list[str]] = {}
    batches = _captions({n: paths[n] for n in names}, captioner, settings, hints, left_out)
    if mode == "propose":
        written, new_captions = propose(root, batches)
    else:
        written, new_captions = _write(root, CaptionUpdate(root, author, captions, follow_links), batches, left_out)
    say(f"captioned {len(new_captions)} of {len(paths)} pictures with {author}, written to {written}")
    if without := [name for name in names if name not in new_captions]:
        say(f"{list_names(without)}: no new caption; the same command tries again")
    if hasattr(captioner, "cost") and (cost := captioner.cost()):
        say(cost)
    left_out = {name: phrases for name, phrases in left_out.items() if name in new_captions}
    if line := left_out_line([*left_out.values()], min_confidence(settings)):
        say(line)
    return CaptionResult("caption", new_captions, len(paths) - len(new_captions), str(written), left_out)


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


def propose(root: Path, batches: Iterable[Mapping[str, str]]) -> tuple[Path, dict[str, str]]:
    """Write the captions to metadata.proposed.jsonl, which no stage reads, as they come; returns its path and them."""
    path, captions = root / PROPOSED, {}
    for batch in batches:
        captions |= batch
        rows = (json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items())
        write_text(path, "".join(row + "\n" for row in rows))
    return path, captions


def _write(
    root: Path, update: CaptionUpdate, batches: Iterable[Mapping[str, str]], left_out: Mapping[str, list[str]]
) -> tuple[Path, dict[str, str]]:
    """Write the captions into the folder's caption file as they come; returns its path and those that were written."""
    captions = {}
    for batch in batches:
        try:
            captions |= update.add(batch, left_out)
        except InputError as error:  # somebody has just damaged the file; what was captioned must not be lost
            path, _ = propose(root, [captions | batch])
            raise InputError(f"{error}; until then the new captions are in {path}") from error
    return next(iter(update.files), root), captions


def _captions(
    paths: dict[str, Path],
    captioner: Captioner,
    settings: Settings,
    hints: Mapping[str, str],
    left_out: dict[str, list[str]],
) -> Iterator[dict[str, str]]:
    """Yield the captions of captioner.batch_size image files at a time, by name; what each leaves out is put into
    `left_out` before. An image without a caption is passed over."""
    names, batch_size = list(paths), images_per_call(settings)
    with bar(total=len(names), desc="caption", unit="picture") as progress:
        for start in range(0, len(names), batch_size):
            batch = names[start : start + batch_size]
            images = [open_picture(paths[name]) for name in batch]
            own_hints = [hints.get(name, "") for name in batch]
            certain = certain_captions(captioner, images, min_confidence(settings), own_hints)
            left_out |= {name: [*phrases] for name, (_, phrases) in zip(batch, certain, strict=True) if phrases}
            yield {name: text for name, (text, _) in zip(batch, certain, strict=True) if text.strip()}
            progress.update(len(batch))
