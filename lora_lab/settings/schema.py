"""The shape of a run: every key of conf/, its type and its bounds."""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from lora_lab.errors import InputError

# What a key means and its unit stand beside its value in conf/; here are only names, types and bounds.


TEXT_ENCODERS = {
    "none": (),
    "first": ("text_encoder",),
    "second": ("text_encoder_2",),
    "both": ("text_encoder", "text_encoder_2"),
}


def _at_least(owner: object, prefix: str = "", **bounds: float) -> None:
    for key, bound in bounds.items():
        value = getattr(owner, key)
        if value is not None and not bound <= value < math.inf:  # nan is refused too
            raise InputError(f"{prefix}{key}={value}: {key} must be at least {bound}")


def _above(owner: object, prefix: str = "", **bounds: float) -> None:
    for key, bound in bounds.items():
        value = getattr(owner, key)
        if not bound < value < math.inf:
            raise InputError(f"{prefix}{key}={value}: {key} must be above {bound}")


def _share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{key}={value}: a share is between 0 and 1")


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{key}={value}: {key} is one of {', '.join(choices)}")


@dataclass
class Model:
    name: str
    base: str
    vae: str | None
    config: str | None
    judge: str | None
    dino: str | None
    resolution: int
    bucket_step: int
    strength: float
    precision: str
    variant: str | None

    def __post_init__(self) -> None:
        _one_of("model.precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        _at_least(self, "model.", bucket_step=8, resolution=self.bucket_step)


@dataclass(frozen=True)
class Folder:
    """A folder of the dataset, whose pictures an epoch shows `repeats` times."""

    root: str | None
    repeats: int


@dataclass
class Dataset:
    root: Any  # a folder, or a list of folders and of {root, repeats}; OmegaConf has no union of str and list
    repeats: int
    flip: bool
    random_crop: bool
    crops: int
    shuffle_captions: bool
    keep_tokens: int
    caption_variants: int
    caption_prefix: str
    caption_suffix: str

    def __post_init__(self) -> None:
        _at_least(self, "dataset.", repeats=1, crops=2, keep_tokens=0, caption_variants=2)
        for folder in self.folders:
            _at_least(folder, f"dataset.root={folder.root}: ", repeats=1)

    @property
    def folders(self) -> list[Folder]:
        """What training reads. Raises InputError for a list that is none of folders."""
        if not isinstance(self.root, list):
            return [self._folder(self.root)]
        if not self.root:
            raise InputError("dataset.root=[]: name at least one folder")
        return [self._folder(entry) for entry in self.root]

    @property
    def folder(self) -> str | None:
        """The one folder, for stages that know no more. Raises InputError where several are named."""
        if len(self.folders) > 1:
            raise InputError("dataset.root: several folders are for stage=train, name one of them here")
        return self.folders[0].root

    def _folder(self, entry: object) -> Folder:
        if isinstance(entry, dict) and "root" in entry and set(entry) <= {"root", "repeats"}:
            repeats = entry.get("repeats", self.repeats)
            if type(repeats) is int and isinstance(entry["root"], (str, int, float)):
                return Folder(str(entry["root"]), repeats)
        elif entry is None and entry is self.root:
            return Folder(None, self.repeats)
        elif isinstance(entry, (str, int, float)):  # a folder may be called 2026
            return Folder(str(entry), self.repeats)
        raise InputError(f"dataset.root: {entry} is no folder, write a name or {{root: FOLDER, repeats: 2}}")


@dataclass
class Schedule:
    name: str
    warmup: float
    cycles: int
    power: float

    def __post_init__(self) -> None:
        names = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
        _one_of("schedule.name", self.name, names)
        _at_least(self, "schedule.", warmup=0, cycles=1)
        _above(self, "schedule.", power=0)
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise InputError(f"schedule.warmup={self.warmup}: from 1 on these are whole steps, below 1 a share of them")
        if self.warmup and self.name == "constant":
            raise InputError(
                f"schedule.warmup={self.warmup}: constant has none, say schedule.name=constant_with_warmup"
            )
        for key, neutral, owner in (("cycles", 1, "cosine_with_restarts"), ("power", 1, "polynomial")):
            if getattr(self, key) != neutral and self.name != owner:
                raise InputError(f"schedule.{key}={getattr(self, key)}: only schedule={owner} has {key}")

    def warmup_steps(self, steps: int) -> int:
        """How many of `steps` are the warm-up."""
        return round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)


