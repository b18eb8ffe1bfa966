"""How a setting is declared: its type, default, bounds and meaning, and what it decides.

The second part imports the class or function that an option names by `_target_` (adapters, optimizers, captioners,
refiners) and checks its arguments before any work."""

import inspect
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, PydanticUndefined

from lora_lab.errors import InputError

# Optional packages and the extra in pyproject.toml that installs them.
EXTRAS = {"prodigyopt": "optimizers", "schedulefree": "optimizers", "pytorch_optimizer": "optimizers"}
# A YAML value such as 2026 is accepted where a string is expected; annotations may name any class.
LENIENT = ConfigDict(coerce_numbers_to_str=True, arbitrary_types_allowed=True)
BAD_ARGUMENTS = (ImportError, OSError, TypeError, ValueError, LookupError, AttributeError)
# What a setting decides. `weights`: the weights that training ends with. `images`: what the base and a LoRA draw for
# one prompt and seed. `request`: what is asked for (prompts, seeds, photos, which LoRA, what is measured). `cost`: time
# and memory; the results are the same but for rounding. `nothing`: names, places and bookkeeping.
Decision = Literal["weights", "images", "request", "cost", "nothing"]


@dataclass(frozen=True)
class Facts:
    """What a setting decides and where it may differ."""

    decides: tuple[Decision, ...]
    per_job: bool  # whether the jobs of a pack may differ in it
    hashed_as: str | None = None  # a resumed run compares this hash of what the setting names, not the name itself
    may_change: str | None = None  # why a resumed run may change it although it decides the weights
    default_from: str | None = None  # the key whose value is the default
    is_open: bool = False  # a group of another library's keyword arguments
    bounds: tuple[tuple[str, "Bounds"], ...] = ()  # of an open group: those of its numbers
    of_keys: tuple[tuple[str, "Facts"], ...] = ()  # of an open group: the keys whose facts are not the group's
    own: tuple[tuple[str, str], ...] = ()  # of an open group: the meaning of the keys that every option has

    def of(self, key: str) -> "Facts":
        """The facts of `key` in this open group."""
        return dict(self.of_keys).get(key, replace(self, of_keys=(), bounds=(), own=(), is_open=False))


