"""The command line: read, and checked before anything is written."""

import argparse
import os
from dataclasses import dataclass

# Hydra has no public way to its flags, and to what --cfg, --info, --hydra-help and shell completion print.
from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lora_lab.errors import InputError
from lora_lab.launch import config, grid
from lora_lab.launch.explain import explain, known_keys
from lora_lab.launch.keys import unknown_key
from lora_lab.settings import schema


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """Hydra's own reading of the command line (.overrides, .multirun, .cfg, .help, ...), with -m at any place.

    Raises InputError for an unknown flag, or one that this program does not have."""
    parser = get_args_parser()
    parser.error = _refuse_flag
    arguments = parser.parse_intermixed_args(argv)
    if arguments.config_name or arguments.config_path or arguments.config_dir:
        raise InputError(
            "--config-name, --config-path and --config-dir are not for this program: recipes go into ./experiments, "
            "a folder of more options is added by hydra.searchpath=[file://FOLDER]"
        )
    if arguments.experimental_rerun:
        raise InputError("--experimental-rerun is not for this program: use resume=FOLDER")
    if arguments.run and arguments.multirun:
        raise InputError("--run and --multirun contradict each other: leave one out")
    arguments.multirun = arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides
    arguments.overrides = [_quoted(override, arguments.multirun) for override in arguments.overrides]
    return arguments


def _refuse_flag(message: str) -> None:
    raise InputError(f"{message} (--help shows the flags)")


def show(arguments: argparse.Namespace) -> None:
    """Print what --cfg, --info, --hydra-help and --shell-completion ask for.

    Raises ValueError for flags that contradict each other, HydraException for what cannot be composed."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that the program words the error
    arguments.resolve |= arguments.cfg == "job"  # values, not the interpolations that they come from
    version.setbase("1.3")
    _run_hydra(arguments, get_args_parser(), task_function=show, config_path=str(config.CONF), config_name="config")


def _quoted(override: str, multirun: bool) -> str:
    """Put the quotes that Hydra requires around a value such as `두부 (1).jpg`, if no other reading is possible."""
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


@dataclass(frozen=True)
class Command:
    """A checked command line: what Hydra composes of it, and the typed configurations."""

    composition: DictConfig  # with Hydra's part; that of a sweep leaves out what is swept
    runs: list[schema.Config]  # the run, or the points of the sweep that show each swept value once

    @property
    def is_sweep(self) -> bool:
        return self.composition.hydra.mode == RunMode.MULTIRUN


def check(overrides: list[str], multirun: bool) -> Command:
    """Compose and type every point that `overrides` name. Nothing is written.

    Raises InputError for what cannot be composed, or has a value that is refused."""
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
        if multirun:
            return _check_sweep(overrides, parsed)
        composition = config.with_hydra(overrides)
        if composition.hydra.mode == RunMode.MULTIRUN:  # set by a recipe
            return _check_sweep(overrides, parsed)
        return Command(composition, [config.resolve(composition)])
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, overrides)) from error


def _check_sweep(overrides: list[str], parsed: list[Override]) -> Command:
    grid.refuse_swept_hydra(parsed)
    composition = config.with_hydra([*grid.without_mode(overrides), "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
    grid.refuse_none_at_once(composition.hydra)
    points = grid.points(grid.with_params(parsed, composition.hydra))
    runs = [config.resolve(config.with_hydra(grid.without_mode(point))) for point in points]
    if grid.searches(composition.hydra):
        grid.refuse_unscored(runs)
    return Command(composition, runs)


def hydra_part(overrides: list[str]) -> DictConfig:
    """Hydra's own part of a sweep's configuration: launcher, sweeper, folder. Raises HydraException."""
    return config.with_hydra(overrides, RunMode.MULTIRUN).hydra


def _refuse_additions(override: Override, overrides: list[str]) -> None:
    """Raise InputError for +key, ++key and ~key, which bypass the schema; in Hydra's own part they are allowed."""
    key, text = override.key_or_group, override.input_line
    if not (override.is_add() or override.is_force_add() or override.is_delete()) or key.startswith("hydra"):
        return
    keys = known_keys(overrides)
    if key in keys or key == "experiment":
        raise InputError(f"{text}: {key} is part of every run, leave out the {text[: -len(text.lstrip('+~'))]}")
    raise InputError(f"{text}: {unknown_key(key, keys, schema.KEYS_OF_STAGES).partition(': ')[2]}")


def _refuse_no_option(override: Override) -> None:
    """Raise InputError for `model=null` and `model=3`, which name no option of the group."""
    folder = config.CONF / override.key_or_group
    if folder.is_dir() and not override.is_sweep_override() and not isinstance(override.value(), str):
        options = sorted(f.stem for f in folder.glob("*.yaml"))
        raise InputError(f"{override.input_line}: {override.key_or_group} is one of {', '.join(options)}")