@dataclass
class Loss:
    prediction: str
    zero_terminal_snr: bool | None
    weighting: str
    snr_gamma: float
    type: str
    huber_schedule: str
    huber_c: float
    noise_offset: float
    pyramid_iterations: int
    pyramid_discount: float
    timestep_sampling: str
    logit_mean: float
    logit_std: float
    min_timestep: int
    max_timestep: int
    mask: str
    unmasked_weight: float

    def __post_init__(self) -> None:
        _one_of("loss.prediction", self.prediction, ("auto", "epsilon", "v_prediction"))
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise InputError(
                "loss.zero_terminal_snr: a base that predicts epsilon learns nothing where there is only noise, "
                "say loss.zero_terminal_snr=false, or loss.prediction=v_prediction if that is what the base predicts"
            )
        _one_of("loss.weighting", self.weighting, ("none", "min_snr", "debiased"))
        _one_of("loss.type", self.type, ("l2", "l1", "huber", "smooth_l1"))
        _one_of("loss.huber_schedule", self.huber_schedule, ("constant", "exponential", "snr"))
        _above(self, "loss.", snr_gamma=0, huber_c=0, logit_std=0)
        _at_least(self, "loss.", noise_offset=0, pyramid_iterations=0)
        _share("loss.pyramid_discount", self.pyramid_discount)
        _share("loss.unmasked_weight", self.unmasked_weight)
        _one_of("loss.timestep_sampling", self.timestep_sampling, ("uniform", "logit_normal"))
        if not math.isfinite(self.logit_mean):
            raise InputError(f"loss.logit_mean={self.logit_mean}: logit_mean is a finite number")
        if not 0 <= self.min_timestep < self.max_timestep <= 1000:  # SDXL has 1000
            raise InputError(
                f"loss.min_timestep={self.min_timestep} loss.max_timestep={self.max_timestep}: timesteps go from the "
                "first up to, but without, the second, and lie between 0 and 1000"
            )

    @property
    def masks(self) -> str:
        """Where masks come from, whatever the folder is called: none, alpha or folder."""
        return self.mask if self.mask in ("none", "alpha") else "folder"


KEYS_OF_PRIORS = {
    "none": (),
    "pictures": ("weight", "root", "prompt"),
    "generated": ("weight", "prompt", "number", "seed"),
    "prediction": ("weight", "class_noun"),
}


@dataclass
class Prior:
    kind: str
    weight: float | None
    root: str | None
    prompt: str | None
    number: int | None
    seed: int | None
    class_noun: str | None

    def __post_init__(self) -> None:
        _one_of("prior.kind", self.kind, tuple(KEYS_OF_PRIORS))
        mine = KEYS_OF_PRIORS[self.kind]
        for key in ("weight", "root", "prompt", "number", "seed", "class_noun"):
            value = getattr(self, key)
            missing = value is None or (isinstance(value, str) and not value.strip())
            if key in mine and missing and (self.kind, key, value) != ("pictures", "prompt", None):
                raise InputError(f"prior.{key} is missing: prior={self.kind} needs it, name one with prior.{key}=")
            if key not in mine and value is not None:
                owners = " or ".join(f"prior={kind}" for kind, keys in KEYS_OF_PRIORS.items() if key in keys)
                raise InputError(f"prior.{key}={value}: {key} is of {owners}, say that too")
        _at_least(self, "prior.", weight=0, number=1, seed=0)


@dataclass
class Text:
    encoders: str
    encoder_lr: float | None
    encoder_stop: float
    tokens: int
    tokens_from: str | None
    token_lr: float
    token_stop: float

    def __post_init__(self) -> None:
        _one_of("text.encoders", self.encoders, tuple(TEXT_ENCODERS))
        _at_least(self, "text.", tokens=0)
        _above(self, "text.", token_lr=0, encoder_stop=0, token_stop=0)
        _share("text.encoder_stop", self.encoder_stop)
        _share("text.token_stop", self.token_stop)
        if self.encoder_lr is not None:
            _above(self, "text.", encoder_lr=0)
        if self.tokens > 75:
            raise InputError(f"text.tokens={self.tokens}: a text has 75 places, and most of them are the caption's")
        for key, off in (("encoder_lr", None), ("encoder_stop", 1)):
            if getattr(self, key) != off and not self.adapted:
                raise InputError(f"text.{key}={getattr(self, key)}: no text encoder is trained, say text.encoders=both")
        if self.tokens_from is not None and not self.tokens:
            raise InputError(f"text.tokens_from={self.tokens_from}: there are no new tokens, say text.tokens=2")
        if self.tokens_from is not None and not self.tokens_from.strip():
            raise InputError("text.tokens_from: name a word such as character, or say null")

    @property
    def adapted(self) -> tuple[str, ...]:
        """The parts of the pipeline that get a LoRA beside the UNet."""
        return TEXT_ENCODERS[self.encoders]

    @property
    def learns(self) -> bool:
        """Whether captions must be encoded anew in every step."""
        return bool(self.adapted or self.tokens)


