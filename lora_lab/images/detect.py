"""Models of transformers that see the depth, the pose or the person of a photo, each loaded for one call only."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    AutoModelForSemanticSegmentation,
    VitPoseForPoseEstimation,
)

from lora_lab.base.locate import loading, locate_model
from lora_lab.console import quiet_loading
from lora_lab.errors import InputError

DISTANCES = ("zoedepth", "depth_pro", "glpn")  # models that give distances; others give what is larger nearby
SEEN = 0.3  # score of a joint from which on it is drawn
# OpenPose's joints in COCO's order (None is the neck, between the shoulders), and its limbs and colours.
JOINTS = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
SHOULDERS = (5, 6)
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
         (0, 14), (14, 16), (0, 15), (15, 17))  # fmt: skip
COLOURS = ((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
           (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
           (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85))  # fmt: skip


@torch.inference_mode()
def depth_maps(key: str, name: str, photos: Sequence[Image.Image], device: torch.device) -> list[Image.Image]:
    """The depth of RGB photos as images of their sizes, white is nearest, by the model that the setting `key` names.

    Raises InputError if it cannot be loaded."""
    model, processor = _load(key, name, AutoModelForDepthEstimation, device)
    config, maps = model.config, []
    far = config.model_type in DISTANCES or getattr(config, "depth_estimation_type", None) == "metric"
    for photo in photos:
        depth = _resized(model(**_inputs(model, processor, photo)).predicted_depth[None], photo)[0, 0]
        depth = -depth if far else depth
        depth = (depth - depth.min()) / (depth.max() - depth.min()).clamp(min=1e-12)
        maps.append(Image.fromarray((depth * 255).round().byte().cpu().numpy()).convert("RGB"))
    return maps


@torch.inference_mode()
def skeletons(key: str, name: str, photos: Sequence[Image.Image], device: torch.device) -> list[Image.Image | None]:
    """The pose of the person that fills each RGB photo, drawn as OpenPose does, by the ViTPose model that the setting
    `key` names; None where it finds none. Raises InputError if it cannot be loaded."""
    model, processor = _load(key, name, VitPoseForPoseEstimation, device)
    experts = getattr(model.config.backbone_config, "num_experts", 1) > 1
    options = {"dataset_index": torch.zeros(1, dtype=torch.long, device=device)} if experts else {}
    drawn = []
    for photo in photos:
        boxes = [[[0.0, 0.0, float(photo.width), float(photo.height)]]]
        output = model(**_inputs(model, processor, photo, boxes=boxes), **options)
        (((pose,),),) = (processor.post_process_pose_estimation(output, boxes=boxes),)
        drawn.append(skeleton(photo.size, pose["keypoints"].tolist(), pose["scores"].tolist()))
    return drawn


def skeleton(size: tuple[int, int], points: Sequence, scores: Sequence[float]) -> Image.Image | None:
    """OpenPose's drawing, of `size`, of COCO's 17 keypoints (x, y) in pixels; None without a limb."""
    seen = [tuple(point) if score >= SEEN else None for point, score in zip(points, scores, strict=True)]
    left, right = (seen[i] for i in SHOULDERS)
    neck = ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2) if left and right else None
    joints = [neck if i is None else seen[i] for i in JOINTS]
    limbs = [(joints[a], joints[b], colour) for (a, b), colour in zip(LIMBS, COLOURS, strict=False)]
    limbs = [(a, b, tuple(round(0.6 * channel) for channel in colour)) for a, b, colour in limbs if a and b]
    if not limbs:
        return None
    image, radius = Image.new("RGB", size), max(1, round(min(size) / 128))
    pen = ImageDraw.Draw(image)
    for a, b, colour in limbs:
        pen.line([a, b], colour, 2 * radius)
    for joint, colour in zip(joints, COLOURS, strict=True):
        if joint:
            pen.circle(joint, radius, colour)
    return image


def people(key: str, name: str, photos: Iterable[Image.Image], device: torch.device) -> Iterator[np.ndarray]:
    """Where RGB photos show people (H, W), boolean, one after the other, by the segmentation model that the setting
    `key` names. Raises InputError if it cannot be loaded or does not know people."""
    model, processor = _load(key, name, AutoModelForSemanticSegmentation, device)
    labels = {label.lower(): int(number) for number, label in model.config.id2label.items()}
    if "person" not in labels:
        raise InputError(f"{key}={name}: it has no label person, but {', '.join([*labels][:5])}, ...: name another")

    @torch.inference_mode()
    def person(photo: Image.Image) -> np.ndarray:
        logits = model(**_inputs(model, processor, photo)).logits
        return (_resized(logits, photo)[0].argmax(0) == labels["person"]).cpu().numpy()

    return map(person, photos)


def _load(key: str, name: str, kind: type, device: torch.device) -> tuple[Any, Any]:
    quiet_loading()
    location = locate_model(key, name)
    with loading(location, f"{key}={name}: cannot be loaded", "; name another"):
        model_type = AutoConfig.from_pretrained(location, trust_remote_code=False).model_type
        if kind is VitPoseForPoseEstimation and model_type != "vitpose":  # it would load, with random weights
            raise ValueError(f"it is a {model_type} model, not ViTPose")
        processor = AutoImageProcessor.from_pretrained(location, backend="pil", trust_remote_code=False)
        model = kind.from_pretrained(location, trust_remote_code=False, use_safetensors=True)
    return model.to(device).eval(), processor


def _inputs(model: Any, processor: Any, photo: Image.Image, **options: object) -> dict[str, Tensor]:
    return processor(images=photo, return_tensors="pt", **options).to(model.device, model.dtype)


def _resized(maps: Tensor, photo: Image.Image) -> Tensor:
    """Maps (1, C, h, w) of the photo's size."""
    return F.interpolate(maps.float(), (photo.height, photo.width), mode="bicubic", align_corners=False)
