"""stage=convert: write captions in another form: metadata.jsonl, .csv, .json, or a text file beside each image."""

from dataclasses import dataclass
from pathlib import Path

from lora_lab.base.locate import locate_folder, writable_folder
from lora_lab.captions.files import read_caption_file, read_captions, refuse_links, write_captions
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.settings.schema import Config


@dataclass(frozen=True)
class ConvertResult:
    stage: str
    captions: int  # number of captions
    written: list[str]  # paths


def convert(config: Config, folder: Path) -> ConvertResult:
    """Write the captions of `stage.source`, or of dataset.root, as `stage.form` into `stage.output`, or dataset.root.

    Raises InputError for a source without captions, a malformed one, and a folder that cannot be written to."""
    stage = config.stage
    if stage.source is not None:
        images = Path(stage.output) if stage.output else locate_folder("dataset.root", config.dataset.folder)
        captions = read_caption_file(Path(stage.source), images)
    else:
        captions = read_captions(locate_folder("dataset.root", config.dataset.folder), config.dataset.follow_links)
    if not captions:
        raise InputError(f"no captions in {stage.source or config.dataset.root}: nothing to convert")
    if stage.output is None:
        root = writable_folder("dataset.root", config.dataset.folder)
    else:
        Path(stage.output).mkdir(parents=True, exist_ok=True)
        root = writable_folder("stage.output", stage.output)
    refuse_links(root)
    written = write_captions(root, captions, stage.form)
    say(f"{len(captions)} captions written to {written[0]}" + (" and so on" if len(written) > 1 else ""))
    return ConvertResult("convert", len(captions), [str(path) for path in written])
