"""The groups of settings that every run has: model, dataset, training, scores, tracker."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from lora_lab.errors import InputError
from lora_lab.settings.photo import ControlNets
from lora_lab.settings.setting import (
    SEEDS,
    AnyPath,
    DatasetRoot,
    FolderPath,
    FolderPaths,
    MaskSource,
    ModelLocation,
    Section,
    Seed,
    TrackerName,
    open_group,
    section,
    setting,
)

BOTH = ("weights", "images")
OUT_OF_MEMORY = "the way on from out of memory"  # training.memory advises it
KEYS_OF_PRIORS = {
    "none": (),
    "pictures": ("weight", "root", "prompt"),
    "generated": ("weight", "prompt", "number", "seed"),
    "prediction": ("weight", "class_noun"),
}
TIMESTEPS = 1000  # of SDXL's noise schedule
WINDOWS = {77: 77, 150: 152, 225: 227}  # text.max_tokens -> tokens that are read, start and end markers included
TEXT_ENCODERS = {"none": (), "first": (0,), "second": (1,), "both": (0, 1)}  # positions among the base's


@section
class Model(Section):
    name: str = setting("name of the option", decides="nothing")
    _target_: str = setting(
        "class of the base model, as lora_lab/base/protocol.py describes it",
        decides=BOTH,
        default="lora_lab.base.sdxl.SDXL",
    )
    base: ModelLocation = setting(
        "hub id, diffusers folder, or one .safetensors checkpoint; demo: is the package's folder",
        decides=BOTH,
        hashed_as="base",
    )
    vae: ModelLocation | None = setting(
        "VAE instead of the base's: hub id or folder; auto is a single file's own, else SDXL's for half precision",
        decides=BOTH,
        default=None,
    )
    config: AnyPath | None = setting(
        "folder of configs and tokenizers for a single-file checkpoint; null takes SDXL's, which are in the package",
        decides=BOTH,
        default=None,
    )
    judge: ModelLocation | None = setting(
        "CLIP model that scores LoRAs by the images they draw; null leaves scores out", decides="request", default=None
    )
    dino: ModelLocation | None = setting(
        "DINOv2 model that compares images for the scores; null uses CLIP", decides="request", default=None
    )
    segmenter: ModelLocation | None = setting(
        "segmentation model that finds the person for stage.mask; null finds it on a plain background only",
        decides="request",
        default=None,
    )
    resolution: int = setting("px; a bucket has about resolution^2 pixels", decides=BOTH, default=1024)
    bucket_step: int = setting("px; the sides of a bucket are multiples of it", decides=BOTH, default=64, ge=8)
    strength: float = setting("default of img2img's strength", decides="request", default=0.7, gt=0, le=1)
    draft_steps: int = setting(
        "default of img2img's draft_steps: with more of them a draft tells better what the image will be",
        decides="request",
        default=8,
        ge=1,
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "number format of the frozen base; auto is bf16, else fp16, and fp32 on a CPU", decides=BOTH, default="auto"
    )
    variant: str | None = setting("variant of the files on the hub: fp16 or null", decides=BOTH, default=None)
    controlnet: ControlNets

    def __post_init__(self) -> None:
        if self.resolution < self.bucket_step:
            raise InputError(f"model.resolution={self.resolution}: resolution must be at least {self.bucket_step}")


@section
class Sampler(Section):
    scheduler: dict[str, Any] = open_group("diffusers' scheduler, which computes the next latents", decides="images")
    steps: int = setting("denoising steps", decides="images", default=30, ge=1)
    guidance: float = setting(
        "scale of classifier-free guidance; 1 switches it off", decides="images", default=5.0, ge=0
    )
    negative_prompt: str = setting("prompt that guidance leads away from", decides="images", default="")
    batch_size: int = setting(
        "images of one size that are drawn together; above 1 an image depends slightly on the others",
        decides="images",
        default=1,
        ge=1,
    )
    capture: bool = setting(
        "record the UNet as a CUDA graph and replay it: faster, the same images",
        decides="cost",
        default_from="memory.capture",
    )
    fuse: bool = setting(
        "merge the LoRA into the base's weights while drawing: faster, rounded to the base's precision",
        decides="images",
        default=False,
    )


@section
class Memory(Section):
    gradient_checkpointing: bool = setting(
        "recompute activations in the backward pass: less memory, a third slower", decides="cost", default=False
    )
    offload: bool = setting(
        "img2img moves VAE, text encoders and UNet to the device one at a time; training does so with all but the UNet",
        decides="cost",
        default=False,
    )
    linear_weights: Literal["base", "fp8", "int8", "nf4", "fp8_products"] = setting(
        "number format of the frozen linear layers; base: model.precision; fp8_products: multiplied in fp8",
        decides=BOTH,
        default="base",
        may_change=OUT_OF_MEMORY,
    )
    convolution_weights: Literal["base", "fp8", "int8"] = setting(
        "number format of the frozen convolutions; base: model.precision",
        decides=BOTH,
        default="base",
        may_change=OUT_OF_MEMORY,
    )
    capture: bool = setting(
        "record a training step as a CUDA graph and replay it; the graph keeps its memory", decides="cost", default=True
    )
    vae_tiling: bool = setting(
        "run the VAE in tiles of half the resolution: less memory, half as much work again",
        decides=BOTH,
        default=False,
        may_change=OUT_OF_MEMORY,
    )
    cudnn_benchmark: bool = setting(
        "try cuDNN's convolution algorithms in the first steps and use the fastest, which may need more memory",
        decides="cost",
        default=False,
    )


@dataclass(frozen=True)
class Folder:
    """A folder of the dataset, whose pictures an epoch shows `repeats` times."""

    root: str | None
    repeats: int


@section
class Dataset(Section):
    root: DatasetRoot = setting(
        "folder of images with captions; for training also a list of folders and of {root, repeats}",
        decides="weights",
        hashed_as="dataset",
        default=None,
    )
    repeats: int = setting(
        "times that an epoch shows an image, in folders that do not set their own", decides="weights", default=1, ge=1
    )
    flip: bool = setting("also train on mirrored images", decides="weights", default=False)
    random_crop: bool = setting(
        "crop an image that is longer than its bucket at a random offset, not at the centre",
        decides="weights",
        default=False,
    )
    crops: int = setting(
        "of random_crop: offsets, evenly spaced; each is another latent to encode and cache",
        decides="weights",
        default=4,
        ge=2,
    )
    shuffle_captions: bool = setting(
        "put the comma-separated phrases of a caption in a random order", decides="weights", default=False
    )
    keep_tokens: int = setting("of shuffle_captions: phrases that stay in front", decides="weights", default=1, ge=0)
    caption_variants: int = setting(
        "of shuffle_captions: orders of a caption; each is another text to encode and cache",
        decides="weights",
        default=8,
        ge=2,
    )
    caption_prefix: str = setting("text before every caption; {trigger} is replaced", decides="weights", default="")
    caption_suffix: str = setting("text after every caption; {trigger} is replaced", decides="weights", default="")
    follow_links: bool = setting(
        "also read files that links in the folder name outside of it",
        decides="weights",
        hashed_as="dataset",
        default=False,
    )
    kohya_folders: bool = setting(
        "read repeats from names of subfolders, as kohya's scripts do: 10_tofu shows its images ten times",
        decides="weights",
        default=False,
    )

    def __post_init__(self) -> None:
        for folder in self.folders:
            if folder.repeats < 1:
                raise InputError(f"dataset.root={folder.root}: repeats={folder.repeats}: repeats must be at least 1")

    @property
    def folders(self) -> list[Folder]:
        """The folders of training. Raises InputError for a list of something else."""
        if not isinstance(self.root, list):
            return [self._folder(self.root)]
        if not self.root:
            raise InputError("dataset.root=[]: name at least one folder")
        return [self._folder(entry) for entry in self.root]

    @property
    def folder(self) -> str | None:
        """The folder of a stage that reads only one. Raises InputError where several are named."""
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


@section
class Prior(Section):
    kind: Literal["none", "pictures", "generated", "prediction"] = setting(
        "how the base's idea of the class is preserved", decides="weights", default="none"
    )
    weight: float | None = setting(
        "weight of the loss of the prior; the loss of the character has weight 1", decides="weights", default=None, ge=0
    )
    root: FolderPath | None = setting(
        "of prior=pictures: folder of class images, with captions unless prior.prompt is the caption of all",
        decides="weights",
        hashed_as="prior",
        default=None,
    )
    prompt: str | None = setting(
        "of prior=pictures: caption of all class images, null reads theirs; of prior=generated: the prompt they are "
        "drawn with",
        decides="weights",
        default=None,
    )
    number: int | None = setting("of prior=generated: class images", decides="weights", default=None, ge=1)
    seed: int | None = setting(
        "of prior=generated: seed of the class images; runs with the same settings share them",
        decides="weights",
        default=None,
        ge=0,
        lt=SEEDS,
    )
    class_noun: str | None = setting(
        "of prior=prediction: the noun that replaces the trigger in captions", decides="weights", default=None
    )

    def __post_init__(self) -> None:
        allowed = KEYS_OF_PRIORS[self.kind]
        for key in ("weight", "root", "prompt", "number", "seed", "class_noun"):
            value = getattr(self, key)
            missing = value is None or (isinstance(value, str) and not value.strip())
            if key in allowed and missing and (self.kind, key, value) != ("pictures", "prompt", None):
                raise InputError(f"prior.{key} is missing: prior={self.kind} needs it, set prior.{key}=...")
            if key not in allowed and value is not None:
                kinds = " or ".join(f"prior={kind}" for kind, keys in KEYS_OF_PRIORS.items() if key in keys)
                raise InputError(f"prior.{key}={value}: {key} belongs to {kinds}, set that too")


@section
class Schedule(Section):
    name: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        setting(
            "name of the schedule in diffusers.optimization.get_scheduler",
            decides="weights",
            per_job=True,
            default="constant_with_warmup",
        )
    )
    warmup: float = setting(
        "steps in which the learning rate rises from 0; below 1 a fraction of all steps",
        decides="weights",
        per_job=True,
        default=0.0,
        ge=0,
    )
    cycles: int = setting(
        "of cosine_with_restarts: times that the learning rate falls", decides="weights", per_job=True, default=1, ge=1
    )
    power: float = setting(
        "of polynomial: above 1 the learning rate falls early and ends slowly, below 1 the reverse",
        decides="weights",
        per_job=True,
        default=1.0,
        gt=0,
    )

    def __post_init__(self) -> None:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise InputError(
                f"schedule.warmup={self.warmup}: from 1 on this is a whole number of steps, below 1 a fraction of them"
            )
        if self.warmup and self.name == "constant":
            raise InputError(
                f"schedule.warmup={self.warmup}: constant has none, set schedule.name=constant_with_warmup"
            )
        for key, neutral, schedule in (("cycles", 1, "cosine_with_restarts"), ("power", 1, "polynomial")):
            if getattr(self, key) != neutral and self.name != schedule:
                raise InputError(f"schedule.{key}={getattr(self, key)}: only schedule={schedule} has {key}")

    def warmup_steps(self, steps: int) -> int:
        """The length of the warm-up of a training of `steps` steps, in steps."""
        return round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)


@section
class Loss(Section):
    prediction: Literal["auto", "epsilon", "v_prediction"] = setting(
        "what the base predicts: epsilon (the noise), v_prediction (the velocity), auto (as its scheduler says)",
        decides=("weights", "images"),
        default="auto",
    )
    zero_terminal_snr: bool | None = setting(
        "rescale the noise schedule to end in pure noise (Lin et al. 2023); null does as the base's scheduler says",
        decides=("weights", "images"),
        default=None,
    )
    weighting: Literal["none", "min_snr", "debiased"] = setting(
        "weights of the timesteps: none (equal), min_snr (Hang et al. 2023), debiased (Yu et al. 2023)",
        decides="weights",
        default="min_snr",
    )
    snr_gamma: float = setting(
        "of min_snr: timesteps of a higher signal-to-noise ratio weigh less", decides="weights", default=5.0, gt=0
    )
    type: Literal["l2", "l1", "huber", "smooth_l1"] = setting(
        "error of a latent pixel: l2 (squared), l1 (absolute), huber and smooth_l1 (l2 below huber_c, l1 above)",
        decides="weights",
        default="l2",
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = setting(
        "huber_c over the timesteps: constant, or falling from 1 to huber_c as noise grows: exponential, snr",
        decides="weights",
        default="snr",
    )
    huber_c: float = setting(
        "of huber and smooth_l1: where large errors begin, in standard deviations of the noise (Khrapov et al. 2024)",
        decides="weights",
        default=0.1,
        gt=0,
    )
    noise_offset: float = setting(
        "scale of one random number per channel added to the noise, so that brightness is learned too",
        decides="weights",
        default=0.0,
        ge=0,
    )
    pyramid_iterations: int = setting(
        "levels of coarser noise that are added (multi-resolution noise), 6 to 10 to use it",
        decides="weights",
        default=0,
        ge=0,
    )
    pyramid_discount: float = setting(
        "strength of a level as a fraction of the finer one's", decides="weights", default=0.3, ge=0, le=1
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = setting(
        "distribution of the timesteps: uniform, or logit_normal (Esser et al. 2024), which prefers the middle",
        decides="weights",
        default="uniform",
    )
    logit_mean: float = setting(
        "of logit_normal: above 0 noisier timesteps are drawn more often, below 0 clearer ones",
        decides="weights",
        default=0.0,
    )
    logit_std: float = setting(
        "of logit_normal: the smaller, the nearer the timesteps are to the mean", decides="weights", default=1.0, gt=0
    )
    min_timestep: int = setting("the clearest timestep that is trained", decides="weights", default=0)
    max_timestep: int = setting(
        "the first timestep towards noise that is not trained", decides="weights", default=TIMESTEPS
    )
    mask: MaskSource = setting(
        "part of an image that is learned: none (all), alpha (its alpha channel), or a folder of masks with the "
        "images' names",
        decides="weights",
        default="none",
    )
    unmasked_weight: float = setting(
        "weight of the loss where the mask is black", decides="weights", default=0.0, ge=0, le=1
    )

    def __post_init__(self) -> None:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise InputError(
                "loss.zero_terminal_snr: a base that predicts epsilon learns nothing from pure noise, set "
                "loss.zero_terminal_snr=false, or loss.prediction=v_prediction if that is what the base predicts"
            )
        if not 0 <= self.min_timestep < self.max_timestep <= TIMESTEPS:
            raise InputError(
                f"loss.min_timestep={self.min_timestep} loss.max_timestep={self.max_timestep}: timesteps go from the "
                f"first up to, but without, the second, and lie between 0 and {TIMESTEPS}"
            )

    @property
    def masks(self) -> str:
        """The source of masks, without the name of the folder: none, alpha or folder."""
        return self.mask if self.mask in ("none", "alpha") else "folder"


@section
class Text(Section):
    max_tokens: int | None = setting(
        "length of captions and prompts: 77 is one chunk of 75 and its markers, 150 and 225 are two and three chunks; "
        "null: 77, for drawing what the LoRA was trained with",
        decides=BOTH,
        default=None,
    )
    encoders: Literal["none", "first", "second", "both"] = setting(
        "text encoders that get a LoRA on their attention", decides="weights", default="none"
    )
    encoder_lr: float | None = setting(
        "learning rate of that LoRA; null is the UNet's", decides="weights", default=None, gt=0
    )
    encoder_stop: float = setting(
        "fraction of training after which that LoRA is frozen", decides="weights", default=1.0, gt=0, le=1
    )
    tokens: int = setting(
        "new tokens that are trained in place of the trigger (pivotal tuning); 0 is off",
        decides="weights",
        default=0,
        ge=0,
    )
    tokens_from: str | None = setting(
        "text whose embeddings the new tokens start from; null draws them with the mean and spread of all others",
        decides="weights",
        default=None,
    )
    token_lr: float = setting(
        "learning rate of the new tokens; they have no weight decay", decides="weights", default=1e-3, gt=0
    )
    token_stop: float = setting(
        "fraction of training after which the new tokens are frozen", decides="weights", default=0.5, gt=0, le=1
    )

    def __post_init__(self) -> None:
        if self.max_tokens not in (None, *WINDOWS):
            raise InputError(f"text.max_tokens={self.max_tokens}: one of {', '.join(map(str, WINDOWS))}")
        if self.tokens > 75:
            raise InputError(f"text.tokens={self.tokens}: a text has 75 tokens, and the caption needs most of them")
        for key, off in (("encoder_lr", None), ("encoder_stop", 1)):
            if getattr(self, key) != off and not self.adapted:
                raise InputError(f"text.{key}={getattr(self, key)}: no text encoder is trained, set text.encoders=both")
        if self.tokens_from is not None and not self.tokens:
            raise InputError(f"text.tokens_from={self.tokens_from}: there are no new tokens, set text.tokens=2")
        if self.tokens_from is not None and not self.tokens_from.strip():
            raise InputError("text.tokens_from: name a word such as character, or set text.tokens_from=null")

    @property
    def window(self) -> int:
        """The tokens of a text that are read, start and end markers included."""
        return WINDOWS[self.max_tokens or 77]

    @property
    def adapted(self) -> tuple[int, ...]:
        """The positions of the text encoders that get a LoRA beside the network."""
        return TEXT_ENCODERS[self.encoders]

    @property
    def learns(self) -> bool:
        """Whether captions must be encoded in every step."""
        return bool(self.adapted or self.tokens)


@dataclass(frozen=True)
class Triggers:
    """The words that name the characters of a dataset."""

    by_folder: Mapping[str, str]  # the folder of a character's images -> its trigger; {"": trigger} of one character

    @property
    def all(self) -> list[str]:
        """Each trigger once, in the order of the folders."""
        return list(dict.fromkeys(self.by_folder.values()))

    @property
    def phrase(self) -> str:
        """All of them as one text."""
        return ", ".join(self.all)

    def of(self, name: str) -> str:
        """The trigger of the image `name` (as Sample.name), by its innermost folder. Raises InputError for an image in
        no folder of a trigger."""
        trigger = self._find(name)
        if trigger is None:
            raise InputError(
                f"{name} is in no folder of trigger={self}: add its folder and trigger, or move it into another folder"
            )
        return trigger

    def _find(self, name: str) -> str | None:
        folders = [folder for folder in self.by_folder if not folder or name.startswith(f"{folder}/")]
        return self.by_folder[max(folders, key=len)] if folders else None

    def names_by_trigger(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The images of each character, in their order. Raises InputError for an image in no folder of a trigger, and
        for a trigger without images."""
        found: dict[str, list[str]] = {trigger: [] for trigger in self.all}
        for name in names:
            found[self.of(name)].append(name)
        for folder, trigger in self.by_folder.items():
            if not found[trigger]:
                raise InputError(f"trigger={self}: there are no pictures in a folder {folder}")
        return found

    def own(self, names: Iterable[str], trigger: str) -> list[str]:
        """Of `names` those of the images of one character; all of them where it has no folder among theirs."""
        names = list(names)
        return [name for name in names if self._find(name) == trigger] or names

    def fill(self, prompts: Iterable[str]) -> list[str]:
        """The prompts; those with {trigger} once for each character, whose trigger stands in its place."""
        texts = []
        for prompt in prompts:
            triggers = self.all if "{trigger}" in prompt else self.all[:1]
            texts += [prompt.replace("{trigger}", trigger) for trigger in triggers]
        return texts

    def replaced(self, text: str, noun: str) -> str:
        """The text with `noun` in place of every trigger."""
        for trigger in self.all:
            text = text.replace(trigger, noun)
        return text

    def __str__(self) -> str:
        """As one types it."""
        return "{" + ", ".join(f"{folder}: {trigger}" for folder, trigger in self.by_folder.items()) + "}"


