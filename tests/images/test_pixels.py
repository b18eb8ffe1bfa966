import io
import os
import socket
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from pillow_heif import register_heif_opener

from lora_lab.errors import InputError
from lora_lab.images.pixels import (
    aspect_buckets,
    count_frames,
    cut_away,
    fit,
    is_blank,
    nearest_bucket,
    open_picture,
    open_with_alpha,
)


@pytest.fixture
def opened(tmp_path):
    """Save a picture in a form, and read it as training does."""

    def save_and_open(picture, name="picture.png", background=(255, 255, 255), **options):
        picture.save(tmp_path / name, **options)
        result = open_picture(tmp_path / name, background)
        assert result.mode == "RGB"
        return result

    return save_and_open


def corners(picture):
    """The colours of the upper left, upper right, lower left and lower right pixel."""
    right, bottom = picture.width - 1, picture.height - 1
    return [picture.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


def matrix_profile(columns, gamma):
    """A minimal ICC 2.1 display profile: columns of the matrix to XYZ (D50), and one gamma for the three channels."""
    fixed = lambda value: struct.pack(">i", round(value * 65536))  # noqa: E731
    white = (0.9642, 1.0, 0.8249)
    points = zip((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"), [*columns, white], strict=True)
    tags = {tag: b"XYZ \0\0\0\0" + b"".join(map(fixed, point)) for tag, point in points}
    curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(gamma * 256))
    tags |= {tag: curve for tag in (b"rTRC", b"gTRC", b"bTRC")}
    table, data = struct.pack(">I", len(tags)), b""
    for tag, body in tags.items():
        table += tag + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(body))
        data += body
    size = 128 + len(table) + len(data)
    head = struct.pack(">I4xI", size, 0x02100000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += b"".join(map(fixed, white))
    return head.ljust(128, b"\0") + table + data


# Display P3 primaries, adapted to D50
P3 = matrix_profile([(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)], 2.2)


def test_an_opaque_srgb_png_keeps_every_value(opened):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(opened(Image.fromarray(pixels))), pixels)


def test_the_colour_hidden_under_full_transparency_stays_hidden(opened):
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.putpixel((0, 0), (0, 0, 255, 255))
    assert corners(opened(picture)) == [(0, 0, 255)] + [(255, 255, 255)] * 3
    assert corners(opened(picture, background=(0, 255, 0)))[1:] == [(0, 255, 0)] * 3


def test_half_transparency_blends_with_the_background(opened):
    blended = opened(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), background=(0, 0, 0)).getpixel((1, 1))
    assert blended == (128, 0, 0)


