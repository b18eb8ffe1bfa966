"""The command line: read, resumed, and checked before anything is written; the points of a sweep."""

import argparse
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

# Hydra has no public way to its flags, and to what --cfg, --info, --hydra-help and shell completion print.
from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lora_lab.board.record import read_yaml
from lora_lab.console import warn
from lora_lab.errors import InputError
from lora_lab.launch import config
from lora_lab.launch.config import name_of, unknown_key
from lora_lab.launch.explain import explain, known_keys
from lora_lab.launch.recipes import CHAINS, PARAMS, keep_spelling, parses, refuse_foreign, with_quotes
from lora_lab.launch.restore import RECORD, undo_killed
from lora_lab.launch.sweep_folder import POINTS
from lora_lab.runs import SWEEP_RECORD, write_json
from lora_lab.settings import schema
from lora_lab.settings.setting import at_home


def without_mode(overrides: Sequence[str]) -> list[str]:
    """`overrides` without `hydra.mode`, which the program sets."""
    return [override for override in overrides if name_of(override) != "hydra.mode"]


def parse(overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """`overrides` by Hydra's grammar; with a `loader` a glob() can be expanded.

    Raises HydraException for one that the grammar does not allow."""
    return OverridesParser.create(loader).parse_overrides(list(overrides))


def representative_points(parsed: Sequence[Override]) -> list[list[str]]:
    """Points that together have every swept value: about as many as there are values, not their product.

    Of a range and of an interval only both ends are taken. Each point is its list of overrides. Raises InputError for a
    sweep over no value."""
    fixed, sweeps = [], []
    for override in parsed:
        if not override.is_sweep_override():
            fixed.append(override.input_line)
            continue
        if override.value_type == ValueType.INTERVAL_SWEEP:
            values = [override.value().start, override.value().end]
        else:
            values = list(override.sweep_string_iterator())
            if not values:
                raise InputError(f"{override.input_line}: there is no such option or value, so no job would run")
            if override.value_type == ValueType.RANGE_SWEEP:
                values = [values[0], values[-1]]
        sweeps.append([f"{override.key_or_group}={value}" for value in values])
    first = [values[0] for values in sweeps]
    others = [[*first[:i], value, *first[i + 1 :]] for i, values in enumerate(sweeps) for value in values[1:]]
    return [[*fixed, *point] for point in [first, *others]]


def with_params(parsed: Sequence[Override], hydra: DictConfig, loader: ConfigLoader | None = None) -> list[Override]:
    """The overrides of `hydra.sweeper.params` (set by a recipe, for example), then `parsed`, which replace them.

    Raises InputError for what the chosen sweeper does not support."""
    params = (hydra.sweeper.get("params") or {}).items()
    params = parse([f"{key}={values}" for key, values in params], loader)
    replaced = {override.key_or_group for override in parsed}
    overrides = [*(override for override in params if override.key_or_group not in replaced), *parsed]
    optuna = searches(hydra)
    for override in overrides:
        if override.value_type == ValueType.INTERVAL_SWEEP and not optuna:
            raise InputError(f"{override.input_line}: an interval needs a sweeper that chooses, hydra/sweeper=optuna")
    if optuna and getattr(hydra.sweeper.direction, "name", hydra.sweeper.direction) != "maximize":
        raise InputError("hydra/sweeper=optuna: a higher score is better, set hydra.sweeper.direction=maximize")
    return overrides


def searches(hydra: DictConfig) -> bool:
    """Whether the sweeper chooses the next points by the scores of finished jobs."""
    return hydra.sweeper["_target_"].startswith("hydra_plugins.hydra_optuna_sweeper.")


def refuse_unscored(runs: Sequence[schema.Config]) -> None:
    """Raise InputError for a run that has no score, which a search needs."""
    for run in runs:
        if not isinstance(run.stage, (schema.Train, schema.Pipeline)):
            raise InputError("hydra/sweeper=optuna maximises a score, which only training computes: set stage=train")
        if run.model.judge is None:
            raise InputError("model.judge=null: hydra/sweeper=optuna maximises a score, which needs a CLIP model")


def refuse_none_at_once(hydra: DictConfig) -> None:
    """Raise InputError if hydra/launcher=packed may run no job at a time."""
    for key in ("max_jobs", "workers"):
        value = hydra.launcher.get(key)
        if value is not None and value < 1:
            raise InputError(f"hydra.launcher.{key}={value}: set 1 or more, or null for the default")


def refuse_swept_hydra(parsed: Sequence[Override]) -> None:
    """Raise InputError for a sweep over Hydra's own keys: a sweep has one launcher, one sweeper and one folder."""
    for override in parsed:
        if override.is_hydra_override() and override.is_sweep_override():
            key = override.key_or_group
            quoted = f", and ranges in quotes: '{key}=\"...\"'" if key.startswith("hydra.sweeper.params.") else ""
            raise InputError(f"{override.input_line}: {key} has one value for the whole sweep{quoted}")


def all_points(hydra: Mapping[str, Any], loader: ConfigLoader) -> list[list[str]]:
    """Every job of a sweep as its overrides, in the order of their numbers; none if the sweeper searches.

    `hydra` is Hydra's part of the composition, `loader` expands a glob. Raises HydraException."""
    if not hydra["sweeper"]["_target_"].endswith("BasicSweeper"):
        return []
    params = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
    values = {}  # as in Hydra's BasicSweeper: of a key that is set twice the last value counts
    for override in parse([*params, *hydra["overrides"]["task"]], loader):
        is_swept, key = override.is_sweep_override(), override.get_key_element()
        values[key] = list(override.sweep_string_iterator()) if is_swept else [override.get_value_element_as_str()]
    return [[f"{key}={v}" for key, v in zip(values, point, strict=True)] for point in product(*values.values())]


def write_points(sweep: Path, points: Sequence[Sequence[str]]) -> None:
    """Write points.json: number, overrides and typed values of every job of the sweep in the folder `sweep`."""
    entries = []
    for number, overrides in enumerate(points):
        values = {name_of(override.input_line): override.value() for override in parse(overrides)}
        entries.append({"number": number, "overrides": list(overrides), "values": values})
    write_json(sweep / POINTS, entries)


def write_missing_points(sweep: Path) -> None:
    """Write points.json for a sweep of an older version, which left only its command line; else do nothing."""
    if (sweep / POINTS).exists() or not (sweep / SWEEP_RECORD).is_file():
        return
    # A damaged record, or a folder that cannot be written: its page lacks the jobs that were not started.
    with suppress(OSError, InputError, HydraException, OmegaConfBaseException, TypeError, KeyError, AttributeError):
        record = read_yaml(sweep / SWEEP_RECORD)
        with config.hydra_loader() as loader:
            write_points(sweep, all_points(record["hydra"], loader))


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """Hydra's own reading of the command line (.overrides, .multirun, .cfg, .help, ...), with -m at any place.

    Raises InputError for an unknown flag, or one that this program does not have."""
    parser = get_args_parser()
    parser.error = _refuse_flag
    flags = parser._option_string_actions
    if unreadable := next((word for word in argv if _is_surrogate(word)), None):
        raise InputError(f"{unreadable!a}: is not in UTF-8, as the files of a run are: rename what it names")
    arguments = parser.parse_intermixed_args([_as_override(word, flags) for word in argv])
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
    arguments.overrides = [keep_spelling(with_quotes(word, arguments.multirun)) for word in arguments.overrides]
    return arguments


def _refuse_flag(message: str) -> None:
    raise InputError(f"{message} (--help shows the flags; a setting is KEY=VALUE)")


def _as_override(word: str, flags: Collection[str]) -> str:
    """`lr=0.02` of `--lr=0.02`, as `wandb agent` writes it; a flag of Hydra's, and all else, as it is."""
    match = re.match(r"--([A-Za-z_][\w./]*)=", word)
    return word.removeprefix("--") if match and f"--{match[1]}" not in flags else word


def _is_surrogate(word: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in word)


def show(arguments: argparse.Namespace) -> None:
    """Print what --cfg, --info, --hydra-help and --shell-completion ask for.

    Raises ValueError for flags that contradict each other, HydraException for what cannot be composed."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that the program words the error
    arguments.resolve |= arguments.cfg == "job"  # values, not the interpolations that they come from
    version.setbase("1.3")
    _run_hydra(arguments, get_args_parser(), task_function=show, config_path=str(config.CONF), config_name="config")


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
        if not parses(override):
            raise InputError(
                f"{override}: cannot be read as KEY=VALUE (text with brackets or commas needs quotes: \"key='a, b'\")"
            )
    try:
        parsed = parse(overrides)
        for override in parsed:
            _refuse_additions(override, overrides)
            _refuse_no_option(override)
        if multirun:
            return _check_sweep(overrides, parsed)
        composition = config.with_hydra(overrides)
        _refuse_other_places(composition.hydra)
        if composition.hydra.mode == RunMode.MULTIRUN:  # set by a recipe
            return _check_sweep(overrides, parsed)
        return Command(composition, [config.resolve(composition)])
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, overrides)) from error
    except AssertionError:  # of OmegaConf, for a key below null
        param = next((word for word in overrides if name_of(word).startswith(PARAMS)), None)
        if param is None:
            raise
        raise InputError(
            f"{param}: a recipe sets these; here write {name_of(param).removeprefix(PARAMS)}=..."
        ) from None


def _check_sweep(overrides: list[str], parsed: list[Override]) -> Command:
    refuse_swept_hydra(parsed)
    composition = config.with_hydra([*without_mode(overrides), "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
    _refuse_other_places(composition.hydra)
    refuse_none_at_once(composition.hydra)
    with config.hydra_loader() as loader:
        points = representative_points(with_params(parse(overrides, loader), composition.hydra, loader))
        runs = [config.resolve(loader.load_configuration("config", without_mode(p), RunMode.RUN)) for p in points]
    if searches(composition.hydra):
        refuse_unscored(runs)
    if folder := _captioned_by_several(runs):
        # Each would write into the same caption file, or find the captions of another one there.
        if typed := next((override for override in overrides if name_of(override) == "stage.mode"), None):
            raise InputError(f"{typed}: several jobs would caption {folder}, leave it out and each proposes captions")
        warn(f"several jobs caption {folder}: each proposes captions (stage.mode=propose), and a page compares them")
        return _check_sweep([*overrides, "stage.mode=propose"], [*parsed, *parse(["stage.mode=propose"])])
    return Command(composition, runs)


def _captioned_by_several(runs: Sequence[schema.Config]) -> str | None:
    """The folder into which several of the runs of a sweep would write captions; None if there is none."""
    writing = [run for run in runs if isinstance(run.stage, schema.Caption) and run.stage.mode != "propose"]
    folders = Counter(run.dataset.folder for run in writing)
    return next((folder for folder, number in folders.items() if number > 1), None)


def _refuse_other_places(hydra: DictConfig) -> None:
    """Raise InputError for settings of Hydra with which names of files, or the record of a run, would not fit."""
    if hydra.job.chdir:
        raise InputError(
            "hydra.job.chdir=true: paths are relative to the folder that you are in, leave it false; hydra.run.dir= "
            "names the folder that a run writes"
        )
    if hydra.output_subdir != RECORD:
        raise InputError(
            f"hydra.output_subdir={'null' if hydra.output_subdir is None else hydra.output_subdir}: resume= and the "
            f"comparison page read the record of a run in {RECORD}, leave it there"
        )


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
    if not folder.is_dir() or override.is_sweep_override():
        return
    value = override.value()
    chain = override.key_or_group in CHAINS and isinstance(value, list) and value
    if not all(isinstance(name, str) for name in (value if chain else [value])):
        options = sorted(f.stem for f in folder.glob("*.yaml"))
        raise InputError(f"{override.input_line}: {override.key_or_group} is one of {', '.join(options)}")


def expand_resume(overrides: list[str], multirun: bool) -> tuple[list[str], Path | None]:
    """The command line that `resume=FOLDER` stands for, and the folder if it is that of a sweep.

    It has the overrides that started the run or the sweep, then the new ones. `latest` is the newest run or sweep below
    outputs/ and multirun/ that has a checkpoint. Raises InputError for a folder that cannot be resumed, and for new
    overrides that would change the points of a sweep."""
    values = {name_of(o): o.partition("=")[2].strip("'\"") for o in overrides}
    name = values.get("resume")
    if name in (None, "null"):
        return overrides, None
    folder = _latest() if name == "latest" else Path(at_home(name))
    undo_killed(folder)
    new = [o for o in overrides if name_of(o) not in ("resume", "hydra.run.dir", "hydra.sweep.dir")]
    if name and (folder / SWEEP_RECORD).is_file():
        return _resumed_sweep(folder, new), folder
    if multirun:
        raise InputError(f"resume={name}: not the folder of a sweep (no {SWEEP_RECORD}), leave out the -m")
    record = folder / RECORD / "overrides.yaml"
    if not name or not record.is_file():
        raise InputError(f"resume={name}: name a run folder, one with {Path(*record.parts[-2:])} in it")
    dropped = {*values, "resume", "allow_targets"}
    recorded = [o for o in _overrides(read_yaml(record), record) if name_of(o) not in dropped]
    refuse_foreign(recorded, f"resume={name}: {record}")
    return [*recorded, *new, f"resume={quote_path(folder)}", f"hydra.run.dir={quote_path(folder)}"], None


def quote_path(folder: Path) -> str:
    """`folder` in the quotes that Hydra's grammar requires for spaces, brackets and commas."""
    return QuotedString(str(folder), quote=Quote.single).with_quotes()


def _resumed_sweep(folder: Path, new: list[str]) -> list[str]:
    """The command line of the sweep in `folder`, then the overrides `new`, which must not change its points."""
    recorded, names = _overrides_of_sweep(folder / SWEEP_RECORD), {name_of(o) for o in new}
    if "hydra/launcher" in names:  # the keys of the earlier launcher do not apply to the new one
        recorded = [o for o in recorded if not name_of(o).startswith("hydra.launcher.")]
    replaced = {name for name in names if name.startswith("hydra.")} | {"hydra.mode", "allow_targets"}
    recorded = [o for o in recorded if name_of(o) not in replaced]
    storage = next((o.partition("=")[2] for o in recorded if name_of(o) == "hydra.sweeper.storage"), "null")
    if storage != "null":
        raise InputError(f"resume={folder}: its study is in {storage}: repeat the command to continue it")
    refuse_foreign(recorded, f"resume={folder}: {folder / SWEEP_RECORD}")
    hydra = hydra_part(recorded)
    points = with_params(parse(recorded), hydra)
    _refuse_other_points(folder, points, new)
    _refuse_unrepeatable(folder, hydra, new)
    return [*(o for o in recorded if name_of(o) not in names | {"resume", "hydra.sweep.dir"}), *new]


def _overrides_of_sweep(file: Path) -> list[str]:
    try:
        record = read_yaml(file)["hydra"]["overrides"]
        return [*_overrides(record["hydra"], file), *_overrides(record["task"], file)]
    except (KeyError, TypeError):
        raise _no_record(file) from None


def _overrides(content: Any, file: Path) -> list[str]:
    """The recorded overrides, word for word. Raises InputError for what is no list of texts."""
    if not isinstance(content, list) or not all(isinstance(word, str) for word in content):
        raise _no_record(file)
    return content


def _no_record(file: Path) -> InputError:
    return InputError(f"{file} is damaged: it has not the command line of a run, repeat that with hydra.run.dir=")


def _refuse_other_points(folder: Path, overrides: Sequence[Override], new: list[str]) -> None:
    swept_keys = {o.key_or_group for o in overrides if o.is_sweep_override()}
    for override in parse(new):
        key = override.key_or_group
        sets_sweeper = key.startswith(("hydra.sweeper", "hydra/sweeper")) and key != "hydra.sweeper.n_trials"
        if key in swept_keys or sets_sweeper or override.is_sweep_override():
            raise InputError(
                f"{override.input_line}: {folder} has a sweep over {', '.join(sorted(swept_keys))}; "
                "other points need a sweep of their own"
            )


def _refuse_unrepeatable(folder: Path, hydra: DictConfig, new: list[str]) -> None:
    """Raise InputError for a search whose sampler would not propose the finished points again before new ones."""
    if not searches(hydra):
        return
    if hydra.sweeper.sampler.get("seed", 0) is None:
        raise InputError(
            f"resume={folder}: a search without hydra.sweeper.sampler.seed cannot be repeated, start a new one"
        )
    for override in parse(new):
        if not override.is_hydra_override():
            raise InputError(f"{override.input_line}: {folder} has a search, whose scores must stay comparable")


def _latest() -> Path:
    """The newest folder that can be resumed; a sweep is as new as the newest checkpoint of its jobs.

    Raises InputError if there is none."""
    ages: dict[Path, float] = {file.parent: _modified(file) for file in Path("multirun").glob(f"*/*/{SWEEP_RECORD}")}
    runs = [*Path("outputs").glob("*/*/checkpoints/step-*"), *Path("multirun").glob("*/*/*/checkpoints/step-*")]
    for checkpoint in runs:
        run = checkpoint.parents[1]
        folder = run.parent if run.parent in ages else run
        ages[folder] = max(ages.get(folder, 0), _modified(checkpoint))
    if not ages:
        raise InputError("resume=latest: no run under outputs/ or multirun/ has a checkpoint, name the run folder")
    return max(ages, key=ages.get)


def _modified(path: Path) -> float:
    return path.stat().st_mtime