@dataclass(frozen=True)
class Bounds:
    """What a number of another library's keys, or each number of a list, must lie in; None is no bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    hint: str = ""  # what a value outside may have meant

    def hold(self, number: float) -> bool:
        """Whether `number` lies within; nan does not."""
        within = (self.ge is None or number >= self.ge) and (self.gt is None or number > self.gt)
        return within and (self.le is None or number <= self.le) and (self.lt is None or number < self.lt)

    def text(self) -> str:
        """`above 0`, ..."""
        return bounds_text({n: v for n in ("ge", "gt", "le", "lt") if (v := getattr(self, n)) is not None})


@dataclass(frozen=True)
class Location:
    """Marks a setting that names a place, in which `~` and `$HOME` are replaced. A stage may require that it exists
    (see `lora_lab.launch.config`), except that of a `path`."""

    kind: Literal["path", "folder", "dataset", "mask", "part", "model", "tracker", "captioner", "refiner"]


AnyPath = Annotated[str, Location("path")]
FolderPath = Annotated[str, Location("folder")]
ModelLocation = Annotated[str, Location("model")]  # a hub id, a folder or a file
MaskSource = Annotated[str, Location("mask")]  # none, alpha or a folder
PhotoPart = Annotated[str, Location("part")]  # person, background, a folder or a file
TrackerName = Annotated[str, Location("tracker")]
# OmegaConf has no union of a text and a list; the stages and Dataset check what is in them.
DatasetRoot = Annotated[Any, Location("dataset")]
FolderPaths = Annotated[Any, Location("folder")]
AnyPaths = Annotated[Any, Location("path")]
PARTS = ("person", "background")  # of a photo, as masks
SEEDS = 2**64  # seeds of torch lie below
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
LARGEST = 3.4e38  # of a number of 32 bits, in which training computes


def setting(
    meaning: str,
    *,
    decides: Decision | tuple[Decision, ...],
    per_job: bool = False,
    hashed_as: str | None = None,
    may_change: str | None = None,
    default_from: str | None = None,
    **rest: Any,
) -> Any:
    """A field of a section. `rest` is pydantic's: default, default_factory, ge, gt, le, lt.

    Without default and default_from an option of conf/ must give the value."""
    facts = Facts((decides,) if isinstance(decides, str) else decides, per_job, hashed_as, may_change, default_from)
    return Field(description=meaning, json_schema_extra={"facts": facts}, **rest)


def open_group(
    meaning: str,
    *,
    decides: Decision | tuple[Decision, ...],
    per_job: bool | Collection[str] = False,
    hashed_as: str | None = None,
    decide_nothing: Collection[str] = (),
    bounds: Mapping[str, Bounds] | None = None,
    own: Mapping[str, tuple[Any, str]] | None = None,
) -> Any:
    """A field of another library's keyword arguments: the options in conf/ know the keys and explain them.

    `per_job` may name the keys in which the jobs of a pack may differ; `decide_nothing` names those that only describe
    the rest; `bounds` are those of numbers, which the library itself would not refuse before work begins. `own` has the
    default and the meaning of keys that every option has and that are not passed to the library."""
    decides = (decides,) if isinstance(decides, str) else decides
    defaults, meanings = ({key: pair[i] for key, pair in (own or {}).items()} for i in (0, 1))
    group = Facts(
        decides,
        per_job is True,
        hashed_as,
        is_open=True,
        bounds=tuple((bounds or {}).items()),
        own=tuple(meanings.items()),
    )
    exceptions = {} if isinstance(per_job, bool) else {key: Facts(decides, True, hashed_as) for key in per_job}
    exceptions |= {key: Facts(("nothing",), group.per_job) for key in decide_nothing}
    group = replace(group, of_keys=tuple(sorted(exceptions.items())))
    return Field(default_factory=lambda: deepcopy(defaults), description=meaning, json_schema_extra={"facts": group})


def facts_of(info: FieldInfo) -> Facts | None:
    """The facts of a field; None of a field that is a section."""
    return info.json_schema_extra["facts"] if isinstance(info.json_schema_extra, dict) else None


def location_of(info: FieldInfo) -> Location | None:
    """What a field names, if that must exist."""
    return next((p for p in (*info.metadata, *_parts_of(info.annotation)) if isinstance(p, Location)), None)


def choices_of(info: FieldInfo) -> tuple[str, ...]:
    """The values that a field takes; () of a field that takes more than a few."""
    return get_args(info.annotation) if "Literal" in str(info.annotation) else ()


def bounds_of(info: FieldInfo) -> dict[str, float]:
    """The bounds of a number, or of the numbers of a list: some of ge, gt, le, lt."""
    names, parts = ("ge", "gt", "le", "lt"), [*info.metadata, *_parts_of(info.annotation)]
    parts += [bound for part in parts if isinstance(part, FieldInfo) for bound in part.metadata]
    return {name: getattr(part, name) for part in parts for name in names if hasattr(part, name)}


def bounds_text(bounds: dict[str, float]) -> str:
    """`at least 1`, `above 0 and at most 1`, ..."""
    if bounds == {"ge": 0, "le": 1}:
        return "between 0 and 1"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    numbers = {name: "2^64" if bound == SEEDS else f"{bound:g}" for name, bound in bounds.items()}
    return " and ".join(f"{words[name]} {number}" for name, number in numbers.items()) or "a finite number"


def is_text(info: FieldInfo) -> bool:
    """Whether a field is a text, or a list of texts."""
    return str in _parts_of(info.annotation) or location_of(info) is not None


def _parts_of(annotation: Any) -> list[Any]:
    """`annotation`, and what it is made of: the types of a union and of a list, the marks of Annotated."""
    return [annotation, *(part for inner in get_args(annotation) for part in _parts_of(inner))]


@pydantic_dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Section:
    """The base of every group of settings."""

    @field_validator("*", mode="before")
    @classmethod
    def _convert(cls, value: object, info: Any) -> object:
        """2024 and true in a recipe are a number and true: where a text is wanted they are that text. But true is no
        number, and 4.0 is no whole number. In what names a place `~` and `$HOME` are the user's folder."""
        field = cls.__pydantic_fields__[info.field_name]
        facts = facts_of(field)
        is_place = location_of(field) or (facts is not None and facts.is_open)
        return _as_typed(at_home(value) if is_place else value, field.annotation)


