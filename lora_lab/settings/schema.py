"""The configuration of a run, and what its settings decide.

What resume compares, what a pack shares and what the base's images depend on follow from the declarations."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Any, Literal, Union
from unicodedata import normalize

from pydantic import Discriminator, Tag, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from yaml import YAMLError, safe_load

from lora_lab.errors import InputError
from lora_lab.settings.photo import Likeness, Structure
from lora_lab.settings.refusal import SettingError, refusals
from lora_lab.settings.sections import (
    Dataset,
    Folder,
    Loss,
    Memory,
    Model,
    OptimizerTraits,
    Prior,
    Sampler,
    Schedule,
    Score,
    Text,
    Tracker,
    Triggers,
)
from lora_lab.settings.setting import (
    SEEDS,
    AnyPath,
    AnyPaths,
    Bounds,
    Facts,
    Location,
    Section,
    facts_of,
    is_text,
    open_group,
    section,
    setting,
    too_large,
)
from lora_lab.settings.stages import (
    STAGES,
    Caption,
    Check,
    Compare,
    Convert,
    Evaluate,
    Img2img,
    Pipeline,
    Refine,
    Stage,
    Train,
)

__all__ = [
    "KEYS_OF_STAGES", "STAGES", "Caption", "Check", "Compare", "Config", "Convert", "Dataset", "Evaluate", "Folder",
    "Img2img", "Likeness", "Loss", "Memory", "Model", "OptimizerTraits", "Packed", "Pipeline", "Prior", "Refine",
    "Sampler", "Schedule", "Score", "Stage", "Structure", "Text", "Tracker", "Train", "Triggers", "build_config",
]  # fmt: skip

PER_JOB_OF_ADAPTER = ("r", "lora_alpha", "use_rslora", "init_lora_weights")

# The bounds of what other libraries take, under the names that the options in conf/ have for it. A library would refuse
# it with words of its own, or not at all.
POSITIVE, FRACTION, AT_LEAST_1 = Bounds(gt=0), Bounds(ge=0, lt=1), Bounds(ge=1)
ALPHA = Bounds(gt=0, hint="; kohya's 0 means alpha = rank, which is the default here: leave the key out")
BOUNDS_OF_ADAPTER = {
    "r": AT_LEAST_1,
    "rank_pattern": AT_LEAST_1,
    **dict.fromkeys(("lora_alpha", "alpha", "alpha_pattern"), ALPHA),
    **dict.fromkeys(("lora_dropout", "rank_dropout", "module_dropout"), FRACTION),
}
BOUNDS_OF_OPTIMIZER = {
    **dict.fromkeys(("lr", "eps", "eps1", "eps2", "clip_threshold", "d0", "d_coef"), POSITIVE),
    **dict.fromkeys(("betas", "beta1", "beta2", "beta3", "momentum"), FRACTION),
    **dict.fromkeys(("weight_decay", "r", "weight_lr_power"), Bounds(ge=0)),
    "decay_rate": Bounds(lt=0),
}
TEXTS_OF_OPEN_GROUPS = {
    *(f"captioner.{key}" for key in ("name", "base", "prompt", "system", "exclude", "hint_prompt", "url", "key_file")),
    *(f"refiner.{key}" for key in ("article", "base", "strip", "style", "system", "url", "key_file")),
}
BOUNDS_OF_SERVER = {
    **dict.fromkeys(("max_tokens", "parallel"), AT_LEAST_1),
    **dict.fromkeys(("retries", "temperature"), Bounds(ge=0)),
    "timeout": POSITIVE,
}
BOUNDS_OF_CAPTIONER = BOUNDS_OF_SERVER | {
    **dict.fromkeys(("beams", "batch_size", "image_size"), AT_LEAST_1),
    **dict.fromkeys(("min_confidence", "general_threshold", "character_threshold"), Bounds(ge=0, le=1)),
}
BOUNDS_OF_REFINER = BOUNDS_OF_SERVER | {**dict.fromkeys(("group", "max_words"), AT_LEAST_1), "new_words": Bounds(ge=0)}

# What a file name may not have on one of the systems to which a LoRA may be copied.
LONGEST_NAME = 200  # bytes; the system's 255 less what is put behind a name: step, number, suffix, that of a new file
FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')
RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


def _kind(stage: object) -> object:
    return stage.get("kind") if isinstance(stage, dict) else getattr(stage, "kind", None)


AnyStage = Annotated[
    Union[tuple(Annotated[stage, Tag(name)] for name, stage in STAGES.items())],  # noqa: UP007  (of a tuple)
    Discriminator(_kind),
]
KEYS_OF_STAGES = {name: [*stage.__pydantic_fields__] for name, stage in STAGES.items()}


@section
class Config(Section):
    stage: AnyStage
    model: Model
    dataset: Dataset
    # Training compares the captions themselves, by their hash; the refined caption of a photo is a prompt of img2img.
    captioner: Annotated[dict[str, Any], Location("captioner")] = open_group(
        "the captioner",
        decides=("weights", "request"),
        hashed_as="captions",
        decide_nothing=("name",),
        bounds=BOUNDS_OF_CAPTIONER,
    )
    refiner: Annotated[dict[str, Any], Location("refiner")] = open_group(
        "the refiner",
        decides=("weights", "request"),
        hashed_as="captions",
        bounds=BOUNDS_OF_REFINER,
        own={
            "strip": (
                [],
                "phrases that are taken out of refined captions, so that the trigger stands for them; auto: those in "
                "four of five captions of the folder, for stage=refine",
            )
        },
    )
    adapter: dict[str, Any] = open_group(
        "peft's adapter", decides="weights", per_job=PER_JOB_OF_ADAPTER, bounds=BOUNDS_OF_ADAPTER
    )
    text: Text
    optimizer: dict[str, Any] = open_group(
        "the optimizer",
        decides="weights",
        per_job=True,
        decide_nothing=("averages_weights", "finds_lr", "state_bytes"),
        bounds=BOUNDS_OF_OPTIMIZER,
    )
    schedule: Schedule
    loss: Loss
    prior: Prior
    sampler: Sampler
    structure: Structure
    likeness: Likeness
    memory: Memory
    score: Score
    tracker: Tracker
    trigger: str | dict[str, str] = setting(
        "the word that names the character; {folder: word, ...} for several characters",
        decides=("weights", "request"),
        default="HANA_TOFU",
    )
    class_noun: str = setting(
        "noun for others of the character's kind, where a text is about one of those",
        decides="request",
        default="character",
    )
    name: str = setting(
        "the LoRA file is models/lora/<name>.safetensors; several triggers are joined",
        decides="nothing",
        per_job=True,
        default_from="trigger",
    )
    lr: float = setting("learning rate", decides="weights", per_job=True, default=1e-4, gt=0)
    rank: int = setting("inner dimension of the LoRA's matrices", decides="weights", per_job=True, default=16, ge=1)
    steps: int = setting(
        "optimizer steps",
        decides="weights",
        per_job=True,
        may_change="a finished run is continued with more steps",
        default=500,
        ge=1,
    )
    batch_size: int = setting("images in one forward pass", decides="weights", default=1, ge=1)
    seed: int = setting(
        "seed of every random number of training", decides="weights", per_job=True, default=0, ge=0, lt=SEEDS
    )
    lora: AnyPaths = setting(
        "LoRA to draw with or to score (or a list): file, name in models/lora or run folder",
        decides="request",
        per_job=True,
        default=None,
    )
    resume: AnyPath | None = setting(
        "run folder or latest: continue that run from its newest checkpoint",
        decides="nothing",
        per_job=True,
        default=None,
    )
    publish: bool | None = setting(
        "copy the finished LoRA to models/lora; null does so except in the jobs of a sweep",
        decides="nothing",
        per_job=True,
        default=None,
    )
    cache: AnyPath | None = setting(
        "folder of latents and text embeddings for other runs; null keeps them in memory",
        decides="nothing",
        default="cache",
    )
    compile: Literal["off", "blocks", "full"] = setting(
        "torch.compile for the UNet of training on a GPU: blocks takes a quarter minute once, full a minute or two",
        decides="cost",
        default="off",
    )
    device: str = setting("auto takes cuda, else mps, else cpu", decides="nothing", default="auto")
    allow_targets: list[str] = setting(
        "modules, or classes and functions, that _target_ may name besides those of conf/; only typed on the command "
        "line, also when a run is resumed",
        decides="nothing",
        default_factory=list,
    )

    def __post_init__(self) -> None:
        refuse_triggers(self.triggers, self.class_noun)
        if self.stage.one_character and len(self.triggers.all) > 1:
            one_of = " or ".join(f"trigger={trigger}" for trigger in self.triggers.all)
            raise InputError(f"trigger={self.triggers}: stage={self.stage.kind} draws one character, set {one_of}")
        if self.text.tokens and len(self.triggers.all) > 1:
            raise InputError(
                f"text.tokens={self.text.tokens}: new tokens stand for one trigger, not for {self.triggers.phrase}: "
                "set text.tokens=0, or train a LoRA of each"
            )
        if reason := unfit_for_a_file(self.name):
            raise SettingError("name", f"name={self.name[:60]}: the name becomes a file name, so it {reason}")
        for key, info in type(self).__pydantic_fields__.items():
            for inner, bounds in facts_of(info).bounds if facts_of(info) else ():
                refuse_outside(f"{key}.{inner}", getattr(self, key).get(inner), bounds)
        if self.schedule.warmup_steps(self.steps) >= self.steps:
            raise InputError(f"schedule.warmup={self.schedule.warmup:g}: a warm-up must end before steps={self.steps}")
        if self.schedule.name == "polynomial" and self.rate <= 1e-7:
            raise InputError(f"schedule=polynomial falls to 1e-7, and the learning rate is only {self.rate:g}")
        OptimizerTraits.split(self.optimizer)

    @field_validator("trigger", "name", mode="before")
    @classmethod
    def _convert_triggers(cls, value: object, info: Any) -> object:
        """Texts of a mapping folder -> trigger; in place of a name, which is the trigger by default, they joined.

        A mapping arrives as text if Hydra's grammar lacks the letters of a folder."""
        if isinstance(value, str) and value[:1] + value[-1:] == "{}":
            with suppress(YAMLError):
                value = safe_load(value)
        texts = value.values() if isinstance(value, dict) else [value]
        if any(text is None or isinstance(text, (dict, list)) for text in texts):
            raise PydanticCustomError("trigger", "not a text, or folders with a text each: {tofu: A, mug: B}")
        if not isinstance(value, dict):
            return value
        by_folder = {normalize("NFC", str(folder)).strip("/"): str(trigger) for folder, trigger in value.items()}
        return "-".join(dict.fromkeys(by_folder.values())) if info.field_name == "name" else by_folder

    @property
    def triggers(self) -> Triggers:
        """`trigger` as it is for one character and for several."""
        return Triggers(self.trigger if isinstance(self.trigger, dict) else {"": self.trigger})

    @property
    def character(self) -> str:
        """The trigger, of several the first."""
        return self.triggers.all[0]

    @property
    def rate(self) -> float:
        """The learning rate that the optimizer gets: `lr`, unless its file in conf/ has a number of its own."""
        return self.lr if self.optimizer.get("lr") is None else self.optimizer["lr"]

    def inputs_of_scores(self) -> list[str]:
        """The keys that name what scoring needs; [] where nothing is scored."""
        if self.model.judge is None:
            return []
        # They read the drawn images back.
        readers = ["captioner", "refiner"] if self.score.attributes or self.score.photos is not None else []
        return ["model.judge", "model.dino", "score.held_out", "score.photos", *readers]


