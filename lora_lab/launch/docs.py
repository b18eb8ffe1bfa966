"""Writes docs/settings.md from the settings and the options: python -m lora_lab.launch.docs"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from omegaconf import OmegaConf
from pydantic.fields import FieldInfo

from lora_lab.launch.help import options, shown
from lora_lab.launch.recipes import CONF, HOME
from lora_lab.settings.schema import Config, fields_of
from lora_lab.settings.setting import bounds_of, bounds_text, choices_of, default_of, facts_of, location_of
from lora_lab.settings.stages import STAGES
from lora_lab.track import KINDS

PAGE = HOME / "docs" / "settings.md"
INTRO = """\
# Settings

Every key of the command line, with default, values and meaning. `python -m lora_lab.launch.docs` writes this page from
`lora_lab/settings` and `conf`.

*Decides* says what a key changes:

- `weights`: the weights that training ends with. A resumed run refuses another value, unless the table says that it may
  change. Files and folders are compared by what they hold, so they may move.
- `images`: what the base and a LoRA draw for one prompt and seed.
- `request`: what is asked for: prompts, seeds, photos, which LoRA, what is measured.
- `cost`: time and memory; the results are the same but for rounding.
- `nothing`: names, places and bookkeeping.

*Pack* says whether the jobs of a [packed sweep](sweeps.md) may differ in the key. A default in parentheses is the value
of another key; a key without a default gets its value from the options of its group, or must be set.
"""
HEAD = "| key | default | values | decides | pack | meaning |\n|---|---|---|---|---|---|"
HEAD_OF_OPTION = "| key | default | meaning |\n|---|---|---|"
LOCATIONS = {
    "folder": "path", "dataset": "path or list", "mask": "`none`, `alpha` or path",
    "part": "`person`, `background` or path",
    "path": "path", "model": "hub id or path",
    "tracker": f"`{'`, `'.join(KINDS)}`",
}  # fmt: skip
TYPES = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}


def page() -> str:
    """The text of docs/settings.md."""
    fields = Config.__pydantic_fields__
    top = {name: info for name, info in fields.items() if facts_of(info) and not facts_of(info).is_open}
    parts = [INTRO, "## Without a group\n", _table(top)]
    for group in [name for name in fields if name not in top]:
        parts.append(f"## {group}\n")
        parts += _stages() if group == "stage" else _group(group, fields[group])
    return "\n".join(parts).rstrip() + "\n"


def _stages() -> Iterator[str]:
    for name, stage in STAGES.items():
        yield f"### stage={name}\n"
        yield f"{_description('stage', name)}\n"
        own = {key: info for key, info in stage.__pydantic_fields__.items() if key != "kind"}
        if any(facts_of(info) for info in own.values()):
            yield _table(own, "stage.")
        sections = [key for key, info in own.items() if not facts_of(info)]
        if sections:
            yield f"`stage.{'` and `stage.'.join(sections)}` have the keys of these stages.\n"


def _group(group: str, info: FieldInfo) -> Iterator[str]:
    names = options()
    if facts_of(info):
        yield f"Keyword arguments of {info.description}, each option with its own.\n"
        if own := facts_of(info).own:
            defaults = default_of(info)
            rows = [f"| `{group}.{key}` | `{shown(defaults[key])}` | {meaning} |" for key, meaning in own]
            yield "\n".join(["Every option also has:\n", HEAD_OF_OPTION, *rows]) + "\n"
    else:
        yield _table(dict(fields_of(info.annotation, f"{group}.")))
    for option in names[group]:
        values = "" if facts_of(info) else _sets(group, option)
        yield f"- `{group}={option}`: {_description(group, option)}{values}"
    yield ""
    if group == "adapter":
        yield from (f"- `targets={option}`: {_description('targets', option)}" for option in names["targets"])
        yield ""
    if facts_of(info):
        for option in names[group]:
            yield f"### {group}={option}\n"
            yield _table_of_option(group, option)


def _table(fields: dict[str, FieldInfo], prefix: str = "") -> str:
    rows = [HEAD]
    for name, info in fields.items():
        facts = facts_of(info)
        if facts is None:
            continue
        decides = ", ".join(facts.decides) + (f" (may change: {facts.may_change})" if facts.may_change else "")
        cells = (_default(info), _values(info), decides, "yes" if facts.per_job else "no", info.description)
        rows.append(f"| `{prefix}{name}` | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(info: FieldInfo) -> str:
    facts, value = facts_of(info), default_of(info)
    if facts.default_from:
        return f"(`{facts.default_from}`)"
    text = "" if value == "???" else '""' if value == "" else shown(value)
    return f"`{text}`" if text and not facts.is_open else ""


def _values(info: FieldInfo) -> str:
    """The choices, the bounds, or else the type."""
    choices, bounds, location = choices_of(info), bounds_of(info), location_of(info)
    null = " or `null`" if type(None) in get_args(info.annotation) else ""
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if location:
        return LOCATIONS[location.kind] + null
    if facts_of(info).is_open or str(info.annotation).startswith("list"):
        return "group" if facts_of(info).is_open else "list"
    types = (info.annotation, *get_args(info.annotation))
    kind = next((TYPES[part] for part in types if part in TYPES), "text or list")
    return (f"{kind} {bounds_text(bounds)}" if bounds else kind) + null


def _description(group: str, option: str) -> str:
    """The comment at the top of an option's file."""
    lines = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    comment = []
    for line in (line for line in lines if not line.startswith("# @package")):
        if not line.startswith("# "):
            break
        comment.append(line.removeprefix("# "))
    return " ".join(comment).removesuffix(".") + "."


def _sets(group: str, option: str) -> str:
    """What an option changes, as one would type it; lists are left out."""
    tree = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"), resolve=False)
    chosen = [entry for entry in tree.pop("defaults", []) if isinstance(entry, dict)]
    values = [f"{key.removeprefix('override /')}={name}" for entry in chosen for key, name in entry.items()]
    inner = tree.pop(group, None)
    if inner is None:
        inner, tree = tree, {}
    values += [f"{key}={shown(value)}" for key, value in tree.items()]  # model= also sets keys without a group
    values += [f"{group}.{key}={shown(value)}" for key, value in inner.items() if not isinstance(value, (list, dict))]
    values = [f"`{value}`" for value in values if "???" not in value]
    return f" Sets {', '.join(values)}." if values else ""


def _table_of_option(group: str, option: str) -> str:
    """The keys of another library, as the option's file explains them."""
    text = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8")
    rows = [HEAD_OF_OPTION]
    for key, value, meaning in re.findall(r"^(\w+): (.*?)  # (.*)$", text, re.M):
        value = {"": "a list", ">-": "a text"}.get(value, f"`{value}`")
        rows.append(f"| `{group}.{key}` | {value} | {meaning} |")
    return "\n".join(rows) + "\n"


def write(page_file: Path = PAGE) -> None:
    """Write docs/settings.md."""
    page_file.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    write()
