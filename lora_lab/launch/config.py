"""From conf/ and the command line to a checked Config, whose files, folders, models and packages exist.

Imports no torch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from yaml import YAMLError, load

try:
    from yaml import CSafeLoader as SafeLoader  # ten times as fast as the one in Python
except ImportError:
    from yaml import SafeLoader

from lora_lab import track
from lora_lab.base.locate import locate_folder, locate_model
from lora_lab.captions.captioner import check_captioner
from lora_lab.captions.refiner import check_refiner
from lora_lab.errors import InputError
from lora_lab.launch.loader import SweepLoader
from lora_lab.settings.refusal import SettingError
from lora_lab.settings.schema import KEYS_OF_STAGES, STAGES, Config, Packed, build_config, fields_of
from lora_lab.settings.setting import defaults_of, facts_of, location_of

PACKAGE = Path(__file__).resolve().parents[1]
# conf/ and experiments/ lie inside the package in a wheel, beside it in a checkout.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = HOME / "conf"

# Groups of options with keys of other libraries, which only their files in conf/ know, and where these keys belong.
OPTIONS = {name: name for name in ("captioner", "refiner", "adapter", "optimizer", "sampler")} | {"targets": "adapter"}
PATTERNS = ("adapter.rank_pattern.", "adapter.alpha_pattern.")  # below these the user's own patterns are the keys

# How to install the launchers and sweepers that are packages of their own. Ray's requires an older cloudpickle than the
# others do, but works with theirs, so it is installed without its requirements.
INSTALL = {
    "joblib": 'pip install "lora_lab[joblib]"',
    "submitit_local": 'pip install "lora_lab[submitit]"',
    "submitit_slurm": 'pip install "lora_lab[submitit]"',
    "ray": 'pip install "lora_lab[ray]" && pip install --no-deps hydra-ray-launcher==1.2.2',
    "optuna": 'pip install "lora_lab[optuna]"',
}


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
    return resolve(with_hydra([*overrides]))


def resolve(composition: DictConfig) -> Config:
    """The checked configuration of what Hydra composed. Raises InputError, which names the recipe with the error."""
    try:
        return typed(without_hydra(composition))
    except SettingError as error:
        raise InputError(_place(error.key, composition) + str(error)) from error


@contextmanager
def hydra_loader() -> Iterator[ConfigLoader]:
    """Hydra's loader of conf/. Within the context it is Hydra's global one, which expands the glob() of a sweep."""
    outer = GlobalHydra.instance().hydra  # of a sweep whose job has an error to explain, or of a notebook
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), job_name="lora_lab", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            hydra.config_loader = SweepLoader(hydra.config_loader.get_search_path())
            yield hydra.config_loader
    finally:
        GlobalHydra.instance().hydra = outer


def with_hydra(overrides: list[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    """Hydra's composition with its own part: the launcher, the sweeper, the folders.

    In the mode MULTIRUN it leaves out the overrides that are swept. Raises HydraException."""
    with hydra_loader() as loader:
        return loader.load_configuration("config", overrides, run_mode=mode)


def composed(overrides: list[str]) -> DictConfig:
    """Hydra's composition, without its own part. Raises SettingError for a key that no file in conf/ has."""
    return without_hydra(with_hydra(overrides))


def without_hydra(composition: DictConfig) -> DictConfig:
    """A copy of `composition` without Hydra's part. Raises SettingError for a key that no file in conf/ has."""
    cfg, choices = deepcopy(composition), composition.hydra.runtime.choices
    with open_dict(cfg):
        del cfg["hydra"]
    if all(choices.get(group) for group in OPTIONS):
        _refuse_unknown_keys(cfg, composition)
    return cfg


