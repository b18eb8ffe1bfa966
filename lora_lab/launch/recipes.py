"""Recipes, and the command lines that runs leave: YAML files that may be a stranger's. The spelling of typed texts.

The files are read within bounds. They may set what this program's schema knows, and of Hydra's own keys the folders,
and a launcher or a sweeper by name with its numbers: whatever else Hydra has (callbacks, logging, search path, targets,
environment) can run code, so it counts only if it is typed on the command line.

Hydra's grammar takes `name=2024_01` for a number, and cannot read `dataset.root=두부 (1)`. Such values get the quotes
that keep them as they are typed."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Hydra has no public way to the tree of its grammar, which has the places of values in the text.
from antlr4 import CommonTokenStream, InputStream, ParserRuleContext, TerminalNode, Token
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

# OmegaConf has no public way to its rules for what is a number in YAML (1e-4 is one).
from omegaconf._utils import get_yaml_loader
from yaml import MappingNode, Node, ScalarNode

from lora_lab.board.record import read_yaml
from lora_lab.errors import InputError
from lora_lab.settings.schema import text_keys

OF_TEXTS = ("choice", "tag")  # functions of a sweep over texts; Hydra takes the quotes of their arguments away once
NUMBERS = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL)
NUMBER_IN_QUOTES = re.compile(
    r"(['\"])([+-]?(\d[\d_]*\.?[\d_]*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)|true|false)\1", re.IGNORECASE
)


def keep_spelling(override: str) -> str:
    """`override` with quotes around what is a number or true to Hydra, if its key wants a text, or a list of texts."""
    key = override.partition("=")[0]
    if key not in text_keys() or not parses(override):
        return override
    parser = OverrideParser(CommonTokenStream(OverrideLexer(InputStream(override))))
    for token, in_function in reversed([*_numbers(parser.override(), in_function=False)]):
        text = token.text.strip("'\"")
        quoted = f"\"'{text}'\"" if in_function else f"'{text}'"
        override = f"{override[: token.start]}{quoted}{override[token.stop + 1 :]}"
    return override


def _numbers(node: ParserRuleContext, in_function: bool) -> Iterator[tuple[Token, bool]]:
    """The numbers and truth values in the tree of an override, in a function also in quotes; and whether it is in one.

    In a dict only `root` is a text."""
    if isinstance(node, OverrideParser.PrimitiveContext):
        tokens = [child.symbol for child in node.getChildren() if child.symbol.type != OverrideLexer.WS]
        if len(tokens) == 1 and (
            tokens[0].type in NUMBERS or (in_function and NUMBER_IN_QUOTES.fullmatch(tokens[0].text))
        ):
            yield tokens[0], in_function
    elif not isinstance(node, TerminalNode) and not _holds_no_text(node):
        for child in node.getChildren():
            yield from _numbers(child, in_function or isinstance(node, OverrideParser.FunctionContext))


def _holds_no_text(node: ParserRuleContext) -> bool:
    if isinstance(node, OverrideParser.FunctionContext):
        return node.ID().getText() not in OF_TEXTS
    return isinstance(node, OverrideParser.DictKeyValuePairContext) and node.dictKey().getText() != "root"


def with_quotes(override: str, multirun: bool) -> str:
    """Put the quotes that Hydra requires around a value such as `두부 (1).jpg`, if no other reading is possible.

    In a list, where it takes no `~`, that is written as `$HOME`."""
    key, equals, value = override.partition("=")
    if parses(override) or not equals:
        return override
    if key in text_keys() and parses(at_home := re.sub(r"([\[,:]\s*)~(?=[/\\,\]])", r"\1$HOME", override)):
        return at_home
    if any(mark in value[:1] + value[-1:] for mark in "[]'\""):
        return override
    values = value.split(",") if multirun else [value]
    quoted = f"{key}={','.join(QuotedString(v, quote=Quote.single).with_quotes() for v in values)}"
    return quoted if parses(quoted) else override


def parses(override: str) -> bool:
    """Whether Hydra's grammar allows `override`."""
    try:
        return bool(OverridesParser.create().parse_override(override).key_or_group)
    except HydraException:
        return False


PACKAGE = Path(__file__).resolve().parents[1]
# conf/ and experiments/ lie inside the package in a wheel, beside it in a checkout.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = HOME / "conf"

