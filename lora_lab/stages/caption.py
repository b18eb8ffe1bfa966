"""stage=caption: write captions for the images of a folder. A caption that a person wrote is never overwritten."""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from lora_lab.captions.proposals import Proposals, read_proposals
from lora_lab.console import bar, say
from lora_lab.errors import InputError
from lora_lab.images.dataset import list_names, say_unused
from lora_lab.images.pixels import open_picture
from lora_lab.images.scan import find_pictures
from lora_lab.runs import display_path, sweep_of
from lora_lab.settings.schema import Config

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CaptionResult:
    stage: str
    captions: dict[str, str]  # image name -> new caption; with stage.mode=propose those of every image
    kept: int  # number of images whose caption was not changed
    written: str | None  # the file with the new captions
    left_out: dict[str, list[str]]  # image name -> phrases of which the captioner was not certain enough
    pictures_per_second: float | None = None  # without the loading of the captioner; None if nothing was captioned


def caption(config: Config, folder: Path) -> CaptionResult:
    """Caption the images of dataset.root that `stage.mode` selects; each batch is written before the next one.

    The jobs of a sweep propose captions in their own `folder`. Raises InputError, before the captioner is loaded, for
    an unreadable image, a folder that cannot be written to, and wrong settings of the captioner; later, if the caption
    files cannot be read any more."""
    settings, mode, follow_links = config.captioner, config.stage.mode, config.dataset.follow_links
    root = locate_folder("dataset.root", config.dataset.folder)
    paths, captions = find_pictures(root, follow_links=follow_links), read_captions(root, follow_links)
    say_unused([root], follow_links)
    names = select_images(paths, captions, machine_made(root), mode)
    if not names:
        say(f"all {len(paths)} pictures of {root} have a caption, which stage.mode={mode} does not change")
        return CaptionResult("caption", {}, len(paths), None, {})
    target = folder if mode == "propose" and sweep_of(folder) else root
    if target is root:
        writable_folder("dataset.root", config.dataset.folder)
        refuse_links(root)
    check_captioner(settings)
    for name in names:
        open_picture(paths[name])
    update, proposes = CaptionUpdate(root, captioner_name(settings), captions, follow_links), mode == "propose"
    if proposes:
        update = read_proposals(target / PROPOSED, paths, settings)
        names = [name for name in names if name not in update.rows]
    new, left_out, rate = _caption({n: paths[n] for n in names}, settings, pick_device(config.device), update, root)
    captions = update.captions if proposes else new
    left_out = update.left_out if proposes else {name: left_out[name] for name in new if name in left_out}
    if line := left_out_line([*left_out.values()], min_confidence(settings)):
        say(line)
    if empty := [name for name, text in captions.items() if not text]:
        say(f"{list_names(empty)}: the captioner found nothing to write, so there is still no caption")
    written = next(iter(update.files), root)
    return CaptionResult("caption", captions, len(paths) - len(captions), str(written), left_out, rate)


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


def _caption(
    paths: Mapping[str, Path], settings: Settings, device: "torch.device", update: CaptionUpdate | Proposals, root: Path
) -> tuple[dict[str, str], dict[str, list[str]], float | None]:
    """Caption these images of `root` and write their captions as they come.

    Returns those that were written, what each leaves out, and the images per second, without loading the captioner."""
    author, captions, left_out = captioner_name(settings), {}, {}
    if known := len(update.captions) if isinstance(update, Proposals) else 0:
        say(f"{known} captions by the same settings are in {display_path(update.file)} already")
    if not paths:
        return captions, left_out, None
    say(f"captioning {len(paths)} pictures with {author} on {device}")
    captioner, start = load_captioner(settings, device), time.perf_counter()
    for batch in _batches(paths, captioner, settings, left_out):
        try:
            captions |= update.add(batch, left_out)
        except InputError as error:  # somebody has just damaged the file; what was captioned must not be lost
            captions |= batch
            kept = Proposals(root / PROPOSED, dict.fromkeys(captions, ""))
            kept.add(captions, left_out)
            raise InputError(f"{error}; until then the new captions are in {kept.file}") from error
    rate = len(paths) / (time.perf_counter() - start)
    written = next(iter(update.files), root)
    say(f"captioned {len(captions)} of {len(paths)} pictures with {author}, {rate:.2f} a second, written to {written}")
    return captions, left_out, rate


def _batches(
    paths: Mapping[str, Path], captioner: Captioner, settings: Settings, left_out: dict[str, list[str]]
) -> Iterator[dict[str, str]]:
    """Yield the captions of captioner.batch_size image files at a time, by name; what each leaves out is put into
    `left_out` before."""
    names, batch_size = list(paths), images_per_call(settings)
    with bar(total=len(names), desc="caption", unit="picture") as progress:
        for start in range(0, len(names), batch_size):
            batch = names[start : start + batch_size]
            images = [open_picture(paths[name]) for name in batch]
            certain = certain_captions(captioner, images, min_confidence(settings))
            left_out |= {name: [*phrases] for name, (_, phrases) in zip(batch, certain, strict=True) if phrases}
            yield {name: text for name, (text, _) in zip(batch, certain, strict=True)}
            progress.update(len(batch))
