"""What a person types: checked before anything is made, explained in one sentence, and taken up again by `resume=`."""

import difflib
import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, ValueType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from lora_lab import config
from lora_lab.errors import InputError

HELP = """\
lora_lab teaches SDXL one character from 10 to 50 pictures, then turns photos into that character.

  python -m lora_lab                                              everything, on the bundled demo
  python -m lora_lab stage=check dataset=folder dataset.root=data/TOFU
  python -m lora_lab stage=train experiment=sdxl dataset.root=data/TOFU trigger=HANA_TOFU lr=1e-4
  python -m lora_lab stage=img2img experiment=sdxl dataset.root=null lora=HANA_TOFU stage.photo=me.jpg
  python -m lora_lab -m stage=train rank=4,16 lr=1e-3,3e-4        a sweep: one run for each combination

Groups (GROUP=OPTION; the options are files in conf/GROUP)
{groups}

Knobs (KEY=VALUE, defaults of the demo)
{knobs}

Of the stages: {stage_keys}
--cfg job shows the whole configuration, -m sweeps over comma-separated values (it stands before the overrides).
"""


def help_text() -> str:
    groups = [f for f in sorted(config.CONF.iterdir()) if f.is_dir()]
    options = [(g.name, "  ".join(sorted(f.stem for f in g.glob("*.yaml")))) for g in groups]
    recipes = {f.stem for home in (config.HOME, Path.cwd()) for f in (home / "experiments").glob("*.yaml")}
    options.append(("experiment", "  ".join(sorted(recipes))))
    text = "\n".join((config.CONF / name).read_text(encoding="utf-8") for name in ("config.yaml", "model/tiny.yaml"))
    knobs = []
    for key in ("trigger", "name", "lr", "rank", "steps", "batch_size", "seed", "lora", "resume", "device"):
        value, _, meaning = re.search(rf"^{key}: (\S+)(  # (.*))?$", text, re.M).groups()
        knobs.append(f"  {key + '=' + value:<20} {meaning or ''}")
    shown = ("photo", "prompt", "strength", "mode", "form", "validate_every", "checkpoint_every", "prompts", "seeds")
    return HELP.format(
        groups="\n".join(f"  {name:<12} {choices}" for name, choices in options),
        knobs="\n".join(knobs),
        stage_keys=" ".join(f"stage.{key}" for key in shown),
    )


def explain(error: BaseException, overrides: list[str] = ()) -> str:
    """One sentence for an error of Hydra or OmegaConf: what was wrong, and the nearest right name."""
    if isinstance(error, InputError):
        return str(error)
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    where = next((m for e in chain if (m := re.match(r"In '(experiment/\S+)'", str(e)))), None)
    prefix = f"in {where[1]}.yaml: " if where else ""
    cause = next((e for e in reversed(chain) if isinstance(e, (OmegaConfBaseException, HydraException))), error)
    if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
        group, _, option = str(cause.missing_cfg_file).rpartition("/")
        choices = list(cause.options or [])
        return f"{prefix}{group}={option}: no such {group}{_nearest(option, choices)}; there are {', '.join(choices)}"
    if isinstance(cause, OverrideParseException):
        return f"{cause.override}: cannot be read as KEY=VALUE (quote text with spaces or commas: 'key=\"a, b\"')"
    if isinstance(cause, MissingMandatoryValue):
        return f"{_key(cause)} is missing: say {_key(cause)}=..."
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and not isinstance(cause, InterpolationKeyError):
        return prefix + _unknown(_key(cause))
    if isinstance(cause, ValidationError):
        return f"{prefix}{_key(cause)}: {_first_line(cause).lower().replace('value ', '', 1)}"
    return prefix + _first_line(cause)


def _unknown(key: str) -> str:
    return f"{key}: no such key{_nearest(key, config.known_keys())}"


def _nearest(word: str, choices: list[str]) -> str:
    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f", did you mean {found[0]}?" if found else ""


def _key(error: OmegaConfBaseException) -> str:
    return str(error.full_key or error.key)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def check(overrides: list[str], multirun: bool) -> None:
    """Compose and type every point that `overrides` ask for, before Hydra makes a folder. Raises InputError."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        for override in parsed:
            _refuse_additions(override)
        for point in _points(parsed) if multirun else [overrides]:
            with initialize_config_dir(str(config.CONF), version_base="1.3"):
                config.typed(compose("config", point))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, overrides)) from error


def _refuse_additions(override: Override) -> None:
    key = override.key_or_group
    if (override.is_add() or override.is_delete()) and not key.startswith("hydra"):
        sign = override.input_line[0]
        if key in config.known_keys() or (config.CONF / key).is_dir() or key == "experiment":
            raise InputError(f"{override.input_line}: {key} is part of every run, leave out the {sign}")
        raise InputError(f"{override.input_line}: {_unknown(key)}")


def _points(parsed: list[Override]) -> list[list[str]]:
    """The points of a sweep at which every swept value occurs at least once: as many as values, not their product."""
    fixed, swept = [], []
    for override in parsed:
        if override.value_type in (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP, ValueType.RANGE_SWEEP):
            values = list(override.sweep_string_iterator())
            swept.append([f"{override.key_or_group}={value}" for value in values])
        elif not override.is_sweep_override():
            fixed.append(override.input_line)
    first = [values[0] for values in swept]
    others = [[*first[:i], value, *first[i + 1 :]] for i, values in enumerate(swept) for value in values[1:]]
    return [[*fixed, *point] for point in [first, *others]]


def resumed(overrides: list[str]) -> list[str]:
    """With `resume=FOLDER` among them: the overrides that started that run, then the new ones, into that very folder.

    `latest` is the newest folder under outputs/ that has a checkpoint. Raises InputError if there is none."""
    given = {_name(o): o.partition("=")[2] for o in overrides}
    if given.get("resume") in (None, "null"):
        return overrides
    folder = _latest() if given["resume"] == "latest" else Path(given["resume"].strip("'\""))
    record = folder / ".hydra" / "overrides.yaml"
    if not record.is_file():
        raise InputError(f"resume={given['resume']}: {folder} is not a run folder (no {record} there)")
    before = [str(o) for o in OmegaConf.load(record)]
    kept = [o for o in before if _name(o) not in given and _name(o) != "resume"]
    new = [o for o in overrides if _name(o) not in ("resume", "hydra.run.dir")]
    quoted = QuotedString(str(folder), quote=_quote()).with_quotes()
    return [*kept, *new, f"resume={quoted}", f"hydra.run.dir={quoted}"]


def _quote():
    from hydra.core.override_parser.types import Quote

    return Quote.single


def _name(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _latest() -> Path:
    found = sorted(Path("outputs").glob("*/*/checkpoints/step-*"), key=lambda f: f.stat().st_mtime)
    if not found:
        raise InputError("resume=latest: no run under outputs/ has a checkpoint, name the run folder")
    return found[-1].parents[1]


def arguments(argv: list[str]):
    """Hydra's own reading of the command line: .overrides, .multirun, .cfg, .help, ..."""
    return get_args_parser().parse_args(argv)
