"""Settings of the stages. Each stage also names the keys whose files, folders and models it needs."""

from typing import TYPE_CHECKING, ClassVar, Literal

from lora_lab.errors import InputError
from lora_lab.settings.sections import TIMESTEPS
from lora_lab.settings.setting import (
    PARTS,
    AnyPath,
    FolderPath,
    FolderPaths,
    PhotoPart,
    Section,
    Seed,
    section,
    setting,
)

if TYPE_CHECKING:
    from lora_lab.settings.schema import Config

PROMPTS = (
    "A {trigger} with a purple background, winking with its left eye",
    "A {trigger} with a green background, wearing sunglasses, smiling",
    "A {trigger} with a yellow background, wearing a red party hat, laughing",
    "A {trigger} with a white background, with curly brown hair, wearing round glasses, smiling",
)
VALIDATION_TIMESTEPS = (100, 300, 500, 700, 900)


def _kind(name: str) -> str:
    return setting("name of the stage, set by stage=", decides="request", default=name)


@section
class Stage(Section):
    """What to do: `stage=train` puts a Train here, and so on."""

    several_folders: ClassVar[bool] = False  # whether dataset.root may be a list
    one_character: ClassVar[bool] = False  # whether `trigger` is one word
    draws: ClassVar[bool] = False  # whether its jobs in one process share the base: its function takes a Shared too

    def inputs(self, config: "Config") -> list[str]:
        """The keys that name what must exist before this stage starts."""
        return ["dataset.root"]


@section
class Check(Stage):
    several_folders: ClassVar[bool] = True

    kind: Literal["check"] = _kind("check")

    def inputs(self, config: "Config") -> list[str]:
        return ["dataset.root", "loss.mask"]


@section
class Caption(Stage):
    kind: Literal["caption"] = _kind("caption")
    mode: Literal["missing", "replace", "propose"] = setting(
        "missing: images without a caption; replace: also captions that a captioner wrote; propose: all, into "
        "metadata.proposed.jsonl",
        decides="request",
        default="missing",
    )

    def inputs(self, config: "Config") -> list[str]:
        return ["dataset.root", "captioner"]


@section
class Refine(Stage):
    kind: Literal["refine"] = _kind("refine")

    def inputs(self, config: "Config") -> list[str]:
        return ["dataset.root", "refiner"]


@section
class Convert(Stage):
    kind: Literal["convert"] = _kind("convert")
    source: AnyPath | None = setting(
        "caption file to read; null reads the one in dataset.root", decides="request", default=None
    )
    form: Literal["jsonl", "csv", "json", "txt", "caption"] = setting(
        "jsonl (metadata.jsonl), csv (metadata.csv), json (metadata.json), txt or caption (a .txt or .caption "
        "file for each image)",
        decides="request",
        default="jsonl",
    )
    output: AnyPath | None = setting("folder to write to; null is dataset.root", decides="request", default=None)

    def inputs(self, config: "Config") -> list[str]:
        return []


@section
class Mask(Stage):
    kind: Literal["mask"] = _kind("mask")
    subject: Literal["foreground", "person", "background"] = setting(
        "what is white: the foreground of a plain background; the person that model.segmenter finds, without one the "
        "foreground; or all but the person",
        decides="request",
        default="foreground",
    )
    mode: Literal["missing", "replace"] = setting(
        "missing: images without a mask; replace: also masks that are as the program wrote them",
        decides="request",
        default="missing",
    )
    output: AnyPath | None = setting(
        "folder of the masks, for loss.mask; null is NAME-masks beside dataset.root, for the bundled images masks in "
        "the run folder",
        decides="request",
        default=None,
    )
    feather: float = setting(
        "by how much a mask is larger than its subject, and over how much it then fades (a background only fades), as "
        "a fraction of the shorter side",
        decides="request",
        default=0.01,
        ge=0,
        le=1,
    )

    def inputs(self, config: "Config") -> list[str]:
        return ["dataset.root", *(["model.segmenter"] if self.subject != "foreground" else [])]