# Hydra's own keys that a recipe or a record may set. Not among a launcher's: what a shell, pickle or eval would read.
LAUNCHERS = ("basic", "packed", "joblib", "submitit_local", "submitit_slurm", "ray")
SAMPLERS = ("tpe", "random", "cmaes", "nsgaii", "motpe", "grid")
CHAINS = ("refiner",)  # of which several options may be named, refiner=[rules,llm]: each has the keys of those before
HYDRA_OPTIONS = {"hydra/launcher": LAUNCHERS, "hydra/sweeper": ("basic", "optuna"), "hydra/sweeper/sampler": SAMPLERS}
HYDRA_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
KEYS_OF_LAUNCHERS = (
    "max_jobs", "workers", "n_jobs", "verbose", "timeout", "batch_size", "timeout_min", "cpus_per_task",
    "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name", "stderr_to_stdout", "partition", "qos", "comment",
    "constraint", "exclude", "gres", "cpus_per_gpu", "gpus_per_task", "mem_per_gpu", "mem_per_cpu", "account",
    "signal_delay_s", "max_num_timeout", "array_parallelism", "ray.init.num_cpus", "ray.init.num_gpus",
    "ray.init.object_store_memory", "ray.remote.num_cpus", "ray.remote.num_gpus",
)  # fmt: skip
KEYS_OF_SWEEPERS = (
    "max_batch_size", "direction", "study_name", "n_trials", "n_jobs", "max_failure_rate", "sampler.seed",
    "sampler.n_startup_trials", "sampler.n_ei_candidates", "sampler.multivariate", "sampler.group",
    "sampler.consider_prior", "sampler.prior_weight", "sampler.consider_magic_clip", "sampler.consider_endpoints",
    "sampler.constant_liar", "sampler.population_size", "sampler.sigma0", "sampler.warn_independent_sampling",
)  # fmt: skip
PARAMS = "hydra.sweeper.params."  # below it the keys are overrides themselves
HYDRA_KEYS = {
    "hydra.mode", *HYDRA_FOLDERS, *(f"hydra.launcher.{key}" for key in KEYS_OF_LAUNCHERS),
    *(f"hydra.sweeper.{key}" for key in KEYS_OF_SWEEPERS),
}  # fmt: skip
OPTION = re.compile(r"[\w+-]+(\.[\w+-]+)*")  # the name of an option, and no path to a file elsewhere
PLAIN = re.compile(r"[\w .,:+/-]*")  # what no launcher takes for a line of its script, and Hydra for no call
CHOICE = re.compile(r"(?:optional )?(?:override )?/?([\w/]+)")  # how a defaults list names a group


def recipe_files(folder: Path | None = None) -> dict[str, Path]:
    """The file of every recipe by name; one in ./experiments, or in that of `folder`, hides the package's."""
    folders = (HOME / "experiments", (folder or Path.cwd()) / "experiments")
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def register_recipes() -> None:
    """Let Hydra find recipes as the options of the group `experiment`; each is read when it is chosen."""
    Plugins.instance().register(RecipeSource)
    Plugins.instance().register(RecipeSearchPath)


class RecipeSource(ConfigSource):
    """The recipes of the package and of a working folder, whose path it has: jobs may run in another one."""

    @staticmethod
    def scheme() -> str:
        return "recipes"

    def load_config(self, config_path: str) -> ConfigResult:
        """The recipe. Raises InputError if it cannot be read, or sets what is not for a recipe."""
        name = self._name(config_path)
        recipe = OmegaConf.create(read_recipe(recipe_files(Path(self.path))[name]))
        return ConfigResult("lora_lab", self.full_path(), recipe, {"package": "_global_"})

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") == "experiment"

    def is_config(self, config_path: str) -> bool:
        return self._name(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        if not config_path.strip("/"):
            return [] if results_filter == ObjectType.CONFIG else ["experiment"]
        return sorted(recipe_files(Path(self.path))) if self.is_group(config_path) else []

    def _name(self, config_path: str) -> str | None:
        group, _, name = config_path.strip("/").removesuffix(".yaml").rpartition("/")
        return name if group == "experiment" and name in recipe_files(Path(self.path)) else None


class RecipeSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("lora_lab", f"{RecipeSource.scheme()}://{Path.cwd()}")


def _spell(node: Node, key: str, texts: frozenset[str]) -> None:
    """Tag as texts what `node`, the value of the dotted `key`, has at the keys `texts`."""
    if isinstance(node, MappingNode):
        for name, value in node.value:
            inner = str(name.value)
            _spell(value, key if key in texts and inner == "root" else f"{key}.{inner}".removeprefix("."), texts)
    elif isinstance(node, ScalarNode):
        if key in texts and node.style is None and node.tag.rpartition(":")[2] in ("int", "float", "bool"):
            node.tag = "tag:yaml.org,2002:str"
    else:
        for item in node.value:
            _spell(item, key, texts)


def read_recipe(file: Path) -> dict[str, Any]:
    """The content of a recipe. Raises InputError if it cannot be read, or sets what is not for a recipe."""
    recipe = read_yaml(file, get_yaml_loader(), lambda root: _spell(root, "", frozenset(text_keys())))
    if not isinstance(recipe, dict):
        raise InputError(f"{file} cannot be read: it is not a list of KEY: VALUE")
    origin = f"in experiment/{file.stem}.yaml"
    for entry in recipe.get("defaults") or []:
        _refuse_entry(entry, origin)
    if "allow_targets" in recipe:
        raise InputError(f"{origin}: allow_targets is only for the command line")
    hydra = recipe.get("hydra") or {}
    sweeper = hydra.get("sweeper") if isinstance(hydra, dict) else None
    params = sweeper.get("params") if isinstance(sweeper, dict) else None
    for key, values in params.items() if isinstance(params, dict) else ():
        params[key] = keep_spelling(f"{key}={values}").partition("=")[2] if isinstance(values, str) else values
    for key, value in _leaves(hydra, "hydra"):
        _refuse_hydra(key, value, origin)
    return recipe


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The dotted keys and values; below `hydra.sweeper.params` a key is one, whatever dots it has."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}")
    else:
        yield key, value


