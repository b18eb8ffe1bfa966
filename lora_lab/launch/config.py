"""From conf/ and the command line to a checked Config. Beside command_line.py the only module that knows OmegaConf."""

from collections.abc import Iterator
from dataclasses import fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, load

try:
    from yaml import CSafeLoader as SafeLoader  # a sweep has a hundred files, and Python takes 30 ms for one
except ImportError:
    from yaml import SafeLoader

from lora_lab.errors import InputError
from lora_lab.launch.keys import keys_of, unknown_key
from lora_lab.settings.schema import KEYS_OF_STAGES, STAGES, Config, Packed

PACKAGE = Path(__file__).resolve().parents[1]
# conf/ and experiments/ lie inside the package in a wheel, beside it in a checkout.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = HOME / "conf"

# Groups whose options name a class or function by `_target_`: its keys are known only to their files in conf/.
OPEN = ("captioner", "refiner", "adapter", "optimizer", "sampler")
PATTERNS = ("adapter.rank_pattern.", "adapter.alpha_pattern.")  # below these the user's own patterns are the keys

unreadable_recipes: dict[str, str] = {}  # name -> why; only a run that asks for one is told


def register() -> None:
    """Tell Hydra about the schema and about every recipe, the package's and those in ./experiments."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="hydra/launcher", name="packed", node=Packed, provider="lora_lab")
    for name, schema in STAGES.items():
        store.store(group="schema/stage", name=name, node=schema)
    store.repo.pop("experiment", None)  # of another working folder, in a notebook or a test
    unreadable_recipes.clear()
    for folder in dict.fromkeys((HOME / "experiments", Path.cwd() / "experiments")):
        for file in sorted(folder.glob("*.yaml")):
            try:
                recipe = OmegaConf.load(file)
                if not isinstance(recipe, DictConfig):
                    raise ValueError("it is not a list of KEY: VALUE")
            except (YAMLError, ValueError, OSError) as error:
                unreadable_recipes[file.stem] = f"{file} cannot be read: {' '.join(str(error).split())}"
                continue
            store.store(group="experiment", name=file.stem, node=recipe, package="_global_")


def compose(*overrides: str) -> Config:
    """What the command line would give, for notebooks and tests: `compose("stage=train", "lr=1e-3")`."""
    register()
    return typed(composed(list(overrides)))


def with_hydra(overrides: list[str]) -> DictConfig:
    """Hydra's composition with its own part: the launcher, the sweeper, the folders."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", overrides, return_hydra_config=True)


def composed(overrides: list[str]) -> DictConfig:
    """Hydra's composition, without its own part. Raises InputError for a key that no file in conf/ has."""
    cfg = with_hydra(overrides)
    choices, search = cfg.hydra.runtime.choices, [o for o in overrides if o.startswith("hydra.searchpath")]
    with open_dict(cfg):
        del cfg["hydra"]
    if all(choices.get(group) for group in OPEN):
        known = _keys_of_options((*(f"{group}={choices[group]}" for group in OPEN), *search))
        for key in keys_of(OmegaConf.to_container(cfg)):
            if key.partition(".")[0] in OPEN and key not in known and not key.startswith(PATTERNS):
                where = f"in experiment/{choices.experiment}.yaml: " if choices.get("experiment") else ""
                raise InputError(where + unknown_key(key, known, KEYS_OF_STAGES))
    return cfg


def typed(cfg: DictConfig) -> Config:
    """Leave OmegaConf behind: plain dataclasses from here on, every value checked."""
    strays = set(cfg) - {f.name for f in fields(Config)}
    if strays:
        raise InputError(f"unknown key: {', '.join(sorted(strays))} (a leading + goes past the schema: leave it out)")
    return OmegaConf.to_object(cfg)


def recorded(run: Path) -> tuple[dict[str, Any], list[str]]:
    """Every key of a run, dotted, with the option of every group, and its overrides, as Hydra wrote them down.

    Nothing of a run whose record is not there, or not yet whole."""
    files = [run.absolute() / ".hydra" / f"{name}.yaml" for name in ("config", "hydra", "overrides")]
    try:
        return _recorded(*((file, file.stat().st_mtime_ns) for file in files))
    except (OSError, YAMLError, OmegaConfBaseException, TypeError, KeyError, ValueError, AttributeError):
        return {}, []


@lru_cache(1000)  # a sweep's page reads them again after every job: 40 ms a run
def _recorded(*files: tuple[Path, int]) -> tuple[dict[str, Any], list[str]]:
    """Of the three files as they were at those times."""
    its_config, its_hydra, overrides = (load(file.read_text(encoding="utf-8"), SafeLoader) for file, _ in files)
    settings = OmegaConf.to_container(OmegaConf.create(its_config), resolve=True)
    choices = its_hydra["hydra"]["runtime"]["choices"]
    options = {key: option for key, option in choices.items() if not key.startswith("hydra/")}
    return dict(_dotted(settings)) | options, [str(override) for override in overrides]


def _dotted(node: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


@cache
def _keys_of_options(overrides: tuple[str, ...]) -> list[str]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return keys_of(OmegaConf.to_container(hydra_compose("config", list(overrides))))
