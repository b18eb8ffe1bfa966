"""Write captions in another form: metadata.jsonl, .csv, .json or one .txt beside each picture."""

from dataclasses import dataclass
from pathlib import Path

from lora_lab.base.locate import locate_folder, writable_folder
from lora_lab.captions.files import read_caption_file, read_captions, write_captions
from lora_lab.console import say
from lora_lab.errors import InputError
from lora_lab.settings.schema import Config


@dataclass(frozen=True)
class ConvertResult:
    stage: str
    captions: int
    written: list[str]


def convert(config: Config, folder: Path) -> ConvertResult:
    """Read `stage.source` or what stands in dataset.root, write `stage.form` into `stage.output` or dataset.root."""
    stage = config.stage
    if stage.source is not None:
        captions = read_caption_file(Path(stage.source))
    else:
        captions = read_captions(locate_folder("dataset.root", config.dataset.folder))
    if not captions:
        raise InputError(f"no captions in {stage.source or config.dataset.root}: nothing to convert")
    key, value = ("dataset.root", config.dataset.folder) if stage.output is None else ("stage.output", stage.output)
    if stage.output is not None:
        Path(stage.output).mkdir(parents=True, exist_ok=True)
    written = write_captions(writable_folder(key, value), captions, stage.form)
    say(f"{len(captions)} captions written to {written[0]}" + (" and so on" if len(written) > 1 else ""))
    return ConvertResult("convert", len(captions), [str(path) for path in written])