@section
class Train(Stage):
    several_folders: ClassVar[bool] = True

    kind: Literal["train"] = _kind("train")
    start_from: AnyPath | None = setting(
        "LoRA file, name in models/lora or run folder: training starts from its weights",
        decides="weights",
        hashed_as="start",
        default=None,
    )
    gradient_accumulation: int = setting("batches in a step", decides="weights", default=1, ge=1)
    max_grad_norm: float | None = setting(
        "gradient clipping: largest norm of the gradient; null is off",
        decides="weights",
        per_job=True,
        default=1.0,
        ge=0,
    )
    lora_plus_ratio: float = setting(
        "learning rate of LoRA's B matrices divided by that of A (LoRA+, Hayou et al. 2024); 16 to use it",
        decides="weights",
        per_job=True,
        default=1.0,
        gt=0,
    )
    caption_dropout: float = setting(
        "fraction of captions that are left out, for the unconditional side of guidance",
        decides="weights",
        per_job=True,
        default=0.0,
        ge=0,
        le=1,
    )
    ema_decay: float = setting(
        "save and draw an exponential moving average of the weights, of which a step keeps this fraction; 0 is off",
        decides="weights",
        per_job=True,
        default=0.0,
        ge=0,
        lt=1,
    )
    checkpoint_every: int = setting(
        "steps between checkpoints; 0 saves only the last", decides="nothing", per_job=True, default=100, ge=0
    )
    keep_checkpoints: int = setting(
        "newest checkpoints that are kept", decides="nothing", per_job=True, default=2, ge=1
    )
    validate_every: int = setting(
        "steps between validation images; 0 draws them only at the end",
        decides="request",
        per_job=True,
        default=100,
        ge=0,
    )
    prompts: list[str] = setting(
        "prompts of the validation images; {trigger} is replaced",
        decides="request",
        per_job=True,
        default_factory=lambda: list(PROMPTS),
    )
    seeds: list[Seed] = setting(
        "one validation image for each prompt and seed", decides="request", per_job=True, default_factory=lambda: [0]
    )
    validation_loss_every: int = setting(
        "steps between measurements of the loss under fixed noise; 0 is off", decides="request", default=0, ge=0
    )
    validation_root: FolderPath | None = setting(
        "folder of held-out images and captions for the validation loss; null uses the training images",
        decides="request",
        default=None,
    )
    validation_timesteps: list[int] = setting(
        "timesteps of the validation loss, one forward pass each for every image",
        decides="request",
        default_factory=lambda: list(VALIDATION_TIMESTEPS),
    )
    save_dtype: Literal["fp32", "fp16", "bf16"] = setting(
        "number format of the LoRA file; validation images are drawn with the file",
        decides="images",
        per_job=True,
        default="fp16",
    )

    def __post_init__(self) -> None:
        if self.validation_root and not self.validation_loss_every:
            raise InputError(
                f"stage.validation_root={self.validation_root}: the validation loss is measured every "
                "stage.validation_loss_every steps, and that is 0"
            )
        times = self.validation_timesteps
        if not times or len(set(times)) < len(times) or not all(0 <= time < TIMESTEPS for time in times):
            raise InputError(
                f"stage.validation_timesteps={times}: name one or more different timesteps between 0 and "
                f"{TIMESTEPS - 1}"
            )

    def inputs(self, config: "Config", name: str = "stage") -> list[str]:
        more = ["tracker.kind", f"{name}.validation_root", "loss.mask", "prior.root"]
        return ["dataset.root", "model.base", *config.inputs_of_scores(), *more]