@dataclass
class Sampler:
    scheduler: dict[str, Any]
    steps: int
    guidance: float
    negative_prompt: str
    batch_size: int
    capture: bool
    fuse: bool

    def __post_init__(self) -> None:
        _at_least(self, "sampler.", steps=1, guidance=0, batch_size=1)


@dataclass
class Memory:
    gradient_checkpointing: bool
    offload: bool
    vae_tiling: bool
    linear_weights: str
    convolution_weights: str
    capture: bool
    cudnn_benchmark: bool

    def __post_init__(self) -> None:
        _one_of("memory.linear_weights", self.linear_weights, ("base", "fp8", "int8", "nf4", "fp8_products"))
        _one_of("memory.convolution_weights", self.convolution_weights, ("base", "fp8", "int8"))


@dataclass
class Score:
    prompts: list[str]
    other_prompts: list[str]
    seeds: list[int]
    attributes: list[str]
    held_out: str | None

    def __post_init__(self) -> None:
        for key in ("prompts", "other_prompts", "seeds"):
            if not getattr(self, key):
                raise InputError(f"score.{key}=[]: name at least one")
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise InputError(f"score.{key}: each is drawn once, take out what is there twice")
        for text in self.prompts:
            if "{trigger}" not in text:
                raise InputError(f"score.prompts: {text!r} is without the character, say {{trigger}} where it stands")
        for text in self.other_prompts:
            if "{trigger}" in text:
                raise InputError(f"score.other_prompts: {text!r} has the trigger, these are prompts of others")
        for pattern in self.attributes:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"score.attributes: {pattern!r} is no regular expression ({error})") from error


@dataclass
class Tracker:
    kind: str
    project: str | None
    mode: str
    group: str | None
    tags: list[str]

    def __post_init__(self) -> None:
        _one_of("tracker.mode", self.mode, ("auto", "online", "offline"))


@dataclass
class Stage:
    """What to do: `stage=train` puts a Train here, and so on."""


@dataclass
class Check(Stage):
    pass


@dataclass
class Caption(Stage):
    mode: str

    def __post_init__(self) -> None:
        _one_of("stage.mode", self.mode, ("missing", "replace", "propose"))


@dataclass
class Refine(Stage):
    pass


@dataclass
class Convert(Stage):
    source: str | None
    form: str
    output: str | None

    def __post_init__(self) -> None:
        _one_of("stage.form", self.form, ("jsonl", "csv", "json", "txt"))


@dataclass
class Train(Stage):
    start_from: str | None
    gradient_accumulation: int
    max_grad_norm: float | None
    lora_plus_ratio: float
    caption_dropout: float
    ema_decay: float
    checkpoint_every: int
    keep_checkpoints: int
    validate_every: int
    prompts: list[str]
    seeds: list[int]
    validation_loss_every: int
    validation_root: str | None
    validation_timesteps: list[int]
    save_dtype: str

    def __post_init__(self) -> None:
        _at_least(self, "stage.", gradient_accumulation=1, max_grad_norm=0)
        _at_least(self, "stage.", checkpoint_every=0, keep_checkpoints=1, validate_every=0, validation_loss_every=0)
        _above(self, "stage.", lora_plus_ratio=0)
        _one_of("stage.save_dtype", self.save_dtype, ("fp32", "fp16", "bf16"))
        _share("stage.caption_dropout", self.caption_dropout)
        if self.validation_root and not self.validation_loss_every:
            raise InputError(
                f"stage.validation_root={self.validation_root}: its loss is measured every "
                "stage.validation_loss_every steps, and that is 0"
            )
        times = self.validation_timesteps
        if not times or len(set(times)) < len(times) or not all(0 <= t < 1000 for t in times):  # SDXL has 1000
            raise InputError(
                f"stage.validation_timesteps={times}: name one or more different timesteps between 0 and 999"
            )
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"stage.ema_decay={self.ema_decay}: ema_decay is at least 0 (off) and below 1")


