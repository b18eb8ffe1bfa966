"""What an image keeps of a photo: settings of structure= and likeness=, and the ControlNets of a base."""

from collections.abc import Sequence
from typing import Literal

from lora_lab.errors import InputError
from lora_lab.settings.setting import FolderPath, ModelLocation, Section, section, setting

STRUCTURES = ("canny", "depth", "pose", "tile")


@section
class ControlNets(Section):
    canny: ModelLocation | None = setting("ControlNet for edges", decides="request", default=None)
    depth: ModelLocation | None = setting("ControlNet for depth maps", decides="request", default=None)
    pose: ModelLocation | None = setting("ControlNet for skeletons of OpenPose", decides="request", default=None)
    tile: ModelLocation | None = setting("ControlNet for the photo's coarse colours", decides="request", default=None)


@section
class Structure(Section):
    kind: Literal["off", "canny", "depth", "pose", "tile"] = setting(
        "what of a photo img2img keeps through a ControlNet, set by structure=", decides="request", default="off"
    )
    controlnet: ModelLocation | None = setting(
        "ControlNet or union ControlNet of the base: hub id, diffusers folder or .safetensors file",
        decides="request",
        default=None,
    )
    scale: float = setting("weight of what the ControlNet adds to the UNet", decides="request", default=1.0, ge=0)
    end: float = setting(
        "fraction of the sampling steps after which the ControlNet is left out",
        decides="request",
        default=1.0,
        gt=0,
        le=1,
    )
    images: FolderPath | None = setting(
        "folder of control images with the photos' names, or one image for one photo; null computes them",
        decides="request",
        default=None,
    )
    detector: ModelLocation | None = setting(
        "of depth and pose: model of transformers that computes the control images", decides="request", default=None
    )
    low: float = setting(
        "of canny: gradient from which on a pixel continues an edge, as OpenCV's",
        decides="request",
        default=100.0,
        ge=0,
    )
    high: float = setting(
        "of canny: gradient from which on a pixel begins an edge, as OpenCV's", decides="request", default=200.0, ge=0
    )

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise InputError(f"structure.low={self.low:g}: low is at most high, which is {self.high:g}")
        _refuse_without_kind(self, "structure", STRUCTURES)
        if self.kind != "off" and self.controlnet is None:
            raise InputError(
                f"structure={self.kind}: model.controlnet has none for it, name one with structure.controlnet=..."
            )
        if self.kind in ("depth", "pose") and not (self.images or self.detector):
            raise InputError(
                f"structure.detector is missing: structure={self.kind} needs a model, or images in structure.images"
            )


@section
class Likeness(Section):
    kind: Literal["off", "ip_adapter"] = setting(
        "how img2img shows the photo's person to the UNet, set by likeness=", decides="request", default="off"
    )
    adapter: ModelLocation | None = setting(
        "IP-Adapter of the base: hub id or folder that has the next two", decides="request", default=None
    )
    weights: str | None = setting("its .safetensors file in there", decides="request", default=None)
    encoder: str | None = setting("folder in there of the CLIP that embeds the photo", decides="request", default=None)
    scale: float = setting("weight of the attention to the photo", decides="request", default=0.6, ge=0)

    def __post_init__(self) -> None:
        _refuse_without_kind(self, "likeness", ("ip_adapter",))
        for key in ("adapter", "weights", "encoder"):
            if self.kind != "off" and getattr(self, key) is None:
                raise InputError(f"likeness.{key} is missing: likeness={self.kind} needs it, set likeness.{key}=...")


def _refuse_without_kind(settings: Section, group: str, kinds: Sequence[str]) -> None:
    """Raise InputError for a setting that counts for nothing, because the group is off."""
    if settings.kind != "off":
        return
    for key, info in type(settings).__pydantic_fields__.items():
        if (value := getattr(settings, key)) != info.default:
            raise InputError(f"{group}.{key}={value}: {group} is off, set {group}={' or '.join(kinds)}")
