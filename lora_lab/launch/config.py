"""From conf/ and the command line to a checked Config, whose files, folders, models and packages exist.

Imports no torch. Hydra's loader composes the points of a sweep once for each choice of options: two points that choose
the same options differ in values alone. Hydra sets those last, on what it composed of the options, so that part, nine
tenths of the time, can be shared. A test compares the result with Hydra's own."""

import io
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir

# Hydra has no public way to set values on a composition.
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import load

try:
    from yaml import CSafeLoader as SafeLoader  # ten times as fast as the one in Python
except ImportError:
    from yaml import SafeLoader

from lora_lab import track
from lora_lab.base.locate import locate_folder, locate_model
from lora_lab.captions.captioner import check_captioner
from lora_lab.captions.refiner import check_refiner
from lora_lab.errors import InputError
from lora_lab.launch.recipes import CHAINS, CONF, keep_spelling, read_recipe, recipe_files, register_recipes
from lora_lab.settings.refusal import SettingError
from lora_lab.settings.schema import KEYS_OF_STAGES, STAGES, Config, Model, Packed, build_config, fields_of
from lora_lab.settings.setting import PARTS, at_home, default_of, defaults_of, facts_of, is_allowed, location_of

# Groups of options with keys of other libraries, which only their files in conf/ know, and where these keys belong.
OPTIONS = {name: name for name in ("captioner", "refiner", "adapter", "optimizer", "sampler")} | {"targets": "adapter"}
CALLED = ("captioner", "refiner", "adapter", "optimizer", "sampler.scheduler")  # what has a _target_, besides model
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
    """Give Hydra the defaults of every setting, and the way to every recipe."""
    store = ConfigStore.instance()
    store.store(name="schema", node=defaults_of(Config))
    store.store(group="hydra/launcher", name="packed", node=Packed, provider="lora_lab")
    for name, stage in STAGES.items():
        store.store(group="schema/stage", name=name, node=defaults_of(stage))
    register_recipes()


def compose(*overrides: str) -> Config:
    """The configuration that the command line would give, for notebooks: `compose("stage=train", "lr=1e-3")`."""
    register()
    return resolve(with_hydra([keep_spelling(override) for override in overrides]))


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
        composition = loader.load_configuration("config", overrides, run_mode=mode)
    for place in (composition.hydra.run, composition.hydra.sweep):
        place.dir = at_home(OmegaConf.to_container(place, resolve=False)["dir"])
    return composition


def composed(overrides: list[str]) -> DictConfig:
    """Hydra's composition, without its own part. Raises SettingError for a key that no file in conf/ has."""
    return without_hydra(with_hydra(overrides))


def without_hydra(composition: DictConfig) -> DictConfig:
    """A copy of `composition` without Hydra's part. Raises SettingError for a key that no file in conf/ has."""
    cfg, choices = deepcopy(composition), composition.hydra.runtime.choices
    with open_dict(cfg):
        del cfg["hydra"]
    if all(choices.get(group) for group in OPTIONS if group not in CHAINS):
        _refuse_unknown_keys(cfg, composition)
    return cfg


def _refuse_unknown_keys(cfg: DictConfig, composition: DictConfig) -> None:
    """Raise SettingError for a key of the open groups that the files of their options do not have."""
    choices, sources = composition.hydra.runtime.choices, composition.hydra.runtime.config_sources
    folders = [Path(source.path) for source in sources if source.schema == "file"]
    open_groups = {key: default_of(info) for key, info in fields_of() if facts_of(info).is_open}
    groups = tuple(f"{key}." for key in open_groups)
    keys = [key for key in keys_of(OmegaConf.to_container(cfg)) if key.startswith(groups)]
    chosen = {group: [choices[group]] if choices.get(group) else _options_of(folders, group) for group in OPTIONS}
    known = {key for group, options in chosen.items() for o in options for key in _keys_of_file(folders, group, o)}
    known |= {*keys_of(open_groups)}
    if all(key in known or key.startswith(PATTERNS) for key in keys):
        return
    # Only now, for it takes as long as the first: what Hydra composes of the options alone.
    search = [o for o in plain(composition.hydra.overrides.hydra) if o.startswith("hydra.searchpath")]
    options = with_hydra([*(f"{group}={choices[group]}" for group in OPTIONS if choices.get(group)), *search])
    own = {key: value for key, value in OmegaConf.to_container(options).items() if key != "hydra"}
    known = [*keys_of(own), *known]
    for key in keys:
        if key not in known and not key.startswith(PATTERNS):
            raise SettingError(key, unknown_key(key, known, KEYS_OF_STAGES))


def _options_of(folders: list[Path], group: str) -> list[str]:
    """All options of a group, for Hydra does not tell those of a chain."""
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


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
    refuse_targets(tree)
    config, unknown = build_config(tree)
    if unknown:
        known = [key for key in keys_of(tree) if key not in unknown]
        raise SettingError(unknown[0], unknown_key(unknown[0], known, KEYS_OF_STAGES))
    return config


