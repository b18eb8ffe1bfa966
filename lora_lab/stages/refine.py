"""stage=refine: rewrite the captions of a folder by the refiner, with the trigger in each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_lab.base.locate import locate_folder, writable_folder
from lora_lab.captions.files import read_captions, refuse_links
from lora_lab.captions.history import REFINE, CaptionUpdate
from lora_lab.captions.refiner import (
    AUTO,
    Refiner,
    foreign_hints,
    load_refiner,
    read_hints,
    run_refiner,
    strip_setting,
    strip_shared,
)
from lora_lab.captions.strip import phrase_pattern
from lora_lab.console import bar, printable, say
from lora_lab.errors import InputError
from lora_lab.settings.schema import Config

BATCH = 8  # captions that are refined before they are written: a refiner may be a language model


@dataclass(frozen=True)
class RefineResult:
    stage: str
    before: dict[str, str]  # image name -> old caption, of the captions that changed
    after: dict[str, str]  # image name -> new caption, of the same images
    unchanged: int  # number of captions that stayed the same
    remarks: dict[str, str]  # image name -> what the refiner tells of its caption
    stripped: dict[str, int]  # phrase of refiner.strip -> number of captions that it was taken out of


def refine(config: Config, folder: Path) -> RefineResult:
    """Refine every caption of dataset.root in place, some at a time; captions.history.jsonl and a .bak file keep the
    old ones.

    Refining again changes nothing. Raises InputError for a folder without captions, a hint for an image without a
    caption, wrong settings of the refiner, and a folder that cannot be written to."""
    root, follow_links = locate_folder("dataset.root", config.dataset.folder), config.dataset.follow_links
    captions, hints = read_captions(root, follow_links), read_hints(root, follow_links)
    if not captions:
        raise InputError(f"no captions in {root}: run stage=caption first")
    unknown = [name for name in hints if name not in captions]
    if unknown:
        raise InputError(f"the hints in {root} name {unknown[0]}, which has no caption: correct the name")
    writable_folder("dataset.root", config.dataset.folder)
    refuse_links(root)
    refiner, update = load_refiner(config.refiner), CaptionUpdate(root, REFINE, captions, follow_links)
    triggers, after, remarks = config.triggers, {}, {}
    by_trigger = triggers.names_by_trigger(captions)
    batches = [names[start : start + BATCH] for names in by_trigger.values() for start in range(0, len(names), BATCH)]
    with bar(total=len(captions), desc="refine", unit="caption") as progress:
        for batch in batches:
            before = [captions[name] for name in batch]
            own_hints = [hints.get(name, "") for name in batch]
            texts = run_refiner(refiner, before, triggers.of(batch[0]), own_hints)
            after |= update.add({name: text for name, text in zip(batch, texts, strict=True) if text != captions[name]})
            told = dict(zip(batch, zip(before, own_hints, strict=True), strict=True))
            known = getattr(refiner, "remarks", {})
            remarks |= {name: known[given] for name, given in told.items() if given in known}
            progress.update(len(batch))
    strip, unstripped = strip_setting(config.refiner), captions
    if strip == AUTO:
        unstripped = captions | after
        strip, texts = _without_shared(refiner, unstripped, hints, config)
        after |= update.add({name: text for name, text in texts.items() if text != unstripped[name]})
    after = {name: text for name, text in after.items() if text != captions[name]}
    before = {name: captions[name] for name in after}
    if after:
        Console().print(_table(before, after))
    for line in foreign_hints(captions | after, hints):
        say(line)
    for name, remark in remarks.items():
        say(f"{name}: {printable(remark)}")
    say(f"refined {len(after)} of {len(captions)} captions in {root}")
    stripped = {phrase: count_stripped(phrase, unstripped, captions | after) for phrase in strip}
    if config.refiner.get("strip"):
        say(_stripped_line(stripped, len(captions)))
    if hasattr(refiner, "cost") and (cost := refiner.cost()):
        say(cost)
    return RefineResult("refine", before, after, len(captions) - len(after), remarks, stripped)


def _without_shared(
    refiner: Refiner, captions: Mapping[str, str], hints: Mapping[str, str], config: Config
) -> tuple[list[str], dict[str, str]]:
    """The phrases that most captions of each character share, and the refined captions without those of theirs."""
    phrases, texts = [], {}
    for trigger, names in config.triggers.names_by_trigger(captions).items():
        own = {name: captions[name] for name in names}
        shared, stripped = strip_shared(refiner, own, hints, trigger, config.class_noun)
        phrases += [phrase for phrase in shared if phrase not in phrases]
        texts |= stripped
    return phrases, texts


def count_stripped(phrase: str, before: Mapping[str, str], after: Mapping[str, str]) -> int:
    """How many captions had the phrase before and do not after."""
    pattern = phrase_pattern(phrase)
    return sum(bool(pattern.search(text)) and not pattern.search(after[name]) for name, text in before.items())


def _stripped_line(stripped: Mapping[str, int], captions: int) -> str:
    counts = ", ".join(f'"{phrase}" of {count}' for phrase, count in stripped.items())
    return f"taken out of {captions} captions by refiner.strip: {counts or 'nothing, they share no phrase'}"


def _table(before: Mapping[str, str], after: Mapping[str, str]) -> Table:
    table = Table("picture", "before", "after", show_lines=True)
    for name in before:
        table.add_row(*(Text(printable(cell)) for cell in (name, before[name], after[name])))  # never markup
    return table
