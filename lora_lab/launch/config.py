"""From conf/ and the command line to a checked Config. OmegaConf is used here and in command_line.py."""

from collections.abc import Iterator, Sequence
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
from lora_lab.settings.refusal import SettingError
from lora_lab.settings.schema import KEYS_OF_STAGES, STAGES, Config, Packed, build_config
from lora_lab.settings.setting import defaults_of

PACKAGE = Path(__file__).resolve().parents[1]
# conf/ and experiments/ lie inside the package in a wheel, beside it in a checkout.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = HOME / "conf"

# Groups whose options name a class or function by `_target_`: its keys are known only to their files in conf/.
OPEN = ("captioner", "refiner", "adapter", "optimizer", "sampler")
PATTERNS = ("adapter.rank_pattern.", "adapter.alpha_pattern.")  # below these the user's own patterns are the keys


def register() -> None:
    """Give Hydra the defaults of every setting, and every recipe: the package's and those in ./experiments."""
    store = ConfigStore.instance()
    store.store(name="schema", node=defaults_of(Config))
    store.store(group="hydra/launcher", name="packed", node=Packed, provider="lora_lab")
    for name, stage in STAGES.items():
        store.store(group="schema/stage", name=name, node=defaults_of(stage))
    store.repo.pop("experiment", None)  # of another working folder, in a notebook or a test
    for name, file in recipe_files().items():
        try:
            store.store(group="experiment", name=name, node=_read_recipe(file), package="_global_")
        except InputError:
            continue  # only a run that names this recipe is refused: see unreadable_recipe


def recipe_files() -> dict[str, Path]:
    """The file of every recipe by name; one in ./experiments hides the package's of that name."""
    folders = (HOME / "experiments", Path.cwd() / "experiments")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def unreadable_recipe(name: str) -> str | None:
    """Why the recipe `name` cannot be read; None if it can, or if there is none."""
    try:
        _read_recipe(recipe_files()[name])
    except KeyError:
        return None
    except InputError as error:
        return str(error)
    return None


def _read_recipe(file: Path) -> DictConfig:
    try:
        recipe = OmegaConf.load(file)
        if not isinstance(recipe, DictConfig):
            raise ValueError("it is not a list of KEY: VALUE")
    except (YAMLError, ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    return recipe


def compose(*overrides: str) -> Config:
    """The configuration that the command line would give, for notebooks: `compose("stage=train", "lr=1e-3")`."""
    register()
    return resolve(overrides)


def resolve(overrides: Sequence[str]) -> Config:
    """The checked configuration of a command line. Raises InputError, which names the recipe that has the error."""
    try:
        return typed(composed([*overrides]))
    except SettingError as error:
        raise InputError(_place(error.key, overrides) + str(error)) from error


def with_hydra(overrides: list[str]) -> DictConfig:
    """Hydra's composition with Hydra's own part: the launcher, the sweeper, the folders."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose("config", overrides, return_hydra_config=True)


def composed(overrides: list[str]) -> DictConfig:
    """Hydra's composition without Hydra's own part. Raises SettingError for an unknown key of an open group."""
    cfg = with_hydra(overrides)
    choices, search = cfg.hydra.runtime.choices, [o for o in overrides if o.startswith("hydra.searchpath")]
    with open_dict(cfg):
        del cfg["hydra"]
    # Hydra refuses the unknown keys of overrides, but not those of recipes and of overrides that are groups.
    merges = choices.get("experiment") or any("={" in override for override in overrides)
    if merges and all(choices.get(group) for group in OPEN):
        known = _keys_of_options((*(f"{group}={choices[group]}" for group in OPEN), *search))
        for key in keys_of(OmegaConf.to_container(cfg)):
            if key.partition(".")[0] in OPEN and key not in known and not key.startswith(PATTERNS):
                raise SettingError(key, unknown_key(key, [*known], KEYS_OF_STAGES))
    return cfg


def typed(cfg: DictConfig) -> Config:
    """The checked configuration without OmegaConf. Raises InputError for an unknown key and for a wrong value."""
    tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    config, unknown = build_config(tree)
    if unknown:
        known = [key for key in keys_of(tree) if key not in unknown]
        raise SettingError(unknown[0], unknown_key(unknown[0], known, KEYS_OF_STAGES))
    return config


def _place(key: str, overrides: Sequence[str]) -> str:
    """`in experiment/NAME.yaml: ` if `key` comes from the recipe of `overrides`, else nothing."""
    values = {name.lstrip("+~"): value for name, _, value in (override.partition("=") for override in overrides)}
    name = values.get("experiment")
    if name is None or any(key == override or key.startswith(f"{override}.") for override in values):
        return ""
    recipe = ConfigStore.instance().repo.get("experiment", {}).get(f"{name}.yaml")
    has_key = recipe is not None and OmegaConf.select(recipe.node, key.partition("[")[0]) is not None
    return f"in experiment/{name}.yaml: " if has_key else ""


def recorded(run: Path) -> tuple[dict[str, Any], list[str]]:
    """Every key of a run, dotted, with the option of every group, and the overrides, as Hydra wrote them.

    Empty for a run whose record is missing or incomplete."""
    files = [run.absolute() / ".hydra" / f"{name}.yaml" for name in ("config", "hydra", "overrides")]
    try:
        return _recorded(*((file, file.stat().st_mtime_ns) for file in files))
    except (OSError, YAMLError, OmegaConfBaseException, TypeError, KeyError, ValueError, AttributeError):
        return {}, []


@lru_cache(1000)  # a sweep's page reads them again after every job: 40 ms a run
def _recorded(*files: tuple[Path, int]) -> tuple[dict[str, Any], list[str]]:
    """What the three files held at their modification times."""
    config, hydra, overrides = (load(file.read_text(encoding="utf-8"), SafeLoader) for file, _ in files)
    settings = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    choices = hydra["hydra"]["runtime"]["choices"]
    options = {key: option for key, option in choices.items() if not key.startswith("hydra/")}
    return dict(_dotted(settings)) | options, [str(override) for override in overrides]


def _dotted(node: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


@cache
def _keys_of_options(overrides: tuple[str, ...]) -> tuple[str, ...]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return tuple(keys_of(OmegaConf.to_container(hydra_compose("config", list(overrides)))))
