"""Clean the captions of a folder by the refiner's rules and put the trigger in."""

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_lab.base.locate import locate_folder, writable_folder
from lora_lab.captions.files import read_captions, write_captions
from lora_lab.captions.history import REFINE, record
from lora_lab.captions.rules import Rules, read_hints
from lora_lab.captions.rules import refine as refine_caption
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.settings.schema import Config


@dataclass(frozen=True)
class RefineResult:
    stage: str
    before: dict[str, str]  # of the captions that changed
    after: dict[str, str]
    unchanged: int


def refine(config: Config, folder: Path) -> RefineResult:
    """Refine every caption of dataset.root in place; the raw ones stay in captions.history.jsonl and a .bak file.

    Running it again changes nothing."""
    root = locate_folder("dataset.root", config.dataset.folder)
    captions, hints = read_captions(root), read_hints(root)
    if not captions:
        raise InputError(f"no captions in {root}: run stage=caption first")
    stray = [name for name in hints if name not in captions]
    if stray:
        raise InputError(f"the hints in {root} name {stray[0]}, which has no caption: correct the name")
    rules = Rules.from_config(**asdict(config.refiner))
    refined = {
        name: refine_caption(text, config.trigger, rules, hints.get(name, "")) for name, text in captions.items()
    }
    changed = [name for name in captions if refined[name] != captions[name]]
    if changed:
        writable_folder("dataset.root", config.dataset.folder)
        record(root, REFINE, captions, refined)
        write_captions(root, refined)
        Console().print(_table({name: (captions[name], refined[name]) for name in changed}))
    say(f"refined {len(changed)} of {len(captions)} captions in {root}")
    return RefineResult(
        "refine", {n: captions[n] for n in changed}, {n: refined[n] for n in changed}, len(captions) - len(changed)
    )


def _table(rows: dict[str, tuple[str, str]]) -> Table:
    table = Table("picture", "before", "after", show_lines=True)
    for name, (before, after) in rows.items():
        table.add_row(name, before, after)
    return table
