import math

import numpy as np
import pytest
from PIL import Image, ImageOps

from lora_lab.errors import InputError
from lora_lab.images.pixels import aspect_buckets, enlargement, fit, fit_crops, nearest_bucket

GRIDS = [(128, 16), (128, 64), (512, 64), (768, 64), (1000, 64), (1024, 32), (1024, 64), (100, 64)]


def test_sdxl_at_1024_gets_the_shapes_it_was_trained_on():
    buckets = aspect_buckets(1024, 64)
    assert {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344)} <= set(buckets)


@pytest.mark.parametrize(("resolution", "step"), GRIDS)
def test_every_bucket_fills_the_area_in_steps_and_lies_within_the_ratio(resolution, step):
    buckets = aspect_buckets(resolution, step, max_ratio=2.0)
    square = resolution // step * step
    assert (square, square) in buckets
    assert len(buckets) == len(set(buckets))
    assert {(height, width) for width, height in buckets} == set(buckets)
    for width, height in buckets:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) <= 2 * min(width, height)
        if width != height:
            assert (max(width, height) + step) * min(width, height) > resolution**2, "it could be longer"


def test_a_resolution_below_the_step_is_refused():
    with pytest.raises(InputError, match="resolution=32 is below 64"):
        aspect_buckets(32, 64)


def test_an_image_goes_to_the_bucket_that_crops_least():
    buckets = aspect_buckets(1024, 64)
    assert nearest_bucket((300, 300), buckets) == (1024, 1024)
    assert nearest_bucket((4000, 1000), buckets) == buckets[-1]
    assert nearest_bucket((3, 4000), buckets) == buckets[0]
    for size in buckets:
        assert nearest_bucket(size, buckets) == size
    # 1:1.1 and 1.1:1 are equally far from square, which a difference of plain ratios would deny
    wide, tall = nearest_bucket((1234, 1000), buckets), nearest_bucket((1000, 1234), buckets)
    assert wide == tall[::-1]


def test_any_size_fits_any_bucket_without_a_gap_and_loses_only_one_pair_of_edges():
    random = np.random.default_rng(0)
    buckets = aspect_buckets(128, 16)
    for width, height in np.exp(random.uniform(0, math.log(600), (200, 2))).astype(int).tolist():
        bucket = nearest_bucket((width, height), buckets)
        fitted = fit(Image.new("RGB", (width, height), "white"), bucket)
        assert fitted.picture.size == bucket
        assert fitted.original_size == (height, width) and fitted.target_size == bucket[::-1]
        assert np.asarray(fitted.picture).min() == 255, "a black edge: the crop reached beyond the picture"
        top, left = fitted.crop_top_left
        assert min(top, left) == 0 and max(top, left) >= 0
        scale = enlargement((width, height), bucket)
        assert abs(left - (width * scale - bucket[0]) / 2) <= 1 and abs(top - (height * scale - bucket[1]) / 2) <= 1


def test_the_crop_is_the_centre_and_its_corner_is_in_scaled_pixels():
    wide = Image.new("RGB", (400, 100), "red")
    wide.paste("blue", (150, 0, 250, 100))
    fitted = fit(wide, (64, 64))
    assert fitted.crop_top_left == (0, 96)  # 400x100 becomes 256x64, and (256 - 64) / 2 is cut from the left
    assert fitted.original_size == (100, 400)
    assert fitted.picture.getpixel((32, 32)) == (0, 0, 255)
    assert fit(wide.rotate(90, expand=True), (64, 64)).crop_top_left == (96, 0)


def test_a_picture_of_the_buckets_size_is_not_resampled():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(fit(Image.fromarray(pixels), (96, 64)).picture), pixels)


def test_crops_go_from_edge_to_edge_and_have_their_corners():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 164, 3), dtype=np.uint8)
    wide = Image.fromarray(pixels)
    for picture, turned in ((wide, False), (wide.transpose(Image.Transpose.ROTATE_90), True)):
        crops = fit_crops(picture, (64, 64), 5)
        places = [crop.crop_top_left for crop in crops]
        assert places == [(x, 0) if turned else (0, x) for x in (0, 25, 50, 75, 100)]
        for crop, (top, left) in zip(crops, places, strict=True):
            cut = (left, top, left + 64, top + 64)
            assert np.array_equal(np.asarray(crop.picture), np.asarray(picture.crop(cut)))
            mirrored, (top, left) = ImageOps.mirror(picture), crop.mirrored_top_left
            cut = (left, top, left + 64, top + 64)
            assert np.array_equal(np.asarray(ImageOps.mirror(crop.picture)), np.asarray(mirrored.crop(cut)))
            assert crop.original_size == picture.size[::-1] and crop.target_size == (64, 64)


@pytest.mark.parametrize(("width", "count"), [(64, 1), (71, 1), (72, 2), (80, 3), (88, 4), (300, 4)])
def test_there_are_no_more_crops_than_differ_by_a_latent_pixel(width, count):
    crops = fit_crops(Image.new("RGB", (width, 64)), (64, 64), 4)
    assert len(crops) == count
    if count == 1:
        assert crops[0].crop_top_left == fit(Image.new("RGB", (width, 64)), (64, 64)).crop_top_left