def _refuse_unknown_keys(cfg: DictConfig, composition: DictConfig) -> None:
    """Raise SettingError for a key of the open groups that the files of their options do not have."""
    choices, sources = composition.hydra.runtime.choices, composition.hydra.runtime.config_sources
    folders = [Path(source.path) for source in sources if source.schema == "file"]
    groups = tuple(f"{key}." for key, info in fields_of() if facts_of(info).is_open)
    keys = [key for key in keys_of(OmegaConf.to_container(cfg)) if key.startswith(groups)]
    known = set().union(*(_keys_of_file(folders, group, choices[group]) for group in OPTIONS))
    if all(key in known or key.startswith(PATTERNS) for key in keys):
        return
    # Only now, for it takes as long as the first: what Hydra composes of the options alone.
    search = [override for override in composition.hydra.overrides.hydra if override.startswith("hydra.searchpath")]
    options = with_hydra([*(f"{group}={choices[group]}" for group in OPTIONS), *search])
    known = keys_of({key: value for key, value in OmegaConf.to_container(options).items() if key != "hydra"})
    for key in keys:
        if key not in known and not key.startswith(PATTERNS):
            raise SettingError(key, unknown_key(key, known, KEYS_OF_STAGES))


def _keys_of_file(folders: list[Path], group: str, option: str) -> set[str]:
    """The keys of an option's file and of the options of its group that it extends."""
    file = next((f for folder in folders if (f := folder / group / f"{option}.yaml").is_file()), None)
    if file is None:
        return set()
    content = load(file.read_text(encoding="utf-8"), SafeLoader) or {}
    bases = [entry.partition("@")[0] for entry in content.pop("defaults", []) if isinstance(entry, str)]
    return set(keys_of({OPTIONS[group]: content})).union(*(_keys_of_file(folders, group, base) for base in bases))


def typed(cfg: DictConfig) -> Config:
    """The checked configuration without OmegaConf. Raises InputError for an unknown key and for a wrong value."""
    tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    config, unknown = build_config(tree)
    if unknown:
        known = [key for key in keys_of(tree) if key not in unknown]
        raise SettingError(unknown[0], unknown_key(unknown[0], known, KEYS_OF_STAGES))
    return config


def _place(key: str, composition: DictConfig) -> str:
    """`in experiment/NAME.yaml: ` if `key` comes from the recipe and not from an override, else nothing."""
    name = composition.hydra.runtime.choices.get("experiment")
    overrides = [override.partition("=")[0].lstrip("+~") for override in composition.hydra.overrides.task]
    if name is None or any(key == override or key.startswith(f"{override}.") for override in overrides):
        return ""
    recipe = ConfigStore.instance().repo.get("experiment", {}).get(f"{name}.yaml")
    has_key = recipe is None or OmegaConf.select(recipe.node, key.partition("[")[0]) is not None
    return f"in experiment/{name}.yaml: " if has_key else ""


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
            track.validate(config.tracker)
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


def name_of(override: str) -> str:
    """The key that an override names: `lr` of `+lr=1e-4`."""
    return override.partition("=")[0].lstrip("+~")


def nearest(word: str, choices: Sequence[str], cutoff: float = 0.5) -> str:
    """', did you mean X?', or nothing where no choice is like `word`."""
    matches = get_close_matches(word, choices, n=1, cutoff=cutoff)
    return f", did you mean {matches[0]}?" if matches else ""


def keys_of(tree: Mapping[str, object], prefix: str = "") -> list[str]:
    """Every key of a nested dict, dotted: `lr`, `optimizer`, `optimizer.lr`, `stage.photo`, ..."""
    keys = []
    for key, value in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += keys_of(value, f"{prefix}{key}.")
    return keys


def unknown_key(key: str, known: Sequence[str], of_stages: Mapping[str, Sequence[str]]) -> str:
    """The sentence for a key that is not among `known`. It offers a key of nearly that name in the same group, else one
    of another stage (`of_stages` has the keys of each), else one anywhere."""
    parent, _, leaf = key.rpartition(".")
    siblings = {_leaf(k): k for k in known if k.rpartition(".")[0] == parent}
    others = {k: f"stage.{k} of stage={name}" for name, keys in of_stages.items() for k in keys if parent == "stage"}
    everywhere = {_leaf(k): k for k in reversed(known)}  # the first of several keys of one name wins
    for keys, cutoff in ((siblings, 0.6), (others, 0.7), (everywhere, 0.7)):
        matches = get_close_matches(leaf, keys, n=1, cutoff=cutoff)
        if matches:
            return f"{key}: no such key, did you mean {keys[matches[0]]}?"
    hint = f"{parent} has {', '.join(siblings)}" if parent and siblings else "--cfg job shows all keys"
    return f"{key}: no such key; {hint}"


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]