def at_home(value: Any) -> Any:
    """`value`, where texts that begin with `~` or `$HOME` name the user's folder; also within a list or a dict."""
    if isinstance(value, str):
        home = re.sub(r"^\$HOME(?=[/\\]|$)", "~", value)
        return os.path.expanduser(home) if home[:1] == "~" else value  # noqa: PTH111  (Path would refuse ~nobody)
    if isinstance(value, list):
        return [at_home(item) for item in value]
    return {key: at_home(item) for key, item in value.items()} if isinstance(value, dict) else value


def _as_typed(value: object, annotation: Any) -> object:
    types = _parts_of(annotation)
    if isinstance(value, list):
        return [_as_typed(item, annotation) for item in value] if list in map(get_origin, types) else value
    if str in types and isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, bool) and bool not in types and (int in types or float in types):
        raise PydanticCustomError("int_type" if int in types else "float_type", "not a number")
    if isinstance(value, float) and int in types and float not in types:
        raise PydanticCustomError("int_type", "not a whole number")
    if reason := too_large(value):
        raise PydanticCustomError("too_large", reason)
    return value


def too_large(value: object) -> str | None:
    """Why torch cannot hold a number; None for one that it can, for nan and infinity, and for anything else."""
    if isinstance(value, int) and abs(value) >= SEEDS:
        return "a whole number has at most 64 bits"
    if isinstance(value, float) and LARGEST < abs(value) < float("inf"):
        return f"the largest number is {LARGEST:g}"
    return None


def section(cls: type) -> type:
    """Make a group of settings of a class whose fields are written with `setting`."""
    return pydantic_dataclass(cls, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))


def default_of(info: FieldInfo) -> object:
    """The default as Hydra's configuration has it: a value, an interpolation, or ??? where an option must give one."""
    facts = facts_of(info)
    if facts and facts.default_from:
        return f"${{{facts.default_from}}}"
    value = info.get_default(call_default_factory=True)
    return "???" if value is PydanticUndefined else value


def defaults_of(root: type[Section]) -> dict[str, Any]:
    """The defaults of a section as a nested dict for Hydra; of a union (the stage) only the place."""
    tree = {}
    for name, info in root.__pydantic_fields__.items():
        if facts_of(info):
            tree[name] = default_of(info)
        else:
            tree[name] = defaults_of(info.annotation) if hasattr(info.annotation, "__pydantic_fields__") else {}
    return tree


def bind_target(
    group: str, settings: Mapping[str, Any], supplied: Sequence[str] = (), leading: int = 0
) -> Callable[..., Any]:
    """The class or function that `settings["_target_"]` names, its other keys bound as keyword arguments.

    It is not called, so that wrong settings are refused before any work. Values are checked against, and converted to,
    the annotations of the parameters (pydantic's rules). `supplied` names the arguments that the caller adds, before
    which it gives the first `leading` ones. A `_target_` within the settings is data: nothing else is called.
    Raises InputError, naming the key, for a missing package, an unknown or missing argument, or a wrong value."""
    name = settings.get("_target_")
    target = imported(group, name)
    arguments = {key: value for key, value in settings.items() if key not in ("_target_", "_partial_")}
    parameters = _parameters(target)
    if parameters is None:
        return partial(target, **arguments)
    supplied = (*supplied, *list(parameters)[:leading])
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in [*arguments, *supplied]:
            if key not in parameters:
                takes = ", ".join(k for k in parameters if k not in supplied) or "no keys"
                raise InputError(f"{group}.{key}: {name} does not accept {key}, it accepts {takes}")
    for key, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.default is parameter.empty and not variadic and key not in (*arguments, *supplied):
            raise InputError(f"{group}.{key} is missing: {name} requires it")
        if key in arguments:
            arguments[key] = _validated(f"{group}.{key}", arguments[key], parameter.annotation)
    return partial(target, **arguments)


