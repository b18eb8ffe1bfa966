"""The text of --help. Meanings come from the settings, defaults from the composed demo."""

import json
import re

from lora_lab.launch.config import compose
from lora_lab.launch.recipes import CONF, recipe_files
from lora_lab.settings.schema import fields_of
from lora_lab.settings.setting import default_of
from lora_lab.settings.stages import STAGES

HELP = """\
lora_lab trains SDXL on one character from 10 to 50 images, then turns photos into that character.

  python -m lora_lab                                                         everything, on the bundled demo
  python -m lora_lab stage=check dataset=folder dataset.root=data/TOFU       what training would refuse, and why
  python -m lora_lab stage=train experiment=sdxl dataset.root=data/TOFU lr=1e-4
  python -m lora_lab stage=img2img model=sdxl lora=HANA_TOFU stage.photo=me.jpg
  python -m lora_lab -m stage=train rank=4,16 lr=1e-3,3e-4                   a sweep: one run for each combination

Groups (GROUP=OPTION; the options are files in conf/GROUP, the default is marked *)
{groups}

Settings (KEY=VALUE, with the defaults of the demo; docs/settings.md explains all)
{settings}

Flags: --cfg job shows the whole configuration, every other key and its value; -m sweeps over values with commas
"""
SHOWN = ("trigger", "name", "lr", "rank", "steps", "batch_size", "seed", "lora", "resume", "device")
SHOWN_OF_STAGES = {
    "train": ("validate_every", "checkpoint_every"),
    "img2img": ("photo", "prompt", "strength", "seeds"),
}


def help_text() -> str:
    """The text of --help."""
    config = compose("stage=pipeline")
    meanings = {key: info.description for key, info in fields_of()}
    lines = [_line(key, getattr(config, key), meanings[key]) for key in SHOWN]
    for stage, keys in SHOWN_OF_STAGES.items():
        fields, defaults = STAGES[stage].__pydantic_fields__, getattr(config.stage, stage)
        for key in keys:
            value = "..." if default_of(fields[key]) == "???" else getattr(defaults, key)
            lines.append(_line(f"stage.{key}", value, f"({stage}) {fields[key].description}"))
    return HELP.format(groups="\n".join(_groups()), settings="\n".join(lines))


def options() -> dict[str, list[str]]:
    """The options of every group of conf/, sorted."""
    folders = sorted(path for path in CONF.iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def _groups() -> list[str]:
    main = (CONF / "config.yaml").read_text(encoding="utf-8")
    defaults = dict(re.findall(r'^  - (\w+): "?(\w+)', main, re.M))
    groups = options() | {"experiment": sorted(recipe_files())}
    return [
        f"  {group:<12} {'  '.join(f'{name}*' if name == defaults[group] else name for name in names)}"
        for group, names in groups.items()
    ]


def _line(key: str, value: object, meaning: str) -> str:
    return f"  {f'{key}={shown(value)}':<27} {meaning}"


def shown(value: object) -> str:
    """A value as one types it."""
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return f"{value:.0e}".replace("e-0", "e-")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