@dataclass(frozen=True)
class OptimizerTraits:
    """What kind of optimizer it is, as its file in conf/optimizer says."""

    elementwise: bool  # it updates every number by itself, so all parameters may be one tensor
    averages_weights: bool = False  # it keeps an average of the weights: eval() switches to it, train() back
    finds_lr: bool = False  # it finds its learning rate: group["lr"] is a factor of group["d"]
    state_bytes: float = 8.0  # bytes of its state for each trained number

    @classmethod
    def split(cls, optimizer: dict[str, Any]) -> tuple["OptimizerTraits", dict[str, Any]]:
        """The traits among the settings `optimizer`, and the rest, which are the library's own.

        Raises InputError for a trait that is missing or of the wrong type."""
        names = [field.name for field in fields(cls)]
        traits = {name: optimizer[name] for name in names if name in optimizer}
        if not isinstance(traits.get("elementwise"), bool):
            raise InputError(
                f"optimizer.elementwise={traits.get('elementwise')}: set true if the optimizer updates every number "
                "by itself, false if it needs whole matrices"
            )
        for name in ("averages_weights", "finds_lr"):
            if not isinstance(traits.get(name, False), bool):
                raise InputError(f"optimizer.{name}={traits[name]}: not true or false")
        size = traits.get("state_bytes", 0)
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 <= size < 1000:
            raise InputError(f"optimizer.state_bytes={size}: not a number of bytes")
        return cls(**traits), {key: value for key, value in optimizer.items() if key not in names}