def refuse_triggers(triggers: Triggers, class_noun: str) -> None:
    """Raise InputError for triggers that are no words, that cannot be told apart, or that are in the class noun."""
    if not triggers.all:
        raise InputError("trigger={}: name at least one folder and its trigger")
    for trigger in triggers.all:
        if not trigger.strip() or trigger != " ".join(trigger.split()):
            raise InputError(f"trigger={trigger!r}: the trigger is one or more words without spaces around them")
        if trigger in class_noun or not class_noun.strip():
            raise InputError(
                f"class_noun={class_noun!r}: name what others of the kind of {trigger} are called, such as character"
            )
        if longer := next((other for other in triggers.all if trigger in other and trigger != other), None):
            raise InputError(f"trigger={triggers}: {trigger} is a part of {longer}, choose words that are not")


def unfit_for_a_file(name: str) -> str | None:
    """Why a file of this name, or one that begins with it, cannot be written everywhere; None if it can."""
    if found := FORBIDDEN.search(name):
        return f"may not hold {'a slash' if found[0] in '/' else repr(found[0])}"
    if not name.strip(" .") or name != name.strip(" ") or name.endswith("."):
        return "may not be empty, begin or end with a space, or end with a dot"
    if RESERVED.fullmatch(name):
        return "may not be one that Windows reserves for a device"
    if (size := len(name.encode("utf-8", "surrogateescape"))) > LONGEST_NAME:
        return f"may have {LONGEST_NAME} bytes, not {size}"
    return None