@dataclass
class Img2img(Stage):
    photo: Any  # a picture, a folder or a list of either; OmegaConf has no union of str and list
    prompt: str | None
    strength: float
    seeds: list[int]
    lora_weight: float

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise InputError(f"stage.strength={self.strength}: strength is above 0 and at most 1")
        if not self.seeds:
            raise InputError("stage.seeds=[]: name at least one seed")


@dataclass
class Evaluate(Stage):
    pass


@dataclass
class Compare(Stage):
    folder: Any  # a folder, or a list of folders; OmegaConf has no union of str and list

    def __post_init__(self) -> None:
        if not self.folders or not all(isinstance(f, str) and f.strip() for f in self.folders):
            raise InputError(f"stage.folder={self.folder}: name a sweep's folder, or a list of run folders")

    @property
    def folders(self) -> list[str]:
        return self.folder if isinstance(self.folder, list) else [self.folder]


@dataclass
class Pipeline(Stage):
    captions: str
    train: Train
    img2img: Img2img

    def __post_init__(self) -> None:
        _one_of("stage.captions", self.captions, ("new", "keep"))


@dataclass
class Packed:
    """The keys of hydra/launcher=packed."""

    _target_: str = "hydra_plugins.lora_lab.PackedLauncher"
    max_jobs: int | None = None  # that share a step; null: as many as the memory should take
    workers: int | None = None  # processes; null: one for each GPU


@dataclass
class Config:
    stage: Stage
    model: Model
    dataset: Dataset
    captioner: dict[str, Any]
    refiner: dict[str, Any]
    adapter: dict[str, Any]
    text: Text
    optimizer: dict[str, Any]
    schedule: Schedule
    loss: Loss
    prior: Prior
    sampler: Sampler
    memory: Memory
    score: Score
    tracker: Tracker
    trigger: str = MISSING
    class_noun: str = MISSING
    name: str = MISSING
    lr: float = MISSING
    rank: int = MISSING
    steps: int = MISSING
    batch_size: int = MISSING
    seed: int = MISSING
    lora: Any = None  # a name, or for stage=evaluate a list of them
    resume: str | None = None
    publish: bool | None = None
    cache: str | None = None
    compile: str = MISSING
    device: str = MISSING

    def __post_init__(self) -> None:
        _at_least(self, rank=1, steps=1, batch_size=1, seed=0)
        _one_of("compile", self.compile, ("off", "blocks", "full"))
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr={self.lr}: the learning rate is a number above 0")
        if not self.trigger.strip() or self.trigger != " ".join(self.trigger.split()):
            raise InputError(f"trigger={self.trigger!r}: the trigger is one or more words without spaces around them")
        if self.trigger in self.class_noun or not self.class_noun.strip():
            raise InputError(
                f"class_noun={self.class_noun!r}: say what others of the kind of {self.trigger} are called, such as "
                "character"
            )
        if Path(self.name).name != self.name or self.name in ("", ".", ".."):
            raise InputError(f"name={self.name}: the name becomes a file name, so it may not hold a slash")
        if self.schedule.warmup_steps(self.steps) >= self.steps:
            raise InputError(f"schedule.warmup={self.schedule.warmup:g}: a warm-up must end before steps={self.steps}")
        if self.schedule.name == "polynomial" and self.rate <= 1e-7:
            raise InputError(f"schedule=polynomial falls to 1e-7, and the learning rate is only {self.rate:g}")
        if not isinstance(self.optimizer.get("elementwise"), bool):
            raise InputError(
                f"optimizer.elementwise={self.optimizer.get('elementwise')}: say true if the optimizer updates every "
                "number by itself, false if it must know matrices"
            )

    @property
    def rate(self) -> float:
        """What the optimizer gets as its learning rate: `lr`, unless its file in conf/ says a number of its own."""
        return self.lr if self.optimizer.get("lr") is None else self.optimizer["lr"]


STAGES: dict[str, type[Stage]] = {
    "check": Check,
    "caption": Caption,
    "refine": Refine,
    "convert": Convert,
    "train": Train,
    "img2img": Img2img,
    "evaluate": Evaluate,
    "compare": Compare,
    "pipeline": Pipeline,
}

KEYS_OF_STAGES = {name: [f.name for f in fields(schema)] for name, schema in STAGES.items()}
