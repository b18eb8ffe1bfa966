"""The files, folders, models and packages that a run needs, checked without importing torch."""

from typing import Any

from lora_lab import track
from lora_lab.base.locate import locate_folder, locate_model
from lora_lab.captions.captioner import check_captioner
from lora_lab.captions.refiner import check_refiner
from lora_lab.settings.decides import fields_of
from lora_lab.settings.schema import Config
from lora_lab.settings.setting import location_of


def check_inputs(config: Config) -> None:
    """Raise InputError for a picture, folder, model or tracker that is named but does not exist.

    A stage names the keys that it needs (`Stage.inputs`), the type of a key says what its value must be."""
    kinds = {key: location.kind for key, info in fields_of() if (location := location_of(info))}
    for key in dict.fromkeys(config.stage.inputs(config)):
        value = _value(config, key)
        if kinds[key] == "dataset":
            several = config.stage.several_folders
            for root in [folder.root for folder in config.dataset.folders] if several else [config.dataset.folder]:
                locate_folder(key, root)
        elif kinds[key] == "tracker":
            track.refuse_missing(value)
        elif kinds[key] == "captioner":
            check_captioner(value)
        elif kinds[key] == "refiner":
            check_refiner(value)
        elif kinds[key] == "mask" and config.loss.masks != "folder":
            continue
        elif value is not None:
            check = locate_model if kinds[key] == "model" else locate_folder
            for name in value if isinstance(value, list) else [value]:
                check(key, str(name))


def _value(config: Config, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
