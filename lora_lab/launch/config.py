"""From conf/ and the command line to a checked Config. Beside command_line.py the only module that knows OmegaConf."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

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

from lora_lab.errors import InputError
from lora_lab.launch.keys import keys_of, unknown_key
from lora_lab.settings.schema import KEYS_OF_STAGES, STAGES, Config, Packed

PACKAGE = Path(__file__).resolve().parents[1]
# conf/ and experiments/ lie inside the package in a wheel, beside it in a checkout.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = HOME / "conf"

OPEN = ("adapter", "optimizer", "sampler")  # groups with keys of other libraries, known only to their files in conf/
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


@contextmanager
def hydra_loader() -> Iterator[ConfigLoader]:
    """Hydra's loader of conf/. Within the context it is Hydra's global one, which expands the glob() of a sweep."""
    outer = GlobalHydra.instance().hydra  # of a sweep whose job has an error to explain, or of a notebook
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), job_name="lora_lab", version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


def with_hydra(overrides: list[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    """Hydra's composition with its own part: the launcher, the sweeper, the folders.

    In the mode MULTIRUN it leaves out the overrides that are swept. Raises HydraException."""
    with hydra_loader() as loader:
        return loader.load_configuration("config", overrides, run_mode=mode)


def composed(overrides: list[str]) -> DictConfig:
    """Hydra's composition, without its own part. Raises InputError for a key that no file in conf/ has."""
    return without_hydra(with_hydra(overrides))


def without_hydra(composition: DictConfig) -> DictConfig:
    """A copy of `composition` without Hydra's part. Raises InputError for a key that no file in conf/ has."""
    cfg, choices = deepcopy(composition), composition.hydra.runtime.choices
    with open_dict(cfg):
        del cfg["hydra"]
    if all(choices.get(group) for group in OPEN):
        _refuse_unknown_keys(cfg, composition)
    return cfg


def _refuse_unknown_keys(cfg: DictConfig, composition: DictConfig) -> None:
    """Raise InputError for a key of the open groups that the files of their options do not have."""
    choices, sources = composition.hydra.runtime.choices, composition.hydra.runtime.config_sources
    folders = [Path(source.path) for source in sources if source.schema == "file"]
    keys = [key for key in keys_of(OmegaConf.to_container(cfg)) if key.partition(".")[0] in OPEN]
    known = set().union(*(_keys_of_file(folders, group, choices[group]) for group in OPEN))
    if all(key in known or key.startswith(PATTERNS) for key in keys):
        return
    # Only now, for it takes as long as the first: what Hydra composes of the options alone.
    search = [override for override in composition.hydra.overrides.hydra if override.startswith("hydra.searchpath")]
    options = with_hydra([*(f"{group}={choices[group]}" for group in OPEN), *search])
    known = keys_of({key: value for key, value in OmegaConf.to_container(options).items() if key != "hydra"})
    for key in keys:
        if key not in known and not key.startswith(PATTERNS):
            where = f"in experiment/{choices.experiment}.yaml: " if choices.get("experiment") else ""
            raise InputError(where + unknown_key(key, known, KEYS_OF_STAGES))


def _keys_of_file(folders: list[Path], group: str, option: str) -> set[str]:
    """The keys of an option's file and of the options of its group that it extends."""
    file = next((f for folder in folders if (f := folder / group / f"{option}.yaml").is_file()), None)
    if file is None:
        return set()
    content = load(file.read_text(encoding="utf-8"), SafeLoader) or {}
    bases = [entry.partition("@")[0] for entry in content.pop("defaults", []) if isinstance(entry, str)]
    return set(keys_of({group: content})).union(*(_keys_of_file(folders, group, base) for base in bases))


def typed(cfg: DictConfig) -> Config:
    """Leave OmegaConf behind: plain dataclasses from here on, every value checked."""
    strays = set(cfg) - {f.name for f in fields(Config)}
    if strays:
        raise InputError(f"unknown key: {', '.join(sorted(strays))} (a leading + goes past the schema: leave it out)")
    return OmegaConf.to_object(cfg)
