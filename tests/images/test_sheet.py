import numpy as np
import pytest
from PIL import Image

from lora_lab.images.sheet import PAGE, PANEL, contact_sheet


def colours(picture):
    return {colour for _, colour in picture.getcolors(1 << 24)}


def rgb(name):
    return Image.new("RGB", (1, 1), name).getpixel((0, 0))


def test_each_image_is_in_its_row_and_column():
    grid = [["red", "lime"], ["blue", "yellow"]]
    rows = [[Image.new("RGB", (40, 40), name) for name in row] for row in grid]
    sheet = contact_sheet(rows, ["before", "after"], cell=64)
    places = {}
    for name in ("red", "lime", "blue", "yellow"):
        ys, xs = np.nonzero((np.asarray(sheet) == rgb(name)).all(-1))
        assert (xs.max() - xs.min() + 1, ys.max() - ys.min() + 1) == (64, 64)
        places[name] = (int(xs.min()), int(ys.min()))
    assert places["red"][0] == places["blue"][0] < places["lime"][0] - 64
    assert places["red"][1] == places["lime"][1] < places["blue"][1] - 64
    assert sheet.getpixel((0, 0)) == rgb(PAGE)


def test_a_picture_keeps_its_aspect_ratio():
    sheet = np.asarray(contact_sheet([[Image.new("RGB", (200, 50), "red")]], [""], cell=100))
    ys, xs = np.nonzero((sheet == rgb("red")).all(-1))
    assert (xs.max() - xs.min() + 1, ys.max() - ys.min() + 1) == (100, 25)


def ink_box(sheet):
    ys, xs = np.nonzero(np.asarray(sheet.convert("L")) < 120)
    return xs.min(), ys.min(), xs.max(), ys.max()


@pytest.mark.slow
def test_text_stays_in_its_cell_however_long_it_is():
    for text in ("A HANA_TOFU with a purple background, " * 40, "x" * 5000, "두부" * 400, "a\n" * 100):
        sheet = contact_sheet([[None, text, None]], ["", "", ""], cell=128)
        panel = [128 // 8 + 128 + 128 // 20, 128 // 8]
        left, top, right, bottom = ink_box(sheet)
        assert panel[0] <= left and right < panel[0] + 128 and panel[1] <= top and bottom < panel[1] + 128, text[:9]


def test_short_text_is_written_and_an_empty_cell_is_not():
    assert colours(contact_sheet([[None]], [""], cell=128)) == {rgb(PAGE), rgb(PANEL)}
    assert len(colours(contact_sheet([["smiling"]], [""], cell=128))) > 2


def test_titles_are_beside_and_above_the_grid_and_do_not_cover_it():
    red = Image.new("RGB", (64, 64), "red")
    bare = contact_sheet([[red], [red]], [""], cell=64)
    titles = ["김치_두부 after 500 steps of rank 8"], ["one", "a long row title"]
    titled = contact_sheet([[red], [red]], *titles, cell=64, title="HANA_TOFU")
    assert titled.width > bare.width and titled.height > bare.height
    for sheet in (bare, titled):
        assert (np.asarray(sheet) == rgb("red")).all(-1).sum() == 2 * 64 * 64
