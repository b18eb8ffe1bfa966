"""The sentence for a value that a setting does not take."""

from typing import Any, get_args

from pydantic import Tag, ValidationError
from pydantic.fields import FieldInfo

from lora_lab.errors import InputError
from lora_lab.settings.setting import bounds_of, bounds_text, choices_of

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text"}
BOUNDS = ("greater_than_equal", "greater_than", "less_than_equal", "less_than", "finite_number")


class SettingError(InputError):
    """A wrong value of `key`, or a key that does not exist."""

    def __init__(self, key: str, sentence: str):
        super().__init__(sentence)
        self.key = key


def refusals(error: ValidationError, root: type) -> tuple[list[str], list[SettingError]]:
    """What pydantic found wrong on building `root`: the unknown keys, and the wrong values as sentences."""
    unknown, wrong = [], []
    for detail in error.errors(include_url=False, include_context=False):
        key, info = _place(root, detail["loc"])
        if detail["type"] == "unexpected_keyword_argument":
            unknown.append(key)
        else:
            wrong.append(SettingError(key, _sentence(key, detail, info)))
    return unknown, wrong


def _place(root: type, path: tuple[str | int, ...]) -> tuple[str, FieldInfo | None]:
    """The dotted key of pydantic's `path` below `root`, and the last field on it. The tag of a union is no key."""
    key, info = "", None
    for part in path:
        tags = _tags(root)
        if part in tags:
            root = tags[part]
            continue
        info = getattr(root, "__pydantic_fields__", {}).get(part, info)
        root = info.annotation if info else None
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    return key.removeprefix("."), info


def _tags(annotation: Any) -> dict[str, type]:
    """The types of a union by their tags; {} of anything else."""
    options = [args for args in map(get_args, get_args(annotation)) if len(args) > 1]
    return {args[1].tag: args[0] for args in options if isinstance(args[1], Tag)}


def _sentence(key: str, detail: dict[str, Any], info: FieldInfo | None) -> str:
    value, kind, leaf = detail["input"], detail["type"], key.rpartition(".")[2]
    if kind == "missing":
        return f"{key} is missing: set {key}=..."
    if value is None:
        return f"{key}=null: {key} must have a value"
    if kind == "list_type":
        return f"{key}: not a list, write {key}=[...]"
    if kind in BOUNDS and info:
        number = float(value) if info.annotation in (float, float | None) else value
        return f"{key}={number}: {leaf.partition('[')[0]} must be {bounds_text(bounds_of(info))}"
    if kind == "union_tag_invalid" and info:
        return f"{key}.kind={value['kind']}: kind is one of {', '.join(_tags(info.annotation))}"
    if kind == "literal_error" and info:
        return f"{key}={value}: {leaf} is one of {', '.join(choices_of(info))}"
    name = kind.partition("_")[0]
    return f"{key}={value}: {f'not {KINDS[name]}' if name in KINDS else detail['msg']}"
