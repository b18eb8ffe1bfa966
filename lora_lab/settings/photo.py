"""What an image keeps of a photo: settings of structure=, and the models for it that belong to a base."""

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
        if self.kind == "off":
            for key, info in type(self).__pydantic_fields__.items():
                if (value := getattr(self, key)) != info.default:
                    raise InputError(
                        f"structure.{key}={value}: structure is off, set structure={' or '.join(STRUCTURES)}"
                    )
