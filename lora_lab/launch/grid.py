"""The points of a sweep, and what its launcher and sweeper require."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_lab.errors import InputError
from lora_lab.launch.sweep_folder import POINTS
from lora_lab.runs import SWEEP_RECORD, write_json
from lora_lab.settings import schema

# How to install the launchers and sweepers that are packages of their own. Ray's requires an older cloudpickle than the
# others do, but works with theirs, so it is installed without its requirements.
INSTALL = {
    "joblib": 'pip install "lora_lab[joblib]"',
    "submitit_local": 'pip install "lora_lab[submitit]"',
    "submitit_slurm": 'pip install "lora_lab[submitit]"',
    "ray": 'pip install "lora_lab[ray]" && pip install --no-deps hydra-ray-launcher==1.2.2',
    "optuna": 'pip install "lora_lab[optuna]"',
}
CHOICES = (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.RANGE_SWEEP)


def name_of(override: str) -> str:
    """The key that an override names: `lr` of `+lr=1e-4`."""
    return override.partition("=")[0].lstrip("+~")


def without_mode(overrides: Sequence[str]) -> list[str]:
    """`overrides` without `hydra.mode`, which the program sets."""
    return [override for override in overrides if name_of(override) != "hydra.mode"]


def parse(overrides: Sequence[str]) -> list[Override]:
    """`overrides` by Hydra's grammar. Raises HydraException for one that the grammar does not allow."""
    return OverridesParser.create().parse_overrides(list(overrides))


def points(parsed: Sequence[Override]) -> list[list[str]]:
    """Points that together have every swept value: about as many as there are values, not their product.

    Of a range and of an interval only both ends are taken. Each point is its list of overrides."""
    fixed, sweeps = [], []
    for override in parsed:
        if not override.is_sweep_override():
            fixed.append(override.input_line)
            continue
        if override.value_type in CHOICES:
            values = list(override.sweep_string_iterator())
            if override.value_type == ValueType.RANGE_SWEEP:
                values = [values[0], values[-1]]
        elif override.value_type == ValueType.INTERVAL_SWEEP:
            values = [override.value().start, override.value().end]
        else:  # a glob, which is expanded by Hydra
            continue
        sweeps.append([f"{override.key_or_group}={value}" for value in values])
    first = [values[0] for values in sweeps]
    others = [[*first[:i], value, *first[i + 1 :]] for i, values in enumerate(sweeps) for value in values[1:]]
    return [[*fixed, *point] for point in [first, *others]]


def with_params(parsed: Sequence[Override], hydra: DictConfig) -> list[Override]:
    """The overrides of `hydra.sweeper.params` (set by a recipe, for example), then `parsed`, which replace them.

    Raises InputError for what the chosen sweeper does not support."""
    params = (hydra.sweeper.get("params") or {}).items()
    params = parse([f"{key}={values}" for key, values in params])
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


def all_points(hydra: Mapping[str, Any], loader: ConfigLoader | None = None) -> list[list[str]]:
    """Every job of a sweep as its overrides, in the order of their numbers; none if the sweeper searches.

    `hydra` is Hydra's part of the composition. `loader` is needed to expand a glob. Raises HydraException."""
    if not hydra["sweeper"]["_target_"].endswith("BasicSweeper"):
        return []
    params = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
    values = {}  # as in Hydra's BasicSweeper: of a key that is set twice the last value counts
    for override in OverridesParser.create(loader).parse_overrides([*params, *hydra["overrides"]["task"]]):
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
    with suppress(OSError, YAMLError, HydraException, OmegaConfBaseException, TypeError, KeyError, AttributeError):
        record = OmegaConf.to_container(OmegaConf.load(sweep / SWEEP_RECORD), resolve=False)
        write_points(sweep, all_points(record["hydra"]))
