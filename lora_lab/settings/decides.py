"""What the settings of a run decide: what resume compares, what a pack shares, what the base's images depend on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

from pydantic.fields import FieldInfo

from lora_lab.settings.model import Memory, Model, Sampler
from lora_lab.settings.schema import STAGES, Config
from lora_lab.settings.setting import Facts, Section, facts_of
from lora_lab.settings.training import Loss

# The comparison page compares runs of training, which read neither.
NOT_COMPARED = ("stage", "lora")


@dataclass(frozen=True)
class Value:
    """A setting of a run."""

    key: str  # dotted
    value: Any
    facts: Facts


def values_of(section: Section, prefix: str = "") -> Iterator[Value]:
    """Every setting of a section, the keys of open groups one by one."""
    for name, info in type(section).__pydantic_fields__.items():
        key, value, facts = f"{prefix}{name}", getattr(section, name), facts_of(info)
        if is_dataclass(value):
            yield from values_of(value, f"{key}.")
        elif facts.is_open:
            yield from (Value(f"{key}.{inner}", item, facts.of(inner)) for inner, item in value.items())
        else:
            yield Value(key, value, facts)


def fields_of(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting that there is, by its dotted key; those of all stages are under `stage`."""
    for name, info in section.__pydantic_fields__.items():
        kinds = [*STAGES.values()] if name == "stage" else [info.annotation]
        if facts_of(info):
            yield f"{prefix}{name}", info
        else:
            for kind in kinds:
                yield from fields_of(kind, f"{prefix}{name}.")


def training_fingerprint(config: Config) -> dict[str, Any]:
    """By its dotted key every setting that decides the weights and that a resumed run may not change.

    What files hold is compared by hashes, which are not in it: see `hash_names`."""
    compared = {v.key: v.value for v in values_of(config) if _compared(v.facts)}
    # A folder may move, and None is what older checkpoints have for a training without a prior.
    kind = None if config.prior.kind == "none" else config.prior.kind
    repeats = [folder.repeats for folder in config.dataset.folders]
    return compared | {"dataset.repeats": repeats, "loss.mask": config.loss.masks, "prior.kind": kind}


def _compared(facts: Facts) -> bool:
    return "weights" in facts.decides and not facts.hashed_as and not facts.may_change


def hash_names() -> set[str]:
    """The names of the hashes that stand for settings in a checkpoint: base, dataset, captions, ..."""
    return {name for _, info in fields_of() if (name := facts_of(info).hashed_as)}


@dataclass(frozen=True)
class Comparison:
    """How the fingerprint in a checkpoint differs from that of the run that resumes it."""

    changed: dict[str, tuple[Any, Any]]  # key -> value in the checkpoint, value of the run
    unrecorded: list[str]  # keys that the checkpoint, written by an older version, lacks

    @property
    def changes(self) -> str:
        """The first change of a key that one types, and the names of the others: `rank=4, not 8 (also adapter.r)`."""
        key, *others = sorted(self.changed, key=lambda key: "." in key)
        saved, current = self.changed[key]
        return f"{key}={saved}, not {current}" + (f" (also {', '.join(others)})" if others else "")


def compare_fingerprints(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Comparison:
    """`saved` as a checkpoint has it, `current` a training_fingerprint; both with the hashes of their files."""
    flat: dict[str, Any] = {}
    for key, value in saved.items():  # older checkpoints keep adapter, optimizer and schedule as groups
        is_group = isinstance(value, dict) and "." not in key
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if is_group else {key: value}
    hashes = hash_names()
    flat |= {name: None for name in hashes - flat.keys()}
    current = dict(current) | {name: None for name in hashes - current.keys()}
    changed = {key: (flat[key], value) for key, value in current.items() if key in flat and flat[key] != value}
    return Comparison(changed, [key for key in current if key not in flat])


def shared_by_pack(config: Config) -> dict[str, Any]:
    """By its dotted key every setting in which the jobs of a pack must be equal."""
    return {v.key: v.value for v in values_of(config) if not v.facts.per_job}


def base_image_settings(model: Model, loss: Loss, memory: Memory, sampler: Sampler) -> dict[str, Any]:
    """By its dotted key every setting that decides what the base draws for one prompt and seed; the files of the base
    have a hash."""
    sections = {"model": model, "loss": loss, "memory": memory, "sampler": sampler}
    values = [value for name, section in sections.items() for value in values_of(section, f"{name}.")]
    return {v.key: v.value for v in values if "images" in v.facts.decides and not v.facts.hashed_as}


def shown_on_page(key: str) -> bool:
    """Whether the comparison page tells runs apart by `key`, the dotted key of a setting or the name of a group."""
    if key in NOT_COMPARED or key.partition(".")[0].partition("/")[0] == "hydra":
        return False
    known = [facts for name, info in fields_of() if _covers(key, name, facts := facts_of(info))]
    return not known or any(facts.decides != ("nothing",) for facts in known)


def _covers(key: str, name: str, facts: Facts) -> bool:
    return name == key or name.startswith(f"{key}.") or (facts.is_open and key.startswith(f"{name}."))