@section
class Img2img(Stage):
    one_character: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    kind: Literal["img2img"] = _kind("img2img")
    photo: FolderPaths = setting("image, folder of images, or a list: [me.jpg,you.png]", decides="request")
    prompt: str | None = setting(
        "prompt instead of the photo's caption; {trigger} is replaced", decides="request", default=None
    )
    auto: bool | None = setting(
        "choose LoRA weight and strength for each photo and seed by drafts, which are scored for character and photo; "
        "null: where neither is given and dataset.root has the LoRA's training images",
        decides="request",
        default=None,
    )
    resemblance: bool = setting(
        "score the images for character and photo, where dataset.root has the LoRA's training images",
        decides="request",
        default=True,
    )
    budget: int = setting("of auto: drafts for each photo and seed", decides="request", default=4, ge=1, le=6)
    draft_steps: int = setting(
        "of auto: sampler.steps of a draft", decides="request", default_from="model.draft_steps", ge=1
    )
    choices: int = setting(
        "of auto: images for each photo and seed, of the best drafts that differ", decides="request", default=1, ge=1
    )
    strength: float | None = setting(
        "fraction of denoising done again: 0.3 keeps the photo; null: by auto or model",
        decides="request",
        default=None,
        gt=0,
        le=1,
    )
    seeds: list[Seed] = setting("one image for each photo and seed", decides="request", default_factory=lambda: [0])
    lora_weight: float | None = setting(
        "scale of the LoRA; 0 leaves it out; null: chosen by auto, else 1", decides="request", default=None
    )
    lora_schedule: list[float] = setting(
        "factors of lora_weight over the sampling steps, evenly spaced and interpolated: [0.5,1] rises",
        decides="request",
        default_factory=lambda: [1.0],
    )
    mask: PhotoPart | None = setting(
        "part of the photo that is drawn, the rest stays: person, background, or an image or folder of images whose "
        "white is drawn; null draws all",
        decides="request",
        default=None,
    )
    feather: float = setting(
        "of mask: by how much it is larger than the person, and over how much it then fades (a background only fades), "
        "as a fraction of the photo's shorter side",
        decides="request",
        default=0.03,
        ge=0,
        le=1,
    )

    def __post_init__(self) -> None:
        if not self.seeds:
            raise InputError("stage.seeds=[]: name at least one seed")
        if not self.lora_schedule:
            raise InputError("stage.lora_schedule=[]: name at least one factor")
        if self.choices > self.budget:
            raise InputError(
                f"stage.choices={self.choices}: of stage.budget={self.budget} drafts, name at most as many"
            )
        if self.auto and not self.resemblance:
            raise InputError("stage.auto=true chooses by scores: leave out stage.resemblance=false")
        if self.auto and self.lora_weight == 0:
            raise InputError("stage.auto=true compares drafts with a LoRA: leave out stage.lora_weight=0")
        if self.auto and self.lora_weight is not None and self.strength is not None:
            raise InputError(
                f"stage.auto=true chooses what stage.lora_weight={self.lora_weight:g} and "
                f"stage.strength={self.strength:g} give: leave one of them out"
            )

    @property
    def usual_weight(self) -> float:
        """The LoRA's weight where it is not chosen."""
        return 1.0 if self.lora_weight is None else self.lora_weight

    def inputs(self, config: "Config", name: str = "stage") -> list[str]:
        words = [] if self.prompt else ["captioner", "refiner"]
        kept = ["structure.controlnet", "structure.images", "structure.detector", "likeness.adapter", f"{name}.mask"]
        kept += ["model.segmenter"] if self.mask in PARTS else []
        return [f"{name}.photo", "model.base", *words, *kept]


@section
class Evaluate(Stage):
    several_folders: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    kind: Literal["evaluate"] = _kind("evaluate")
    ladder: bool = setting(
        "also score copies of each LoRA with weaker, stronger, missing and noisy weights, and say whether the judges "
        "order them as expected",
        decides="request",
        default=False,
    )

    def inputs(self, config: "Config") -> list[str]:
        return ["dataset.root", "model.base", *config.inputs_of_scores()]


@section
class Compare(Stage):
    kind: Literal["compare"] = _kind("compare")
    folder: FolderPaths = setting(
        "folder of a sweep, which gets the page; or a list of run folders, and the page is in this run's folder",
        decides="request",
    )

    def __post_init__(self) -> None:
        if not self.folders or not all(isinstance(folder, str) and folder.strip() for folder in self.folders):
            raise InputError(f"stage.folder={self.folder}: name a sweep's folder, or a list of run folders")

    @property
    def folders(self) -> list[str]:
        return self.folder if isinstance(self.folder, list) else [self.folder]

    def inputs(self, config: "Config") -> list[str]:
        return ["stage.folder"]


@section
class Pipeline(Stage):
    one_character: ClassVar[bool] = True

    kind: Literal["pipeline"] = _kind("pipeline")
    captions: Literal["new", "keep"] = setting(
        "new: caption a copy of the images; keep: copy the folder's captions and caption the images without one",
        decides="request",
        default="new",
    )
    train: Train
    img2img: Img2img

    def inputs(self, config: "Config") -> list[str]:
        photo = self.img2img.inputs(config, "stage.img2img")
        return [*photo, *self.train.inputs(config, "stage.train"), "captioner", "refiner"]


STAGES: dict[str, type[Stage]] = {
    "check": Check,
    "caption": Caption,
    "refine": Refine,
    "convert": Convert,
    "mask": Mask,
    "train": Train,
    "img2img": Img2img,
    "evaluate": Evaluate,
    "compare": Compare,
    "pipeline": Pipeline,
}
