"""Edges as OpenCV finds them; depth, pose and people as small models of the real structure see them."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
    VitPoseImageProcessor,
)

from lora_lab.demo import PHOTOS
from lora_lab.errors import InputError
from lora_lab.images.detect import depth_maps, people, skeleton, skeletons
from lora_lab.images.edges import canny

CPU = torch.device("cpu")
# Of cv2.Canny (OpenCV 5.0.0), pixel by pixel.
EDGES = "a49dbd3c023e75d41b28cb48fb3cd5a9e412dcf60df0526ff096ff120d137d21"


def photo(number=1):
    return Image.open(PHOTOS / f"{number}.png").convert("RGB")


def test_edges_are_those_of_opencv():
    digest = hashlib.sha256()
    noise = np.random.default_rng(0).integers(0, 256, (77, 101, 3), dtype=np.uint8)
    drawings = [(photo(i), *bounds) for i in range(1, 9) for bounds in ((100, 200), (20, 60))]
    for picture, low, high in [*drawings, (Image.fromarray(noise), 300, 600)]:
        edges = np.asarray(canny(picture, low, high))
        assert edges.shape == (*picture.size[::-1], 3) and (edges == edges[..., :1]).all()
        digest.update(edges[..., 0].tobytes())
    assert digest.hexdigest() == EDGES


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a depth, a pose and a segmentation model with random weights."""
    place = tmp_path_factory.mktemp("detectors")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 4}
    depth = DPTConfig(
        **size, image_size=32, patch_size=16, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )  # fmt: skip
    estimator = DPTForDepthEstimation(depth)
    torch.nn.init.ones_(estimator.head.head[4].bias)  # random weights alone may see nothing before the last ReLU
    estimator.save_pretrained(place / "depth")
    DPTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(place / "depth")
    backbone = VitPoseBackboneConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=2, image_size=[64, 48], patch_size=[16, 16],
        out_indices=[2],
    )  # fmt: skip
    pose = VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17)).eval()
    pose.save_pretrained(place / "pose")
    VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(place / "pose")
    for name, labels in (("people", ["wall", "person"]), ("cities", ["wall", "sky"])):
        config = SegformerConfig(
            hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], decoder_hidden_size=8, num_attention_heads=[1, 1, 1, 1],
            id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
        )  # fmt: skip
        SegformerForSemanticSegmentation(config).save_pretrained(place / name)
        SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(place / name)
    return place


def test_depth_pose_and_people_have_the_size_of_the_photo(models):
    wide = photo().resize((96, 64))
    (depth,) = depth_maps("structure.detector", str(models / "depth"), [wide], CPU)
    assert depth.mode == "RGB" and depth.size == wide.size and depth.getextrema() == ((0, 255),) * 3
    (inside,) = people("model.segmenter", str(models / "people"), [wide], CPU)
    assert inside.shape == (64, 96) and inside.dtype == bool
    (pose,) = skeletons("structure.detector", str(models / "pose"), [wide], CPU)
    assert pose is None or pose.size == wide.size  # what random weights are sure of is not known


def test_a_skeleton_is_drawn_as_openpose_draws_it():
    """A person who stands upright, seen from the front: its right is on the left."""
    face, arms = [(64, 20), (68, 16), (60, 16), (74, 18), (54, 18)], [(80, 40), (48, 40), (90, 60), (38, 60)]
    hands, legs = [(92, 80), (36, 80)], [(74, 80), (54, 80), (74, 100), (54, 100), (74, 120), (54, 120)]
    points = [*face, *arms, *hands, *legs]
    image = skeleton((128, 128), points, [1.0] * 17)
    assert image.getpixel((64, 20)) == (255, 0, 0) and image.getpixel((64, 40)) == (255, 85, 0), "nose, neck"
    assert image.getpixel((56, 40)) == (153, 0, 0), "the limb from neck to right shoulder, at 60 %"
    assert image.getpixel((92, 80)) == (0, 255, 85), "the left wrist"
    assert image.getpixel((10, 10)) == (0, 0, 0)
    assert skeleton((128, 128), points, [0.1] * 17) is None


@pytest.mark.parametrize(
    ("detect", "model", "sentence"),
    [
        (people, "cities", r"model\.key=.*: it has no label person, but wall, sky"),
        (depth_maps, "nothing", r"model\.key=.*nothing: no such file or folder"),
        (skeletons, "depth", r"model\.key=.*depth: cannot be loaded .*is a dpt model"),
    ],
)
def test_a_model_of_another_kind_is_refused(models, detect, model, sentence):
    with pytest.raises(InputError, match=sentence):
        detect("model.key", str(models / model), [photo()], CPU)
