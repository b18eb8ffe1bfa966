"""How often the judge reads true drawings rightly, which is what a perfect model would reach."""

import time
from collections import defaultdict
from random import Random

import numpy as np
from PIL import Image, ImageFilter

from experiments.tiny_base.characters import random_character
from experiments.tiny_base.judge.reading import correct, kind_of, read
from experiments.tiny_base.palette import background as random_background
from experiments.tiny_base.render import picture


def blurred(image: Image.Image) -> Image.Image:
    """Blurred as by a small VAE."""
    return image.filter(ImageFilter.GaussianBlur(0.7))


def calibrate(count: int, seed: int) -> None:
    """Read `count` random characters, sharp and blurred, and print the share of right readings of each field."""
    rng = Random(seed)
    drawn = []
    while len(drawn) < count:
        svg, look = random_character(rng)
        name, rgb = random_background(rng)
        if kind_of(look):
            drawn.append((picture(svg, rgb), look, name))
    for title, change in (("sharp", lambda image: image), ("blurred", blurred)):
        right = defaultdict(list)
        started = time.process_time()
        for image, look, name in drawn:
            for field, value in correct(read(change(image), look), look, name).items():
                right[field].append(value)
        print(f"{title}: {(time.process_time() - started) / count:.2f} s a picture")
        for field, values in right.items():
            print(f"  {field:12} {np.mean(values):.3f} of {len(values)}")