def test_grey_with_alpha_and_palettes_with_a_transparent_entry_are_composited(opened):
    assert opened(Image.new("LA", (4, 4), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert opened(palette).getpixel((0, 0)) == (255, 0, 0)
    assert opened(palette, transparency=1).getpixel((0, 0)) == (255, 255, 255)


def test_the_alpha_channel_is_returned_and_rotated_with_the_image(tmp_path):
    picture = Image.new("RGBA", (6, 4), (255, 0, 0, 255))
    picture.putpixel((0, 0), (0, 0, 255, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # the upper left comes to the upper right
    picture.save(tmp_path / "cut.png", exif=exif)
    opened, alpha = open_with_alpha(tmp_path / "cut.png")
    assert alpha.mode == "L" and alpha.size == opened.size == (4, 6)
    assert corners(alpha) == [255, 64, 255, 255]
    picture.convert("RGB").save(tmp_path / "whole.png")
    assert open_with_alpha(tmp_path / "whole.png")[1] is None


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp", "turned.tif"])
def test_a_phone_picture_on_its_side_is_turned_upright(opened, name):
    picture = Image.new("RGB", (32, 16), "white")
    picture.paste("black", (0, 0, 16, 16))  # left half black: orientation 6 turns it to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = opened(picture, name, exif=exif)
    assert upright.size == (16, 32)
    assert [sum(colour) > 380 for colour in corners(upright)] == [False, False, True, True]


def test_a_broken_exif_block_is_ignored(opened):
    assert opened(Image.new("RGB", (4, 2), "teal"), "a.png", exif=b"Exif\0\0garbage").size == (4, 2)


@pytest.mark.parametrize(("mode", "name"), [("I;16", "deep.png"), ("I;16", "deep.tif"), ("I", "deep.tif")])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(opened, mode, name):
    ramp = np.array([[0, 255, 32768, 65535]])
    picture = Image.fromarray(ramp.astype(np.uint16 if mode == "I;16" else np.int32))
    assert picture.mode == mode
    assert [grey for grey, _, _ in np.asarray(opened(picture, name))[0].tolist()] == [0, 1, 128, 255]


def test_floating_point_grey_from_zero_to_one_is_not_black(opened):
    ramp = opened(Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)), "ramp.tif")
    assert [grey for grey, _, _ in np.asarray(ramp)[0].tolist()] == [0, 128, 255]


def test_a_cmyk_image_keeps_its_colours(opened):
    cyan, magenta, yellow, black = Image.new("CMYK", (4, 4), (0, 255, 255, 0)).split()
    red = opened(Image.merge("CMYK", (cyan, magenta, yellow, black)), "print.tif").getpixel((0, 0))
    assert red[0] > 220 and red[1] < 60 and red[2] < 60


def test_display_p3_becomes_srgb(opened):
    p3 = (200, 100, 100)
    to_srgb = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    linear = to_srgb @ (np.array(p3) / 255) ** 2.2
    expected = 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    seen = opened(Image.new("RGB", (4, 4), p3), icc_profile=P3).getpixel((0, 0))
    assert np.abs(seen - expected).max() < 2.5  # a red nearly out of sRGB: (213, 96, 97)
    assert seen[0] > 208
    assert opened(Image.new("RGB", (4, 4), "white"), icc_profile=P3).getpixel((0, 0)) == (255, 255, 255)


def test_a_profile_is_applied_to_the_picture_and_not_to_its_background(opened):
    picture = Image.new("RGBA", (4, 4), (200, 100, 100, 255))
    picture.putpixel((3, 3), (9, 9, 9, 0))
    seen = opened(picture, icc_profile=P3, background=(200, 100, 100))
    assert seen.getpixel((0, 0))[0] > 208 and seen.getpixel((3, 3)) == (200, 100, 100)


@pytest.mark.parametrize("profile", [b"no profile at all", P3[:200], "LAB"])
def test_a_profile_that_does_not_fit_is_ignored(opened, profile):
    if profile == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert opened(Image.new("RGB", (4, 4), (10, 20, 30)), icc_profile=profile).getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("name", ["moving.webp", "moving.png", "pages.tif"])
def test_an_animation_gives_its_first_frame(opened, name):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("black", "white")]
    options = {"lossless": True} if name.endswith("webp") else {}
    assert opened(frames[0], name, save_all=True, append_images=frames[1:], **options).getpixel((8, 8)) == (0, 0, 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path, suffix, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
    path = tmp_path / f"half.{suffix}"
    path.write_bytes(whole.getvalue()[: int(kept * len(whole.getvalue()))])
    with pytest.raises(InputError, match=rf"half\.{suffix} is (cut off or damaged|not a picture)"):
        open_picture(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow tells of each damaged TIFF tag
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif"])
def test_a_file_with_flipped_bytes_opens_or_is_refused_but_never_crashes(tmp_path, suffix):
    random, whole = np.random.default_rng(1), io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(whole, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
    for _ in range(150):
        data = np.frombuffer(whole.getvalue(), dtype=np.uint8).copy()
        data[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
        path = tmp_path / f"flipped.{suffix}"
        path.write_bytes(data.tobytes())
        try:
            assert open_picture(path).mode == "RGB"
        except InputError as error:
            assert path.name in str(error)


def test_a_text_file_named_png_is_refused(tmp_path):
    (tmp_path / "notes.png").write_text("a tofu")
    with pytest.raises(InputError, match=r"notes\.png is not a picture"):
        open_picture(tmp_path / "notes.png")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(InputError, match=r"there is no picture .*me\.jpg"):
        open_picture(tmp_path / "me.jpg")
    with pytest.raises(InputError, match="cannot be read"):
        open_picture(tmp_path)


@pytest.mark.parametrize("side", [10_001, 20_000])  # Pillow itself only warns at the first and raises at the second
def test_a_picture_too_large_for_memory_is_refused_from_its_header(tmp_path, side):
    path = tmp_path / "wall.png"
    with path.open("wb") as file:  # a header alone: to decode it would fail in another way
        file.write(b"\x89PNG\r\n\x1a\n")
        PngImagePlugin.putchunk(file, b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        PngImagePlugin.putchunk(file, b"IDAT", b"")
    with pytest.raises(InputError, match=r"wall\.png has over 100 megapixels: scale it down"):
        open_picture(path)


SUFFIXES = {"jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF", "heic": "HEIF", "hif": "HEIF", "gif": "GIF", "apng": "PNG"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_browsers_and_phones_write_is_read(tmp_path, suffix):
    register_heif_opener()
    picture = Image.new("RGB", (32, 48), (200, 30, 30))
    picture.paste((20, 20, 200), (0, 24, 32, 48))
    path = tmp_path / f"IMG_1.{suffix.upper()}"
    picture.save(path, SUFFIXES[suffix])
    top, *_, bottom = corners(open_picture(path))
    assert top[0] > 150 > top[2] and bottom[2] > 150 > bottom[0]


def test_a_photo_in_a_format_that_is_not_read_says_what_to_do(tmp_path, monkeypatch):
    register_heif_opener()
    Image.new("RGB", (32, 32)).save(tmp_path / "me.HEIC", "HEIF")
    Image.new("RGB", (32, 32)).save(tmp_path / "me.tga")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    for name, words in {"me.HEIC": "a HEIC image: pip install", "me.tga": "not read: convert it to PNG"}.items():
        with pytest.raises(InputError, match=rf"{name} is .*{words}"):
            open_picture(tmp_path / name)


def test_a_file_is_opened_in_the_formats_of_images_only(tmp_path, monkeypatch):
    """Pillow opens an EPS, whatever its suffix, and starts Ghostscript to decode it."""
    picture = Image.new("RGB", (8, 8), "red")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("Ghostscript"))
    for name in ("EPS", "PCX", "TGA", "PPM", "SGI", "IM", "DDS", "ICO", "JPEG2000"):
        path = tmp_path / f"{name}.png"
        picture.save(path, name)
        with pytest.raises(InputError, match=rf"{path.name} is not a picture despite its name"):
            open_picture(path)
    picture.save(tmp_path / "lying.png", "JPEG")  # browsers do that
    assert open_picture(tmp_path / "lying.png").size == (8, 8)


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer for ever
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
        for name in ("pipe.png", "zero.png", "s.png"):
            with pytest.raises(InputError, match=rf"{name} is a FIFO, socket or device"):
                open_picture(tmp_path / name)


def test_an_empty_file_and_one_that_is_a_line_are_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"empty\.png is empty \(0 bytes\)"):
        open_picture(tmp_path / "empty.png")
    Image.new("RGB", (5000, 2)).save(tmp_path / "line.png")  # scaled to cover 1024 px it would have 2,600 megapixels
    with pytest.raises(InputError, match=r"line\.png is 5000x2, one side over 100 times the other: crop it"):
        open_picture(tmp_path / "line.png")


@pytest.mark.parametrize("chunk", ["iTXt", "iCCP"])
def test_a_decompression_bomb_beside_the_pixels_is_refused_in_a_sentence_or_harmless(tmp_path, chunk):
    bomb = zlib.compress(b"\0" * 200_000_000)
    info = PngImagePlugin.PngInfo()
    head = b"bomb\0\1\0\0\0" if chunk == "iTXt" else b"bomb\0\0"
    info.add(chunk.encode(), head + bomb)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=info)
    try:
        assert open_picture(tmp_path / "bomb.png").size == (8, 8)
    except InputError as error:
        assert "bomb.png" in str(error)


def test_frames_and_pages_are_counted_but_not_the_previews_of_a_phone(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("black", "white", "red")]
    for name, form in {"a.webp": "WEBP", "a.png": "PNG", "a.gif": "GIF", "a.tif": "TIFF", "gif.png": "GIF"}.items():
        frames[0].save(tmp_path / name, form, save_all=True, append_images=frames[1:])
        assert count_frames(tmp_path / name) == 3, name
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "one.png")
    assert count_frames(tmp_path / "phone.jpg") == count_frames(tmp_path / "one.png") == 1


def test_blank_is_black_or_transparent_all_over(tmp_path):
    for colour, blank in {(0, 0, 0, 255): True, (9, 9, 9, 0): True, (0, 0, 1, 255): False, (255,) * 4: False}.items():
        Image.new("RGBA", (4, 4), colour).save(tmp_path / "a.png")
        assert is_blank(*open_with_alpha(tmp_path / "a.png")) is blank


@pytest.mark.parametrize(("size", "share"), [((128, 128), 0), ((512, 128), 0.55), ((128, 1280), 0.83)])
def test_what_a_bucket_cuts_away_is_the_share_outside_the_crop(size, share):
    buckets = aspect_buckets(128, 16)
    assert cut_away(size, nearest_bucket(size, buckets)) == pytest.approx(share, abs=0.05)
    fitted = fit(Image.new("RGB", size), nearest_bucket(size, buckets))
    seen = fitted.target_size[0] * fitted.target_size[1]
    scale = max(fitted.target_size[1] / size[0], fitted.target_size[0] / size[1])
    assert 1 - cut_away(size, fitted.picture.size) == pytest.approx(seen / (size[0] * size[1] * scale**2))