def refuse_outside(key: str, value: Any, bounds: Bounds) -> None:
    """Raise SettingError for a number, or one of a list or a dict, that is not within `bounds`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for position, item in items:
        refuse_outside(f"{key}.{position}" if isinstance(value, dict) else f"{key}[{position}]", item, bounds)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if reason := too_large(value):
        raise SettingError(key, f"{key}={value}: {reason}")
    if not bounds.hold(value):
        raise SettingError(key, f"{key}={value}: {key.rpartition('.')[2]} must be {bounds.text()}{bounds.hint}")


@dataclass
class Packed:
    """The keys of hydra/launcher=packed."""

    _target_: str = "hydra_plugins.lora_lab.PackedLauncher"
    max_jobs: int | None = field(default=None)  # that share a step; null: as many as the memory should take
    workers: int | None = field(default=None)  # processes; null: one for each GPU


def build_config(tree: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """The checked configuration of a nested dict, or the keys of it that do not exist.

    Raises SettingError for a wrong value, InputError for values that contradict each other."""
    try:
        return Config(**tree), []
    except ValidationError as error:
        unknown, wrong = refusals(error, Config)
        if unknown:
            return None, unknown
        raise wrong[0] from error


NOT_COMPARED = ("stage", "lora")  # on the comparison page of trainings, which read neither


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


def text_keys() -> set[str]:
    """The keys whose values are texts or lists of texts: what is typed for them is never a number."""
    return {key for key, info in fields_of() if is_text(info) and not facts_of(info).is_open} | TEXTS_OF_OPEN_GROUPS


def training_fingerprint(config: Config) -> dict[str, Any]:
    """By its dotted key every setting that decides the weights and that a resumed run may not change.

    What files hold is compared by hashes, which are not in it: see `hash_names`."""
    compared = {v.key: v.value for v in values_of(config) if _compared(v.facts)}
    # A folder may move, and None is what older checkpoints have for a training without a prior.
    kind = None if config.prior.kind == "none" else config.prior.kind
    repeats = [folder.repeats for folder in config.dataset.folders]
    trigger = config.trigger if isinstance(config.trigger, str) else str(config.triggers)
    return compared | {
        "dataset.repeats": repeats, "loss.mask": config.loss.masks, "prior.kind": kind,
        "text.max_tokens": config.text.max_tokens or 77, "trigger": trigger,
    }  # fmt: skip


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


def base_image_settings(model: Model, loss: Loss, memory: Memory, sampler: Sampler, text: Text) -> dict[str, Any]:
    """By its dotted key every setting that decides what the base draws for one prompt and seed; the files of the base
    have a hash."""
    # Without it images that were drawn before there was a choice keep their names.
    long = {} if text.max_tokens in (None, 77) else {"text.max_tokens": text.max_tokens}
    sections = {"model": model, "loss": loss, "memory": memory, "sampler": sampler}
    values = [value for name, section in sections.items() for value in values_of(section, f"{name}.")]
    return {v.key: v.value for v in values if "images" in v.facts.decides and not v.facts.hashed_as} | long


def shown_on_page(key: str, drawn: bool = False) -> bool:
    """Whether the comparison page tells runs apart by `key`, the dotted key of a setting or the name of a group; the
    runs are trainings, or have `drawn` photos."""
    if (key in NOT_COMPARED and not (drawn and key == "lora")) or key.partition(".")[0].partition("/")[0] == "hydra":
        return False
    known = [facts for name, info in fields_of() if _covers(key, name, facts := facts_of(info))]
    return not known or any(facts.decides != ("nothing",) for facts in known)


def _covers(key: str, name: str, facts: Facts) -> bool:
    return name == key or name.startswith(f"{key}.") or (facts.is_open and key.startswith(f"{name}."))
