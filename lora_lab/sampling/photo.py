"""From a photo to a request for sampling: photo -> caption -> prompt with the trigger -> request."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from lora_lab.captions.captioner import Captioner, run_captioner
from lora_lab.captions.refiner import Refiner, run_refiner
from lora_lab.images.buckets import Size, fit, nearest_bucket
from lora_lab.sampling.generate import Request


@dataclass(frozen=True)
class PhotoRequest:
    """A request to draw the character in place of the subject of a photo."""

    caption: str | None  # the captioner's caption of the photo; None if the prompt was given
    request: Request  # its photo is cut to the bucket


def photo_to_request(
    photo: Image.Image,
    captioner: Captioner | None,
    refiner: Refiner,
    trigger: str,
    buckets: Sequence[Size],
    *,
    prompt: str | None = None,
    seed: int = 0,
    strength: float = 1.0,
) -> PhotoRequest:
    """Caption an RGB photo of any size, refine the caption to a prompt, and cut the photo to the nearest bucket.

    With a `prompt`, in which {trigger} stands for the trigger, no captioner is needed. `buckets` are (width, height) in
    pixels; `strength` is above 0 (the photo itself) and at most 1 (noise only)."""
    caption = None
    if prompt:
        prompt = prompt.replace("{trigger}", trigger)
    else:
        (caption,) = run_captioner(captioner, [photo])
        (prompt,) = run_refiner(refiner, [caption], trigger)
    image = fit(photo, nearest_bucket(photo.size, buckets)).picture
    return PhotoRequest(caption, Request(prompt, seed, image.size, image, strength))
