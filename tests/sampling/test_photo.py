"""photo_to_request: photo -> caption -> prompt with the trigger -> request."""

import pytest
from PIL import Image

from lora_lab.captions.captioner import run_captioner
from lora_lab.captions.rules import Rule, compile_rules
from lora_lab.errors import RunError
from lora_lab.images.pixels import aspect_buckets
from lora_lab.sampling.generate import photo_to_request

BUCKETS = aspect_buckets(128, 16)


class SizeCaptioner:
    """Names the sizes of the images that it is shown."""

    def caption(self, images):
        return [f"a ghost of {image.width} by {image.height}" for image in images]


class SilentCaptioner:
    def caption(self, images):
        return []


@pytest.fixture
def photo():
    return Image.effect_noise((300, 200), 50).convert("RGB")


def test_the_refined_caption_of_the_whole_photo_becomes_the_prompt(photo):
    refiner = compile_rules(replace=[Rule("by", "x")], subjects=["ghost"])
    (caption,) = run_captioner(SizeCaptioner(), [photo])
    result = photo_to_request(photo, caption, refiner, "HANA_TOFU", BUCKETS, seed=3, strength=0.5)
    assert result.caption == "a ghost of 300 by 200"
    assert result.request.prompt == "A HANA_TOFU of 300 x 200"
    assert (result.request.seed, result.request.strength) == (3, 0.5)


def test_the_photo_is_cut_to_the_nearest_bucket(photo):
    request = photo_to_request(photo, "a ghost", compile_rules(), "HANA_TOFU", BUCKETS).request
    assert request.photo.size == request.size == (160, 96)
    assert photo.size == (300, 200)


def test_a_given_prompt_needs_no_captioner(photo):
    result = photo_to_request(photo, None, compile_rules(), "HANA_TOFU", BUCKETS, prompt="a {trigger} in the snow")
    assert result.caption is None and result.request.prompt == "a HANA_TOFU in the snow"


def test_a_captioner_without_a_caption_is_an_error(photo):
    with pytest.raises(RunError, match="SilentCaptioner returned 0 captions for 1 images"):
        run_captioner(SilentCaptioner(), [photo])
