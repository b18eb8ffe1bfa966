"""Errors of Hydra and OmegaConf in one sentence, with the nearest right name."""

import re
from collections.abc import Sequence

from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from lora_lab.errors import InputError
from lora_lab.launch import config
from lora_lab.launch.config import INSTALL, keys_of, name_of, nearest, unknown_key
from lora_lab.settings import schema

# Options by the names that the same has in other trainers, in the library, or in a neighbouring group.
SAME = {
    "adapter": {"locon": "lora targets=all", "lycoris": "lokr", "none": "lora", "qlora": "lora memory=low"},
    "loss": {
        "mse": "plain",
        "l2": "plain",
        "none": "plain",
        "snr": "min_snr",
        "smooth_l1": "huber",
        "v_pred": "zero_snr",
    },
    "memory": {"none": "fast", "high": "fast", "lowvram": "low", "medvram": "balanced"},
    "optimizer": {"dadaptation": "prodigy", "lion": "lion8bit"},
    "prior": {"none": "off", "reg": "pictures", "regularization": "pictures", "class": "generated"},
    "refiner": {"none": "off"},
    "sampler": {"euler_discrete": "euler", "dpm++_2m_karras": "dpmpp_2m_karras", "dpmsolver": "dpmpp_2m_karras"},
    "schedule": {"constant_with_warmup": "constant schedule.warmup=100", "warmup": "constant schedule.warmup=100"},
    "structure": {"none": "off", "edges": "canny", "lineart": "canny", "midas": "depth", "openpose": "pose"},
    "targets": {"attn": "attention", "full": "all", "mlp": "ff"},
    "text": {"none": "frozen", "off": "frozen", "textual_inversion": "pivotal", "both": "lora"},
    "tracker": {"none": "off", "tb": "tensorboard"},
}
TYPE_NAMES = {"integer": "a whole number", "float": "a number", "boolean": "true or false", "bool": "true or false"}


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """What is wrong with the command line `overrides`, in one sentence, of the error that Hydra or OmegaConf raised."""
    if isinstance(error, InputError):
        return str(error)
    chain = _chain(error)
    cause, recipe = chain[-1], next((m for e in chain if (m := re.match(r"In '(experiment/\S+?)'", str(e)))), None)
    prefix = f"in {recipe[1]}.yaml: " if recipe else ""
    if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
        return _unknown_option(cause, overrides)
    if isinstance(cause, OSError):
        where = f"{cause.filename}: " if cause.filename else ""  # a full disk has no name of a file
        return f"{where}{cause.strerror}; set hydra.run.dir= to another folder"
    if isinstance(cause, MissingMandatoryValue):
        return f"{_key(cause)} is missing: set {_key(cause)}=..."
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and not isinstance(cause, InterpolationKeyError):
        keys = hydra_keys(overrides) if _key(cause).startswith("hydra.") else known_keys(overrides)
        return prefix + unknown_key(_key(cause), keys, schema.KEYS_OF_STAGES)
    if isinstance(cause, ValidationError):
        return prefix + _wrong_value(_key(cause), _first_line(cause))
    ambiguous = re.match("Ambiguous value for argument '(.*)'", str(cause))
    if ambiguous:
        return f"{ambiguous[1]}: several values are a sweep and need -m; a comma in a text needs quotes, \"key='a, b'\""
    return prefix + _first_line(cause if isinstance(cause, (OmegaConfBaseException, HydraException)) else error)


def _chain(error: BaseException) -> list[BaseException]:
    """`error` and the errors that it was raised from, down to the first of OmegaConf or of the system."""
    chain = [error]
    while not isinstance(chain[-1], (OmegaConfBaseException, OSError)):
        origin = chain[-1].__cause__ or chain[-1].__context__
        if origin is None:
            break
        chain.append(origin)
    return chain


def _wrong_value(key: str, message: str) -> str:
    """The sentence for a value of the wrong type, from OmegaConf's message."""
    value = re.match(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+)", message)
    if value:
        return f"{key}={value[1]}: not {TYPE_NAMES.get(value[2].lower(), value[2])}"
    if "is not a ListConfig" in message:
        return f"{key}: not a list, write {key}=[...]"
    if "is not Optional" in message:
        return f"{key}=null: {key} must have a value"
    return f"{key}: {message}"


def known_keys(overrides: Sequence[str]) -> list[str]:
    """Every key that the command line may name, given the options that it chooses, whatever else is wrong with it."""
    groups = {f.name for f in config.CONF.iterdir() if f.is_dir()} | {"hydra.searchpath"}
    chosen = [o for o in overrides if name_of(o) in groups]
    for attempt in (chosen, []):
        try:
            return keys_of(OmegaConf.to_container(config.composed(attempt)))
        except (HydraException, OmegaConfBaseException, InputError):
            continue
    return []


def hydra_keys(overrides: Sequence[str]) -> list[str]:
    """Every key of Hydra's own part, given the launcher and the sweeper that the command line chooses."""
    try:
        cfg = config.with_hydra([o for o in overrides if name_of(o).startswith("hydra/")])
    except (HydraException, OmegaConfBaseException):
        return []
    return keys_of({"hydra": OmegaConf.to_container(cfg.hydra)})


def _unknown_option(error: MissingConfigException, overrides: Sequence[str]) -> str:
    group, _, option = error.missing_cfg_file.rpartition("/")
    if group.startswith("hydra/") and option in INSTALL:
        return f"{group}={option} is not installed: {INSTALL[option]}"
    choices = sorted(error.options or ())
    recipe = next((o.partition("=")[2] for o in overrides if name_of(o) == "experiment"), None)
    where = f"in experiment/{recipe}.yaml: " if recipe and group not in map(name_of, overrides) else ""
    same = SAME.get(group, {}).get(option.lower())
    hint = f", it is {group}={same} here" if same else nearest(option, choices)
    return f"{where}{group}={option}: no such {group}{hint} (there are {', '.join(choices)})"


def _key(error: OmegaConfBaseException) -> str:
    return str(error.full_key or error.key)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