def call_target(group: str, settings: Mapping[str, Any], *leading: Any, **supplied: Any) -> Any:
    """The result of the class or function of `bind_target`, called with `leading` and `supplied` as further arguments.

    Raises InputError also if the call itself fails for a wrong argument or a missing file."""
    bound = bind_target(group, settings, tuple(supplied), len(leading))
    try:
        return bound(*leading, **supplied)
    except BAD_ARGUMENTS as error:
        reason, hint = _reason(error), f"conf/{group.replace('.', '/')} shows its arguments"
        raise InputError(f"{group}: {settings['_target_']} cannot be created ({reason}); {hint}") from error


def _require_package(group: str, target: object) -> None:
    package, _, name = str(target).partition(".")
    if not package or not name:
        raise InputError(f"{group}._target_={target}: name a class or function and its module, such as module.Class")
    if find_spec(package) is None:
        hint = f': pip install "lora_lab[{EXTRAS[package]}]"' if package in EXTRAS else ""
        raise InputError(f"{group}._target_={target}: needs the package {package}, which is not installed{hint}")


def imported(group: str, name: object) -> Callable[..., Any]:
    """What `name` names, a class or function. Whether a run may name it is decided in launch/config.py.

    Raises InputError if it cannot be imported."""
    _require_package(group, name)
    try:
        found = locate(str(name))
    except Exception as error:  # importing a module of the user's may raise anything
        raise InputError(f"{group}._target_={name}: cannot be imported ({_reason(error)})") from error
    if not callable(found):
        raise InputError(f"{group}._target_={name}: is neither a class nor a function")
    return found


def locate(name: str) -> Any:
    """What the dotted `name` names in the module that has it. Raises ImportError or AttributeError.

    A module that another one imported is not reached through it: no `my_module.os.system`."""
    path, attributes = name, []
    while True:
        try:
            found = import_module(path)
            break
        except ModuleNotFoundError as error:
            path, _, attribute = path.rpartition(".")
            attributes.insert(0, attribute)
            if not path or not f"{path}.{attribute}.".startswith(f"{error.name}."):  # it lacks a package of its own
                raise
    for attribute in attributes:
        found = getattr(found, attribute)
        if isinstance(found, ModuleType):
            raise ImportError(f"{attribute} is a module that {path} uses, name the class where it is defined")
    return found


def is_allowed(target: str, modules: Sequence[str]) -> bool:
    """Whether `target` is one of `modules`, or is defined in one of them or below; for this it is imported.

    True also for what cannot be imported: nothing is called then."""
    for module in modules:
        if target == module:
            return True
        if target.startswith(f"{module}."):
            try:
                found = locate(target)
            except Exception:
                return True
            return f"{getattr(found, '__module__', '')}.".startswith(f"{module}.")
    return False


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """None for a target that does not state its parameters, as some written in C do not."""
    try:
        return inspect.signature(target, eval_str=True).parameters
    except (NameError, SyntaxError, TypeError, AttributeError):  # annotations that exist for type checkers only
        return inspect.signature(target).parameters
    except ValueError:
        return None


def _validated(key: str, value: Any, annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return value
    own_config = hasattr(annotation, "__pydantic_config__")
    try:
        return TypeAdapter(annotation, config=None if own_config else LENIENT).validate_python(value)
    except ValidationError as error:
        raise InputError(_sentence(key, error)) from error
    except PydanticUserError:  # not a type that pydantic can check
        return value


def _sentence(key: str, error: ValidationError) -> str:
    """The first error as one sentence; an unknown key explains a missing one, so it comes before it."""
    first = min(error.errors(), key=lambda details: details["type"] == "missing")
    path = key + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return f"{path}: no such key"
    if first["type"] == "missing":
        return f"{path} is missing"
    reason = first["msg"].removeprefix("Input ")
    return f"{path}={first['input']}: {reason[0].lower()}{reason[1:]}"


def _reason(error: BaseException) -> str:
    """The error's text on one line, shortened."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
