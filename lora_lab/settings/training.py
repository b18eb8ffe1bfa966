"""Settings of the mathematics of training: learning rate schedule, loss, text encoders, kind of optimizer."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from lora_lab.errors import InputError
from lora_lab.settings.setting import MaskSource, Section, section, setting

TIMESTEPS = 1000  # of SDXL's noise schedule
TEXT_ENCODERS = {"none": (), "first": (0,), "second": (1,), "both": (0, 1)}  # positions among the base's


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
    def adapted(self) -> tuple[int, ...]:
        """The positions of the text encoders that get a LoRA beside the network."""
        return TEXT_ENCODERS[self.encoders]

    @property
    def learns(self) -> bool:
        """Whether captions must be encoded in every step."""
        return bool(self.adapted or self.tokens)


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
