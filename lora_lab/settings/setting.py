"""How a setting is declared: type, default, bounds, meaning, what it decides; and the sentence for a wrong value."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, Tag, ValidationError, field_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, PydanticUndefined

from lora_lab.errors import InputError

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
    of_keys: tuple[tuple[str, "Facts"], ...] = ()  # of an open group: the keys that differ from the group's facts

    def of(self, key: str) -> "Facts":
        """The facts of `key` in this open group."""
        return dict(self.of_keys).get(key, replace(self, of_keys=(), is_open=False))


@dataclass(frozen=True)
class Location:
    """Marks a text that names something which must exist: see `lora_lab.launch.inputs`."""

    kind: Literal["folder", "dataset", "mask", "model", "tracker"]


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
    meaning: str, *, decides: Decision, per_job: bool | Collection[str] = False, decide_nothing: Collection[str] = ()
) -> Any:
    """A field of another library's keyword arguments: the options in conf/ know the keys and explain them.

    `per_job` may name the keys in which the jobs of a pack may differ; `decide_nothing` names those that only describe
    the rest."""
    group = Facts((decides,), per_job is True, is_open=True)
    exceptions = [] if isinstance(per_job, bool) else [(key, Facts((decides,), True)) for key in sorted(per_job)]
    exceptions += [(key, Facts(("nothing",), group.per_job)) for key in sorted(decide_nothing)]
    group = replace(group, of_keys=tuple(exceptions))
    return Field(default_factory=dict, description=meaning, json_schema_extra={"facts": group})


def facts_of(info: FieldInfo) -> Facts | None:
    """The facts of a field; None of a field that is a section."""
    return info.json_schema_extra["facts"] if isinstance(info.json_schema_extra, dict) else None


def location_of(info: FieldInfo) -> Location | None:
    """What a field names, if that must exist."""
    return next((part for part in _parts(info) if isinstance(part, Location)), None)


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


def _parts(info: FieldInfo) -> Iterator[object]:
    yield from info.metadata
    for annotation in (info.annotation, *get_args(info.annotation)):
        yield from get_args(annotation)


@pydantic_dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Section:
    """The base of every group of settings."""

    @field_validator("*", mode="before")
    @classmethod
    def _as_typed(cls, value: object, info: Any) -> object:
        """The command line knows 2024, true and 1.5 only as a number and a truth value: where a text is wanted they are
        that text; true is no number, and 4.0 no whole one."""
        annotation = cls.__pydantic_fields__[info.field_name].annotation
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


class SettingError(InputError):
    """A wrong value of one key, or (with an empty sentence) an unknown key."""

    def __init__(self, key: str, sentence: str):
        super().__init__(sentence)
        self.key = key


KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text"}


def wrong_values(error: ValidationError, root: type) -> tuple[list[str], SettingError]:
    """The unknown keys among pydantic's errors on building `root`, and the first of the others as a sentence."""
    unknown, wrong = [], []
    for detail in error.errors(include_url=False, include_context=False):
        key, info = _place(root, detail["loc"])
        if detail["type"] == "unexpected_keyword_argument":
            unknown.append(key)
        else:
            wrong.append(SettingError(key, _sentence(key, detail, info)))
    return unknown, (wrong or [SettingError("", "")])[0]


def _place(root: type, path: tuple[str | int, ...]) -> tuple[str, FieldInfo | None]:
    """The dotted key of pydantic's `path` below `root`, and the last field on it. The tag of a union is no key."""
    key, info = "", None
    for part in path:
        options = [args for args in map(get_args, get_args(root)) if len(args) > 1]
        tags = {args[1].tag: args[0] for args in options if isinstance(args[1], Tag)}
        if part in tags:
            root = tags[part]
            continue
        info = getattr(root, "__pydantic_fields__", {}).get(part, info)
        root = info.annotation if info else None
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    return key.removeprefix("."), info


def _sentence(key: str, detail: dict[str, Any], info: FieldInfo | None) -> str:
    value, kind, leaf = detail["input"], detail["type"], key.rpartition(".")[2]
    if kind == "missing":
        return f"{key} is missing: set {key}=..."
    if value is None:
        return f"{key}=null: {key} must have a value"
    if kind in ("list_type", "dict_type"):
        return f"{key}: not a list, write {key}=[...]" if kind == "list_type" else f"{key}={value}: not a group of keys"
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than", "finite_number") and info:
        number = float(value) if info.annotation is not int else value
        return f"{key}={number}: {leaf} must be {bounds_text(bounds_of(info))}"
    if kind in ("literal_error", "union_tag_invalid") and info:
        return f"{key}={value}: {leaf} is one of {', '.join(choices_of(info))}"
    if (name := kind.partition("_")[0]) in KINDS:
        return f"{key}={value}: not {KINDS[name]}"
    return f"{key}={value}: {detail['msg']}"


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
