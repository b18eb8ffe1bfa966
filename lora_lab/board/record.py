"""Read the files of a run folder, which a stranger may have written, or a crash have damaged.

A file is bounded and checked, none that lies outside the folder is read, and no resolver of a record is called. What
cannot be read is an InputError, one sentence that names the file and the reason."""

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from lora_lab.errors import InputError
from lora_lab.images.scan import leads_out

LARGEST, DEEPEST = 2**20, 50  # bytes and levels of a YAML file: a record has 30 kB and five levels
MOST_VALUES, LETTERS = 50_000, 20  # values of a YAML file; so many letters of a long text count as one more
LONGEST = 10_000  # characters of a value with references
REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # ${trigger}; ${oc.env:HOME} is a resolver's, and stays text
OPENING = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
CLOSING = (yaml.MappingEndEvent, yaml.SequenceEndEvent)
# The loader written in C is much faster: a sweep has a hundred files, and the Python one takes 30 ms for each.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def recorded_settings(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The configuration and the overrides of the run in `folder`, as Hydra recorded them.

    The configuration maps dotted keys to JSON values, and each group to its option. References to other keys are
    resolved. Raises InputError."""
    files = [own_file(folder, ".hydra", f"{name}.yaml") for name in ("config", "hydra", "overrides")]
    return _recorded_settings(*((file, file.stat().st_mtime_ns) for file in files))


@lru_cache(1000)  # keyed by modification time; the page of a sweep reads all records after every job, 40 ms each
def _recorded_settings(*files: tuple[Path, int]) -> tuple[dict[str, Any], list[str]]:
    config, hydra, overrides = (read_yaml(file) for file, _ in files)
    settings = dict(_dotted(config)) if isinstance(config, dict) else None
    try:
        choices = hydra["hydra"]["runtime"]["choices"].items()
    except (TypeError, KeyError, AttributeError):
        choices = None
    for (file, _), content in zip(files, (settings, choices, overrides), strict=True):
        if content is None or (content is overrides and not isinstance(overrides, list)):
            raise InputError(f"{file} is damaged: it is no record of Hydra's")
    options = {str(group): option for group, option in choices if not str(group).startswith("hydra/")}
    return _resolved(settings) | options, [str(override) for override in overrides]


def read_yaml(file: Path, loader: type = LOADER, change: Callable[[yaml.Node], None] | None = None) -> Any:
    """The content of a YAML file that is small also with its aliases (*name) written out.

    `loader` is a safe one of yaml's; `change` may tag the nodes of the content. Raises InputError."""
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST // 2**20} MiB")
        text = file.read_text(encoding="utf-8")
        _refuse_bomb(yaml.parse(text, loader))
        content = loader(text)
        root = content.get_single_node()
        if root is None:
            return None
        if change:
            change(root)
        return content.construct_document(root)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {' '.join(str(error).split()):.200}") from error


def _refuse_bomb(events: Iterator[yaml.Event]) -> None:
    """Raise ValueError for YAML of over DEEPEST levels or MOST_VALUES values, every alias (*name) counted as what it
    stands for. Nothing is made of it, so that it takes neither memory nor time."""
    anchors: dict[str, tuple[int, int]] = {}  # values and levels of what an alias stands for
    collections: list[tuple[str | None, int, int]] = [(None, 0, 0)]  # those around: anchor, values and levels so far
    for event in events:
        if isinstance(event, OPENING):
            collections.append((event.anchor, 1, 0))
            anchors[event.anchor] = (MOST_VALUES + 1, 0)  # of itself inside itself
            anchor, values, levels = None, 0, 0
        elif isinstance(event, CLOSING):
            anchor, values, levels = collections.pop()
            levels += 1
        elif isinstance(event, yaml.ScalarEvent):
            anchor, values, levels = event.anchor, 1 + len(event.value) // LETTERS, 0
        elif isinstance(event, yaml.AliasEvent):  # one of nothing is an error of the loader
            anchor, (values, levels) = None, anchors.get(event.anchor, (1, 0))
        else:
            continue
        if anchor:
            anchors[anchor] = (values, levels)
        outer, values_so_far, levels_so_far = collections[-1]
        collections[-1] = (outer, values_so_far + values, max(levels_so_far, levels))
        if values_so_far + values > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
        if len(collections) - 1 + levels > DEEPEST:
            raise ValueError(f"it has over {DEEPEST} levels")


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the run in `folder`; empty if there is no such file. Raises InputError."""
    value = read_json(folder, name, {})
    if not isinstance(value, dict):
        raise InputError(f"{folder / name} is damaged: it has no JSON object")
    return value


def read_json(folder: Path, name: str, default: Any) -> Any:
    """The content of a JSON file in `folder`; `default` if there is no such file. Raises InputError."""
    if not (folder / name).exists():
        return default
    file = own_file(folder, name)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {error!s:.200}") from error


def own_file(folder: Path, *parts: str) -> Path:
    """The regular file of those names in `folder`. Raises InputError if it is missing, or a link leads out."""
    file = folder.joinpath(*parts)
    if not file.is_file():
        raise InputError(f"{file} is missing")
    if leads_out(file, folder):
        raise InputError(f"{file} is a link to a file outside its folder, and was not read")
    return file


def is_number(value: object) -> bool:
    """Whether `value` is a finite number."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _dotted(node: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _json_value(value)


def json_values(values: dict[Any, Any]) -> dict[str, Any]:
    """`values` as JSON can hold them, by text keys."""
    return {str(key): _json_value(value) for key, value in values.items()}


def _json_value(value: Any) -> Any:
    """`value` as JSON can hold it: dates, bytes, sets, NaN and numbers beyond all floats as their text."""
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return json_values(value)
    return value if value is None or isinstance(value, str) or is_number(value) else str(value)


def _resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` with the values that they refer to; a reference to no setting, or to itself, stays text.

    Each key is resolved once, and a text does not grow over LONGEST, so that references to references take no time."""
    found: dict[str, Any] = {}

    def value_of(key: str, above: tuple[str, ...]) -> Any:
        if key not in found:
            value = settings[key]
            match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
            if match:
                found[key] = referred(match, above)
            else:
                found[key] = [text(v, above) for v in value] if isinstance(value, list) else text(value, above)
        return found[key]

    def referred(match: re.Match[str], above: tuple[str, ...]) -> Any:
        key = match[1]
        known = key in settings and key not in above and len(above) < DEEPEST
        return value_of(key, (*above, key)) if known else match[0]

    def text(value: Any, above: tuple[str, ...]) -> Any:
        if not isinstance(value, str):
            return value
        parts, end = [], 0
        for match in REFERENCE.finditer(value):
            part = referred(match, above)
            parts += [value[end : match.start()], match[0] if isinstance(part, list) else str(part)]
            end = match.end()
            if sum(map(len, parts)) > LONGEST:
                return value
        return "".join([*parts, value[end:]])

    return {key: value_of(key, (key,)) for key in settings}
