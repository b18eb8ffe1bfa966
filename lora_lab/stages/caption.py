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
from lora_lab.captions.refiner import read_hints
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
    hints, proposes = read_hints(root, follow_links), mode == "propose"
    update = CaptionUpdate(root, captioner_name(settings), captions, follow_links)
    if proposes:
        update = read_proposals(target / PROPOSED, paths, hints, settings)
        names = [name for name in names if name not in update.rows]
    selected, device = {name: paths[name] for name in names}, pick_device(config.device)
    new, left_out, rate = _caption(selected, hints, settings, device, update)
    captions = update.captions if proposes else new
    left_out = update.left_out if proposes else {name: left_out[name] for name in new if name in left_out}
    if line := left_out_line([*left_out.values()], min_confidence(settings)):
        say(line)
    return CaptionResult("caption", captions, len(paths) - len(captions), str(update.place), left_out, rate)


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
    paths: Mapping[str, Path],
    hints: Mapping[str, str],
    settings: Settings,
    device: "torch.device",
    update: CaptionUpdate | Proposals,
) -> tuple[dict[str, str], dict[str, list[str]], float | None]:
    """Caption these images and write their captions as they come.

    Returns those that were written, what each leaves out, and the images per second, without loading the captioner."""
    author, captions, left_out = captioner_name(settings), {}, {}
    if known := len(update.captions) if isinstance(update, Proposals) else 0:
        say(f"{known} captions by the same settings are in {display_path(update.place)} already")
    if not paths:
        return captions, left_out, None
    say(f"captioning {len(paths)} pictures with {author} on {device}")
    captioner = load_captioner(settings, device)
    if hasattr(captioner, "estimate"):
        say(captioner.estimate(open_picture(path) for path in paths.values()))
    start = time.perf_counter()
    for batch in _batches(paths, captioner, settings, hints, left_out):
        try:
            captions |= update.add(batch, left_out)
        except InputError as error:  # somebody has just damaged the file; what was captioned must not be lost
            captions |= batch
            kept = Proposals(update.root / PROPOSED, dict.fromkeys(captions, ""))
            kept.add(captions, left_out)
            raise InputError(f"{error}; until then the new captions are in {kept.place}") from error
    rate = len(paths) / (time.perf_counter() - start)
    told = f"captioned {len(captions)} of {len(paths)} pictures with {author}, {rate:.2f} a second"
    say(f"{told}, written to {update.place}")
    if without := [name for name in paths if name not in captions]:
        say(f"{list_names(without)}: no new caption; the same command tries again")
    if hasattr(captioner, "cost") and (cost := captioner.cost()):
        say(cost)
    return captions, left_out, rate


def _batches(
    paths: Mapping[str, Path],
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