@section
class Score(Section):
    prompts: list[str] = setting(
        "drawn with the LoRA; {trigger} is replaced; the first shows the character as most training images do",
        decides="request",
    )
    other_prompts: list[str] = setting(
        "also drawn with the LoRA, and should look as they do without it; {class_noun} is replaced", decides="request"
    )
    seeds: list[Seed] = setting(
        "one image for each prompt and seed; other_prompts use only the first seed",
        decides="request",
        default_factory=lambda: [0, 1],
    )
    attributes: list[str] = setting(
        "regular expressions: what a caption of the image must repeat of the prompt, with the same words in its "
        "groups; [] checks nothing",
        decides="request",
        default_factory=list,
    )
    held_out: FolderPath | None = setting(
        "folder of images of the character that are not trained on; scores compare with these instead",
        decides="request",
        default=None,
    )
    photos: FolderPaths | None = setting(
        "photos that the LoRA also draws over: the score then asks for resemblance too; an image, a folder or a list",
        decides="request",
        default=None,
    )
    photo_steps: int = setting("of photos: denoising steps", decides="request", default=8, ge=1)

    def __post_init__(self) -> None:
        for key in ("prompts", "other_prompts", "seeds"):
            values = getattr(self, key)
            if not values:
                raise InputError(f"score.{key}=[]: name at least one")
            if len(set(values)) < len(values):
                raise InputError(f"score.{key}: each is drawn once, remove the duplicates")
        for text in self.prompts:
            if "{trigger}" not in text:
                raise InputError(f"score.prompts: {text!r} is without the character, write {{trigger}} in its place")
        for text in self.other_prompts:
            if "{trigger}" in text:
                raise InputError(f"score.other_prompts: {text!r} has the trigger, these are prompts of others")
        for pattern in self.attributes:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"score.attributes: {pattern!r} is no regular expression ({error})") from error


@section
class Tracker(Section):
    kind: TrackerName = setting(
        "which tracker shows the run, set by tracker=", decides="nothing", per_job=True, default="off"
    )
    project: str | None = setting(
        "of wandb and trackio: the page that collects the runs", decides="nothing", per_job=True, default=None
    )
    mode: Literal["auto", "online", "offline"] = setting(
        "of wandb: auto is online with an API key and a connection, else offline; online insists on the key",
        decides="nothing",
        per_job=True,
        default="auto",
    )
    group: str | None = setting(
        "of wandb and trackio: runs of a group are compared; null is the sweep's name",
        decides="nothing",
        per_job=True,
        default=None,
    )
    tags: list[str] = setting("of wandb: words to find runs by", decides="nothing", per_job=True, default_factory=list)
