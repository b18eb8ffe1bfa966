"""How a setting is declared: its type, default, bounds and meaning, and what it decides.

The second part imports the class or function that an option names by `_target_` (adapters, optimizers, captioners,
refiners) and checks its arguments before any work."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
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
    of_keys: tuple[tuple[str, "Facts"], ...] = ()  # of an open group: the keys whose facts are not the group's

    def of(self, key: str) -> "Facts":
        """The facts of `key` in this open group."""
        return dict(self.of_keys).get(key, replace(self, of_keys=(), is_open=False))


@dataclass(frozen=True)
class Location:
    """Marks a setting that names something which must exist: see `lora_lab.launch.config`."""

    kind: Literal["folder", "dataset", "mask", "model", "tracker", "captioner", "refiner"]


FolderPath = Annotated[str, Location("folder")]
ModelLocation = Annotated[str, Location("model")]  # a hub id, a folder or a file
MaskSource = Annotated[str, Location("mask")]  # none, alpha or a folder
TrackerName = Annotated[str, Location("tracker")]
# OmegaConf has no union of a text and a list; the stages and Dataset check what is in them.
DatasetRoot = Annotated[Any, Location("dataset")]
FolderPaths = Annotated[Any, Location("folder")]


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
) -> Any:
    """A field of another library's keyword arguments: the options in conf/ know the keys and explain them.

    `per_job` may name the keys in which the jobs of a pack may differ; `decide_nothing` names those that only describe
    the rest."""
    decides = (decides,) if isinstance(decides, str) else decides
    group = Facts(decides, per_job is True, hashed_as, is_open=True)
    exceptions = {} if isinstance(per_job, bool) else {key: Facts(decides, True, hashed_as) for key in per_job}
    exceptions |= {key: Facts(("nothing",), group.per_job) for key in decide_nothing}
    group = replace(group, of_keys=tuple(sorted(exceptions.items())))
    return Field(default_factory=dict, description=meaning, json_schema_extra={"facts": group})


def facts_of(info: FieldInfo) -> Facts | None:
    """The facts of a field; None of a field that is a section."""
    return info.json_schema_extra["facts"] if isinstance(info.json_schema_extra, dict) else None


def location_of(info: FieldInfo) -> Location | None:
    """What a field names, if that must exist."""
    return next((part for part in _parts(info) if isinstance(part, Location)), None)


def _parts(info: FieldInfo) -> Iterator[object]:
    yield from info.metadata
    for annotation in (info.annotation, *get_args(info.annotation)):
        yield from get_args(annotation)


def choices_of(info: FieldInfo) -> tuple[str, ...]:
    """The values that a field takes; () of a field that takes more than a few."""
    return get_args(info.annotation) if "Literal" in str(info.annotation) else ()


def bounds_of(info: FieldInfo) -> dict[str, float]:
    """The bounds of a number: some of ge, gt, le, lt."""
    return {
        name: getattr(part, name) for part in info.metadata for name in ("ge", "gt", "le", "lt") if hasattr(part, name)
    }


def bounds_text(bounds: dict[str, float]) -> str:
    """`at least 1`, `above 0 and at most 1`, ..."""
    if bounds == {"ge": 0, "le": 1}:
        return "between 0 and 1"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{words[name]} {bound:g}" for name, bound in bounds.items()) or "a finite number"


@pydantic_dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Section:
    """The base of every group of settings."""

    @field_validator("*", mode="before")
    @classmethod
    def _convert(cls, value: object, info: Any) -> object:
        """YAML reads 2024 as a number and true as a boolean: where a text is expected they become that text. A boolean
        is not accepted as a number, nor 4.0 as a whole number."""
        return _as_typed(value, cls.__pydantic_fields__[info.field_name].annotation)


def _as_typed(value: object, annotation: Any) -> object:
    if get_origin(annotation) is list:
        return [_as_typed(item, get_args(annotation)[0]) for item in value] if isinstance(value, list) else value
    types = {annotation, *get_args(annotation)}
    if str in types and isinstance(value, (bool, int, float)):
        return str(value)
    if isinstance(value, bool) and bool not in types and types & {int, float}:
        raise PydanticCustomError("int_type" if int in types else "float_type", "not a number")
    if isinstance(value, float) and int in types and float not in types:
        raise PydanticCustomError("int_type", "not a whole number")
    return value


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


def instantiate_target(group: str, settings: dict[str, Any], *probe: object) -> Any:
    """The result of calling the target of `settings` by Hydra, nested targets included.

    With `_partial_` the result is a function. It is called once with `probe`, so that a wrong argument is found before
    work begins. Raises InputError for a missing package or a wrong argument."""
    from hydra.errors import InstantiationException  # not above: the comparison page reads settings without Hydra
    from hydra.utils import get_class, instantiate

    target = settings["_target_"]
    _require_package(group, target)
    try:
        get_class(target)
        result = instantiate(settings, _convert_="all")
        if settings.get("_partial_"):
            result(*probe)
    except (InstantiationException, *BAD_ARGUMENTS) as error:
        reason = _reason(error.__cause__ or error)
        raise InputError(f"{group}: {target} cannot be created ({reason}); conf/{group} shows its arguments") from error
    return result


def bind_target(group: str, settings: Mapping[str, Any], supplied: Sequence[str] = ()) -> Callable[..., Any]:
    """The class or function that `settings["_target_"]` names, its other keys bound as keyword arguments.

    It is not called, so that wrong settings are refused before any work. Values are checked against, and converted to,
    the annotations of the parameters (pydantic's rules). `supplied` names the arguments that the caller adds.
    Raises InputError, naming the key, for a missing package, an unknown or missing argument, or a wrong value."""
    name = settings.get("_target_")
    target = _imported(group, name)
    arguments = {key: value for key, value in settings.items() if key != "_target_"}
    parameters = _parameters(target)
    if parameters is None:
        return partial(target, **arguments)
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


def call_target(group: str, settings: Mapping[str, Any], **supplied: Any) -> Any:
    """The result of the class or function of `bind_target`, called with `supplied` as further arguments.

    Raises InputError also if the call itself fails for a wrong argument or a missing file."""
    bound = bind_target(group, settings, tuple(supplied))
    try:
        return bound(**supplied)
    except BAD_ARGUMENTS as error:
        raise InputError(f"{group}: {settings['_target_']} cannot be created ({_reason(error)})") from error


def _require_package(group: str, target: object) -> None:
    package, _, name = str(target).partition(".")
    if not package or not name:
        raise InputError(f"{group}._target_={target}: name a class or function and its module, such as module.Class")
    if find_spec(package) is None:
        hint = f': pip install "lora_lab[{EXTRAS[package]}]"' if package in EXTRAS else ""
        raise InputError(f"{group}: {target} needs the package {package}, which is not installed{hint}")


def _imported(group: str, name: object) -> Callable[..., Any]:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    _require_package(group, name)
    try:
        return instantiate({"_target_": name, "_partial_": True})  # Hydra refuses dangerous targets, such as os.system
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise InputError(f"{group}._target_={name}: cannot be imported ({_reason(cause)})") from error


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
    try:
        return TypeAdapter(annotation, config=LENIENT).validate_python(value)
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
