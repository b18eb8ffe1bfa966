"""What a person types: checked before anything is made, and explained in one sentence."""

import argparse
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

# Hydra's parser of flags is the only part of it that is used without being public: there is no other way to its -m.
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import YAMLError

from lora_lab.errors import InputError
from lora_lab.launch import config, grid
from lora_lab.launch.keys import keys_of, nearest, unknown_key
from lora_lab.settings import schema

KINDS = {"integer": "a whole number", "float": "a number", "boolean": "true or false", "bool": "true or false"}


def arguments(argv: list[str]) -> argparse.Namespace:
    """Hydra's own reading of the command line (.overrides, .multirun, .cfg, .help, ...), -m at any place.

    Raises InputError."""
    parser = get_args_parser()
    parser.error = _refuse_flag
    given = parser.parse_intermixed_args(argv)
    if given.config_name or given.config_path or given.config_dir:
        raise InputError(
            "--config-name, --config-path and --config-dir are not for this program: recipes go into ./experiments, "
            "a folder of more options is added by hydra.searchpath=[file://FOLDER]"
        )
    given.multirun = given.multirun or "hydra.mode=MULTIRUN" in given.overrides
    given.overrides = [_quoted(override, given.multirun) for override in given.overrides]
    return given


def _refuse_flag(message: str) -> None:
    raise InputError(f"{message} (--help shows what can be said)")


def _quoted(override: str, multirun: bool) -> str:
    """Hydra's grammar wants quotes around `두부 (1).jpg`: where nothing else can be meant they are put here."""
    key, equals, value = override.partition("=")
    if _parses(override) or not equals or any(mark in value[:1] + value[-1:] for mark in "[]'\""):
        return override
    values = value.split(",") if multirun else [value]
    quoted = f"{key}={','.join(QuotedString(v, quote=Quote.single).with_quotes() for v in values)}"
    return quoted if _parses(quoted) else override


def _parses(override: str) -> bool:
    try:
        return bool(OverridesParser.create().parse_override(override).key_or_group)
    except HydraException:
        return False


def explain(error: BaseException, overrides: Sequence[str] = ()) -> str:
    """One sentence for an error of Hydra or OmegaConf: what was wrong, and the nearest right name."""
    if isinstance(error, InputError):
        return str(error)
    chain = [error]  # from Hydra's wrapping down to who found out
    while not isinstance(chain[-1], (OmegaConfBaseException, OSError)):
        before = chain[-1].__cause__ or chain[-1].__context__
        if before is None:
            break
        chain.append(before)
    cause = chain[-1]
    where = next((m for e in chain if (m := re.match(r"In '(experiment/\S+?)'", str(e)))), None)
    prefix = f"in {where[1]}.yaml: " if where else ""
    if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
        return _unknown_option(cause, overrides)
    if isinstance(cause, OSError):
        return f"{cause.filename}: {cause.strerror}; choose another run folder with hydra.run.dir="
    if isinstance(cause, MissingMandatoryValue):
        return f"{_key(cause)} is missing: set {_key(cause)}=..."
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and not isinstance(cause, InterpolationKeyError):
        known = hydra_keys(overrides) if _key(cause).startswith("hydra.") else known_keys(overrides)
        return prefix + unknown_key(_key(cause), known, schema.KEYS_OF_STAGES)
    if isinstance(cause, ValidationError):
        return prefix + _wrong_value(_key(cause), _first_line(cause))
    ambiguous = re.match("Ambiguous value for argument '(.*)'", str(cause))
    if ambiguous:
        return f"{ambiguous[1]}: several values are a sweep and need -m; a comma in a text needs quotes, \"key='a, b'\""
    return prefix + _first_line(cause if isinstance(cause, (OmegaConfBaseException, HydraException)) else error)


def _wrong_value(key: str, message: str) -> str:
    """OmegaConf's word on a value of the wrong type, in ours."""
    value = re.match(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+)", message)
    if value:
        return f"{key}={value[1]}: not {KINDS.get(value[2].lower(), value[2])}"
    if "is not a ListConfig" in message:
        return f"{key}: not a list, write {key}=[...]"
    if "is not Optional" in message:
        return f"{key}=null: {key} must have a value"
    return f"{key}: {message}"


def known_keys(overrides: Sequence[str]) -> list[str]:
    """Every key that this command line may name: of the options it chooses, whatever else is wrong with it."""
    groups = {f.name for f in config.CONF.iterdir() if f.is_dir()} | {"hydra.searchpath"}
    chosen = [o for o in overrides if name_of(o) in groups]
    for attempt in (chosen, []):
        try:
            return keys_of(OmegaConf.to_container(config.composed(attempt)))
        except (HydraException, OmegaConfBaseException, InputError):
            continue
    return []