def _refuse_entry(entry: Any, origin: str) -> None:
    """Raise InputError for an entry of a defaults list that is not `GROUP: OPTION`, `override /GROUP: OPTION` or the
    name of another recipe."""
    pairs = entry.items() if isinstance(entry, dict) else [("/experiment", entry)]
    for group, option in pairs:
        match = CHOICE.fullmatch(str(group))
        if not match:
            raise InputError(f"{origin}: defaults: {group} names no group, write override /GROUP: OPTION")
        name = option.removeprefix("/experiment/") if isinstance(option, str) else option
        if option is not None and name != "_self_":
            _refuse_option(match[1], name, origin)


def _refuse_option(group: str, option: Any, origin: str) -> None:
    """Raise InputError for an option that is a path to some file, or one of Hydra's that is not for a stranger."""
    chain = re.fullmatch(r"\[(.+)\]", option) if isinstance(option, str) else None  # of a sweep
    names = chain[1].split(",") if chain else option
    if group in CHAINS and isinstance(names, list) and names:
        for name in names:
            _refuse_option(group, name, origin)
        return
    if not OPTION.fullmatch(str(option)):
        raise InputError(f"{origin}: {group}={option}: not the name of an option")
    names = HYDRA_OPTIONS.get(group, ()) if group.startswith("hydra") else None
    if names is not None and option not in names:
        raise _only_typed(origin, f"{group}={option}")


def refuse_foreign(overrides: Sequence[str], origin: str) -> None:
    """Raise InputError, which begins with `origin`, for an override of a record that only a person may type."""
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            raise InputError(f"{origin}: {text[:200]}: cannot be read as KEY=VALUE") from None
        _refuse_override(override, origin)


def _refuse_override(override: Override, origin: str) -> None:
    key = override.key_or_group
    if override.package is not None:
        raise _only_typed(origin, f"{key}@{override.package}")
    if key == "allow_targets":
        raise InputError(f"{origin}: allow_targets is only for the command line")
    if key in HYDRA_OPTIONS or (CONF / key).is_dir() or key == "experiment":
        for option in _values(override):
            _refuse_option(key, option, origin)
    elif key.partition(".")[0].partition("/")[0] == "hydra":
        for value in _values(override):
            _refuse_hydra(key, value, origin)


def _values(override: Override) -> list[Any]:
    """The values of an override, one unless it is swept; as text, but for those of a dict or a list."""
    value = override.value()
    if not override.is_sweep_override():
        return [] if value is None else [value if isinstance(value, (dict, list)) else str(value)]
    if isinstance(value, Glob):  # of the names that the group has
        return []
    return [text.strip("'\"") for text in override.sweep_string_iterator()]


def _refuse_hydra(key: str, value: Any, origin: str) -> None:
    """Raise InputError for a key of Hydra's own part, unless it is harmless whatever its value."""
    if key.startswith(PARAMS):
        refuse_foreign([f"{key.removeprefix(PARAMS)}={value}"], origin)
    elif key in HYDRA_FOLDERS:
        outside = key == "hydra.sweep.subdir" and str(value).startswith(("/", "~", "\\"))
        if outside or not isinstance(value, str) or ".." in re.split(r"[/\\]", value):
            raise _only_typed(origin, f"{key}={value}")
    elif value not in ({}, None) and (key not in HYDRA_KEYS or not PLAIN.fullmatch(str(value))):
        raise _only_typed(origin, key)


def _only_typed(origin: str, what: str) -> InputError:
    return InputError(
        f"{origin}: {what}: of Hydra's keys only folders, and launchers and sweepers by name, are taken from a file; "
        "if you trust it, type it on the command line"
    )
