"""Classes and functions that an option names by `_target_`: adapters, optimizers, captioners, refiners.

They are imported, and their arguments checked, before any work."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from lora_lab.errors import InputError

# Optional packages and the extra in pyproject.toml that installs them.
EXTRAS = {"prodigyopt": "optimizers", "schedulefree": "optimizers", "pytorch_optimizer": "optimizers"}
# A YAML value such as 2026 is accepted where a string is expected; annotations may name any class.
LENIENT = ConfigDict(coerce_numbers_to_str=True, arbitrary_types_allowed=True)
BAD_ARGUMENTS = (ImportError, OSError, TypeError, ValueError, LookupError, AttributeError)


def instantiate_target(group: str, settings: dict[str, Any], *probe: object) -> Any:
    """The result of calling the target of `settings` by Hydra, nested targets included.

    With `_partial_` it is a function; it is called once with `probe`, so that a wrong argument is found before work
    begins. Raises InputError for a missing package or a wrong argument."""
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
