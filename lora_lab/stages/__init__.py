"""One module a stage: a function from the configuration and a folder to a frozen result. No stage imports another's."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from lora_lab.console import quiet_libraries
from lora_lab.runs import refuse_unwritable, write_result
from lora_lab.settings.schema import STAGES, Config

NAMES = {schema: name for name, schema in STAGES.items()}


def run(config: Config, folder: Path) -> object:
    """Do what `config.stage` says in `folder`, and leave its result there as result.json."""
    quiet_libraries()
    refuse_unwritable(folder)
    result = stage(NAMES[type(config.stage)])(config, folder)
    write_result(folder, result)
    return result


def stage(name: str) -> Callable[[Config, Path], object]:
    """The function of a stage. Imported only when asked for: converting captions must not wait for torch."""
    return getattr(import_module(f"lora_lab.stages.{name}"), name)
