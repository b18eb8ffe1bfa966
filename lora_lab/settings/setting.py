"""How a setting is declared: its type, default, bounds and meaning, and what it decides."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, PydanticUndefined

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
    """Marks a setting that names something which must exist: see `lora_lab.launch.inputs`."""

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
    def _convert(cls, value: object, info: Any) -> object:
        """2024 and true are typed as a number and as true: where a text is wanted they are that text. But true is no
        number, and 4.0 is no whole number."""
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