def refuse_targets(tree: dict[str, Any]) -> None:
    """Raise SettingError for a `_target_` that the options in conf/ do not have, and that the user does not allow.

    What a stranger's recipe or record names would be called, and most of Python runs what it is given."""
    allowed = tree.get("allow_targets") or []
    for key, target in targets_of(tree):
        group, place = key.partition(".")[0], key.rpartition(".")[0]
        if place not in (*CALLED, "model"):
            raise SettingError(key, f"{key}={target}: only {', '.join(CALLED)} and model have a _target_, leave it out")
        if target not in _known_targets(group) and not is_allowed(str(target), [str(module) for module in allowed]):
            hint = f"allow_targets=[{str(target).partition('.')[0]}]"
            raise SettingError(
                key,
                f"{key}={target}: no option in conf/{group} has it, and no module of allow_targets defines it; if you "
                f"trust it, type {hint}, also when you resume a run",
            )


def targets_of(node: object, key: str = "") -> Iterator[tuple[str, object]]:
    """The dotted key and the value of every `_target_` in nested dicts and lists."""
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        inner = f"{key}.{name}".removeprefix(".")
        if name == "_target_":
            yield inner, value
        else:
            yield from targets_of(value, inner)


@cache  # a sweep asks for each of its points
def _known_targets(group: str) -> frozenset[object]:
    """Each `_target_` that the options of a group have."""
    texts = [file.read_text(encoding="utf-8") for file in (CONF / group).glob("*.yaml")]
    default = [Model.__pydantic_fields__["_target_"].default] if group == "model" else []
    return frozenset([*default, *re.findall(r"\b_target_: ([\w.]+)", "\n".join(texts))])


def _place(key: str, composition: DictConfig) -> str:
    """`in experiment/NAME.yaml: ` if `key` comes from the recipe and not from an override, else nothing."""
    name = composition.hydra.runtime.choices.get("experiment")
    overrides = [name_of(override) for override in plain(composition.hydra.overrides.task)]
    if name is None or any(key == override or key.startswith(f"{override}.") for override in overrides):
        return ""
    file = recipe_files().get(name)
    has_key = file is None or OmegaConf.select(OmegaConf.create(read_recipe(file)), key.partition("[")[0]) is not None
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
        elif (kinds[key] == "mask" and config.loss.masks != "folder") or (kinds[key] == "part" and value in PARTS):
            continue
        elif value is not None:
            check = locate_model if kinds[key] == "model" else locate_folder
            for name in value if isinstance(value, list) else [value]:
                check(key, str(name))


def _value(config: Config, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def plain(overrides: ListConfig) -> list[str]:
    """Overrides as they were typed: iterating OmegaConf's list would resolve the `${...}` in them."""
    return OmegaConf.to_container(overrides, resolve=False)


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


class Original:
    """A composition of which copies are made in a fifth of the time that OmegaConf's own take."""

    def __init__(self, composition: DictConfig) -> None:
        self.classes: list[type] = []  # not pickled, because Hydra imports its plugins twice
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer)
        pickler.persistent_id = self._number
        pickler.dump(composition)
        self.content = buffer.getvalue()

    def copy(self) -> DictConfig:
        """A new copy."""
        unpickler = pickle.Unpickler(io.BytesIO(self.content))
        unpickler.persistent_load = self.classes.__getitem__
        return unpickler.load()

    def _number(self, value: object) -> int | None:
        if not isinstance(value, type):
            return None
        if value not in self.classes:
            self.classes.append(value)
        return self.classes.index(value)


class SweepLoader(ConfigLoaderImpl):
    """ConfigLoaderImpl, with the compositions of earlier calls."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.compositions: dict[tuple[str, ...], Original] = {}  # options and Hydra's own keys -> their composition

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"compositions": {}}  # a launcher sends the loader to other processes with every job

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """As Hydra does it. Raises HydraException."""
        parsed = OverridesParser.create().parse_overrides(overrides)
        if run_mode == RunMode.MULTIRUN or not all(map(self._can_be_shared, parsed)):
            return super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
        key = (str(config_name), str(Path.cwd()), *(o.input_line for o in parsed if not self._is_value(o)))
        if key not in self.compositions:
            composition = super().load_configuration(config_name, list(key[2:]), run_mode, from_shell)
            self.compositions[key] = Original(composition)
        return self._with_values(self.compositions[key].copy(), parsed)

    def _can_be_shared(self, override: Override) -> bool:
        """Whether it is one value, or one option by its name, of the files of this program."""
        if override.is_sweep_override() or override.key_or_group == "hydra.searchpath":
            return False
        return self._is_value(override) or override.is_hydra_override() or not isinstance(override.value(), dict)

    def _is_value(self, override: Override) -> bool:
        return not override.is_hydra_override() and not self.repository.group_exists(override.key_or_group)

    def _with_values(self, composition: DictConfig, parsed: Sequence[Override]) -> DictConfig:
        """`composition` with the values among `parsed`, and the whole command line in its record."""
        hydra, task = composition.hydra, [override for override in parsed if not override.is_hydra_override()]
        try:
            self._apply_overrides_to_config([override for override in task if self._is_value(override)], composition)
        except OmegaConfBaseException as error:
            raise ConfigCompositionException from error
        hydra.overrides.task = [override.input_line for override in task]
        names = hydra.job.config.override_dirname
        hydra.job.override_dirname = get_overrides_dirname(
            overrides=task, exclude_keys=names.exclude_keys, item_sep=names.item_sep, kv_sep=names.kv_sep
        )
        return composition
