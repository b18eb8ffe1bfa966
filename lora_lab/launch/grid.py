"""The points of a sweep, checked before anything is made, and what the launchers and sweepers need."""

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from omegaconf import DictConfig

from lora_lab.errors import InputError
from lora_lab.settings import schema

# Launchers and sweepers that are packages of their own, and how to install them. Ray's asks for a cloudpickle from
# before that of the others, which it works without.
INSTALL = {
    "joblib": 'pip install "lora_lab[joblib]"',
    "submitit_local": 'pip install "lora_lab[submitit]"',
    "submitit_slurm": 'pip install "lora_lab[submitit]"',
    "ray": 'pip install "lora_lab[ray]" && pip install --no-deps hydra-ray-launcher==1.2.2',
    "optuna": 'pip install "lora_lab[optuna]"',
}
CHOICES = (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.RANGE_SWEEP)


def parse(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def points(parsed: Sequence[Override]) -> list[list[str]]:
    """The points of a sweep at which every swept value occurs at least once: as many as values, not their product.

    Of a range and of an interval the ends stand for all."""
    fixed, swept = [], []
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
        else:  # a glob, which Hydra resolves
            continue
        swept.append([f"{override.key_or_group}={value}" for value in values])
    first = [values[0] for values in swept]
    others = [[*first[:i], value, *first[i + 1 :]] for i, values in enumerate(swept) for value in values[1:]]
    return [[*fixed, *point] for point in [first, *others]]


def with_params(parsed: Sequence[Override], hydra: DictConfig) -> list[Override]:
    """What is swept by `hydra.sweeper.params`, of a recipe say, before what was typed, which wins. Raises InputError
    for what the chosen sweeper cannot do."""
    params = (hydra.sweeper.get("params") or {}).items()
    params = parse([f"{key}={values}" for key, values in params])
    typed = {override.key_or_group for override in parsed}
    swept = [*(override for override in params if override.key_or_group not in typed), *parsed]
    optuna = searches(hydra)
    for override in swept:
        if override.value_type == ValueType.INTERVAL_SWEEP and not optuna:
            raise InputError(f"{override.input_line}: an interval needs a sweeper that chooses, hydra/sweeper=optuna")
    if optuna and getattr(hydra.sweeper.direction, "name", hydra.sweeper.direction) != "maximize":
        raise InputError("hydra/sweeper=optuna: a score is the better the higher, say hydra.sweeper.direction=maximize")
    return swept


def searches(hydra: DictConfig) -> bool:
    """Whether the sweeper decides by the scores of finished jobs what it tries next."""
    return hydra.sweeper["_target_"].startswith("hydra_plugins.hydra_optuna_sweeper.")


def refuse_unscored(runs: Sequence[schema.Config]) -> None:
    """Raise InputError for a run that gives a search no score to go by."""
    for run in runs:
        if not isinstance(run.stage, (schema.Train, schema.Pipeline)):
            raise InputError("hydra/sweeper=optuna maximises a score, which only training gives: say stage=train")
        if run.model.judge is None:
            raise InputError("model.judge=null: hydra/sweeper=optuna maximises a score, which a CLIP has to give")


def refuse_none_at_once(hydra: DictConfig) -> None:
    """Raise InputError where hydra/launcher=packed is told to do nothing at a time."""
    for key in ("max_jobs", "workers"):
        value = hydra.launcher.get(key)
        if value is not None and value < 1:
            raise InputError(f"hydra.launcher.{key}={value}: name 1 or more, or null to let it be found out")


def refuse_swept_hydra(parsed: Sequence[Override]) -> None:
    """Raise InputError for several launchers or folders: a sweep has one of each."""
    for override in parsed:
        if override.is_hydra_override() and override.is_sweep_override():
            key = override.key_or_group
            quoted = f", and ranges in quotes: '{key}=\"...\"'" if key.startswith("hydra.sweeper.params.") else ""
            raise InputError(f"{override.input_line}: {key} has one value for the whole sweep{quoted}")