def hydra_keys(overrides: Sequence[str]) -> list[str]:
    """Every key of Hydra's own, with the launcher and sweeper that this command line chooses."""
    try:
        cfg = config.with_hydra([o for o in overrides if name_of(o).startswith("hydra/")])
    except (HydraException, OmegaConfBaseException):
        return []
    return keys_of({"hydra": OmegaConf.to_container(cfg.hydra)})


def _unknown_option(error: MissingConfigException, overrides: Sequence[str]) -> str:
    group, _, option = error.missing_cfg_file.rpartition("/")
    if group == "experiment" and (reason := config.unreadable_recipe(option)):
        return reason
    if group.startswith("hydra/") and option in grid.INSTALL:
        return f"{group}={option} is not installed: {grid.INSTALL[option]}"
    choices = sorted(error.options or ())
    recipe = next((o.partition("=")[2] for o in overrides if name_of(o) == "experiment"), None)
    where = f"in experiment/{recipe}.yaml: " if recipe and group not in map(name_of, overrides) else ""
    return f"{where}{group}={option}: no such {group}{nearest(option, choices)} (there are {', '.join(choices)})"


def _key(error: OmegaConfBaseException) -> str:
    return str(error.full_key or error.key)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def check(overrides: list[str], multirun: bool) -> list[schema.Config]:
    """Compose and type every point that `overrides` ask for, before Hydra makes a folder. Raises InputError."""
    for override in overrides:
        if not _parses(override):
            raise InputError(
                f"{override}: cannot be read as KEY=VALUE (text with brackets or commas needs quotes: \"key='a, b'\")"
            )
    try:
        parsed = grid.parse(overrides)
        for override in parsed:
            _refuse_additions(override, overrides)
            _refuse_no_option(override)
        if not multirun:
            return [config.resolve(overrides)]
        grid.refuse_swept_hydra(parsed)
        hydra = hydra_part(overrides)
        grid.refuse_none_at_once(hydra)
        runs = [config.resolve(p) for p in grid.points(grid.with_params(parsed, hydra))]
        if grid.searches(hydra):
            grid.refuse_unscored(runs)
        return runs
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, overrides)) from error


def hydra_part(overrides: list[str]) -> DictConfig:
    """Hydra's own part of a sweep's configuration: launcher, sweeper, folder."""
    return config.with_hydra(grid.points(grid.parse(overrides))[0]).hydra


def _refuse_additions(override: Override, overrides: list[str]) -> None:
    """+key, ++key and ~key go past the schema. Hydra's own part is left to those who know it."""
    key, text = override.key_or_group, override.input_line
    if not (override.is_add() or override.is_force_add() or override.is_delete()) or key.startswith("hydra"):
        return
    known = known_keys(overrides)
    if key in known or key == "experiment":
        raise InputError(f"{text}: {key} is part of every run, leave out the {text[: -len(text.lstrip('+~'))]}")
    raise InputError(f"{text}: {unknown_key(key, known, schema.KEYS_OF_STAGES).partition(': ')[2]}")


def _refuse_no_option(override: Override) -> None:
    """`model=null` and `model=3` name no option."""
    folder = config.CONF / override.key_or_group
    if folder.is_dir() and not override.is_sweep_override() and not isinstance(override.value(), str):
        options = sorted(f.stem for f in folder.glob("*.yaml"))
        raise InputError(f"{override.input_line}: {override.key_or_group} is one of {', '.join(options)}")


def planned(record: Path) -> list[list[str]]:
    """The jobs that a sweep's multirun.yaml asks for, each as its overrides; none of a sweeper that searches."""
    try:
        settings = OmegaConf.to_container(OmegaConf.load(record), resolve=False)["hydra"]
        if not settings["sweeper"]["_target_"].endswith("BasicSweeper"):
            return []
        params = [f"{key}={value}" for key, value in (settings["sweeper"].get("params") or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*params, *settings["overrides"]["task"]])
    except (OSError, YAMLError, HydraException, OmegaConfBaseException, TypeError, KeyError):
        return []
    values = {}  # as Hydra's BasicSweeper does: a key that is said twice counts once
    for override in parsed:
        swept = override.is_sweep_override()
        each = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
        values[override.get_key_element()] = list(each)
    return [[f"{key}={v}" for key, v in zip(values, point, strict=True)] for point in product(*values.values())]


def value_of(override: str) -> object:
    """What `KEY=VALUE` says, as YAML would."""
    return OverridesParser.create().parse_override(override).value()


def name_of(override: str) -> str:
    """`lr` of `+lr=1e-4`."""
    return override.partition("=")[0].lstrip("+~")
