"""The page in a real Chromium, opened as a file, used by mouse, by keyboard and on a phone."""

from contextlib import contextmanager
from pathlib import Path
from shutil import copy, copytree

import pytest
from sweep_folders import draw, fail, finish, measure, score_drawings, stop, write_drawn_sweep, write_run, write_sweep

from lora_lab.board.page import files_to_share, rewrite_page

pytestmark = pytest.mark.slow

LRS = {"lr": [1e-5, 1e-3, 3e-2], "rank": [4, 16]}
SCORES = (0.2, 0.21, 0.64, 0.68, 0.1, None)  # of the runs in the order of the sweep; the last one fails


@pytest.fixture(scope="module")
def page_of_a_sweep(tmp_path_factory):
    root = tmp_path_factory.mktemp("board") / "multirun" / "day" / "time"
    for folder, score in zip(write_sweep(root, LRS, side=300), SCORES, strict=True):
        measure(folder, 0.1)
        if score is None:
            fail(folder, "the loss of step 3 is nan, at 04.png: lower lr")
        else:
            followed = 0.05 if score == 0.1 else 0.4
            known = {"score": (score, score - 0.06, score + 0.05), "prompt": (1 - score, 0, 1)}
            finish(folder, {"score": 0.15, "contrast": 0.4}, **known, contrast=(followed, 0, 1))
    return rewrite_page(root)


@contextmanager
def opened(browser, file: Path, **context):
    """The page in a new browser context. It may neither report an error nor request anything but files."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, "locale": "en-GB"} | context)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"missing: {request.url}"))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or errors.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.wait_for_timeout(50)
    context.close()
    assert errors == []


@pytest.fixture
def page(chromium, page_of_a_sweep):
    with opened(chromium, page_of_a_sweep) as page:
        yield page


def sources(page, selector: str = "#matrix tbody img") -> list[str]:
    """The pictures shown, as RUN/FILE."""
    found = page.locator(selector).evaluate_all("all => all.map(img => img.getAttribute('src'))")
    return [source.removeprefix("page/").rpartition(".")[0] for source in found]


def texts(page, selector: str) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(selector).all_inner_texts()]


def at(page, row: int, column: int):
    return page.locator(f'[data-at="{row},{column}"]')


def wait_for_focus(page, place: str) -> None:
    """A dialog gives the focus back a moment after it has closed."""
    page.wait_for_function(f"document.activeElement.dataset.at == '{place}'")


def test_the_first_screen_names_and_shows_the_best_run(page):
    assert texts(page, "h1") == ["lr 0.001 rank 16"]
    why = "lr 0.001, rank 16 has the highest score: 0.68 (0.62 to 0.73)."
    assert texts(page, "#sentence") == [f"{why} lr 0.001, rank 4 (0.64) lies within that interval: a tie."]
    assert texts(page, "#counts") == ["6 runs · 5 done · 1 failed"]
    assert sources(page, ".strip.best img") == ["3/000004-p0-s0", "3/000004-p1-s0"]
    assert sources(page, ".strip:last-child img") == ["0/p0-s0", "0/p1-s0"]
    for part in ("h1", "#sentence", ".strip.best", ".strip:last-child"):
        box = page.locator(part).bounding_box()
        assert box["y"] + box["height"] <= 860, part
    page.wait_for_function("[...document.images].slice(0, 8).every(img => img.complete && img.naturalWidth > 0)")


def test_a_setting_shows_the_best_score_for_each_of_its_values(page):
    assert texts(page, ".card:first-child .bar") == ["1e-5 undertrained 0.21", "0.001 0.68", "0.03 broken 0.10"]
    assert texts(page, ".card .bar.best") == ["0.001 0.68", "16 0.68"]


def test_the_matrix_first_shows_the_swept_keys(page):
    assert texts(page, "#matrix thead th") == ["Without LoRA", "lr 1e-5", "lr 0.001", "lr 0.03"]
    assert texts(page, "#matrix tbody th") == ["rank 4", "rank 16"]
    assert sources(page) == ["0/p0-s0", *(f"{run}/000004-p0-s0" for run in (0, 2, 4, 1, 3, 5))]
    assert texts(page, ".cell.best p") == ["0.68 ★ best"]


def test_rows_and_columns_can_be_chosen(page):
    page.select_option("#columns", "@prompt")
    assert sources(page) == [
        "0/p0-s0",
        "0/p1-s0",
        "2/000004-p0-s0",
        "2/000004-p1-s0",
        "3/000004-p0-s0",
        "3/000004-p1-s0",
    ]
    assert texts(page, "#matrix tbody th") == ["Without LoRA", "rank 4", "rank 16"]  # of the best lr
    page.select_option("#of-lr", label="0.03")
    assert sources(page)[2:4] == ["4/000004-p0-s0", "4/000004-p1-s0"]
    page.select_option("#rows", "@step")
    assert sources(page)[2:6] == ["5/000002-p0-s0", "5/000002-p1-s0", "5/000004-p0-s0", "5/000004-p1-s0"]
    page.select_option("#rows", "@run")
    assert sources(page)[2] == "3/000004-p0-s0" and len(sources(page)) == 2 + 6 * 2  # the best first
    page.select_option("#columns", "lr")
    assert page.input_value("#rows") != "@run"  # a run has one lr only


def test_steps_are_stepped_through_by_slider_and_by_key(page):
    page.focus("#step")
    page.keyboard.press("Home")
    assert texts(page, "#step-value") == ["2"] and sources(page)[1] == "0/000002-p0-s0"
    assert sources(page)[0] == "0/p0-s0"  # the base knows no steps
    page.keyboard.press("ArrowRight")
    assert sources(page)[1] == "0/000004-p0-s0"
    page.keyboard.press("[")
    assert sources(page)[1] == "0/000002-p0-s0"


def test_the_size_of_pictures_can_be_chosen(page):
    page.focus("#size")
    page.keyboard.press("Home")
    assert at(page, 0, 1).bounding_box()["width"] == 64
    page.select_option("#columns", "@prompt")
    assert at(page, 0, 1).bounding_box()["width"] == 64  # it was wanted so


def test_an_image_is_enlarged_and_arrow_keys_show_its_neighbours(page):
    at(page, 0, 1).click()
    picture, title = page.locator("#zoom-picture"), page.locator("#zoom-title")
    assert title.inner_text() == "lr 1e-5, rank 4"
    page.wait_for_function("document.getElementById('zoom-picture').naturalWidth == 300")  # whole, not the thumbnail
    page.keyboard.press("ArrowRight")
    assert title.inner_text() == "lr 0.001, rank 4"
    page.keyboard.press("ArrowDown")
    assert title.inner_text() == "lr 0.001, rank 16" and picture.get_attribute("src") == "page/3/000004-p0-s0.png"
    assert page.locator("#zoom-text").inner_text() == "A MINT with a green background · step 4 · score 0.68"
    page.keyboard.press("[")
    assert picture.get_attribute("src") == "page/3/000002-p0-s0.png"
    page.keyboard.press("Escape")
    assert not page.locator("#zoom").is_visible()
    wait_for_focus(page, "1,2")  # where one was


def test_two_pictures_are_compared_with_a_slider(page):
    for column in (1, 2):
        at(page, 0, column).hover()
        page.locator("td").filter(has=at(page, 0, column)).locator(".tick").click()
    assert texts(page, "#marked-text") == ["Two images are selected."]
    page.click("#marked-compare")
    assert [page.get_attribute(i, "src") for i in ("#over", "#under")] == [f"page/{r}/000004-p0-s0.png" for r in (0, 2)]
    assert texts(page, ".sides p") == ["lr 1e-5, rank 4", "lr 0.001, rank 4"]
    before = colour_at(page, 0.45)
    page.keyboard.press("Home")
    assert colour_at(page, 0.45) != before and colour_at(page, 0.45) == colour_at(page, 0.9)  # all of it the second
    page.keyboard.press("End")
    assert colour_at(page, 0.9) == before  # all of it the first


def colour_at(page, across: float):
    """What is seen at that share of the pair's width."""
    from io import BytesIO

    from PIL import Image

    page.wait_for_timeout(100)
    shown = Image.open(BytesIO(page.locator("#pair").screenshot())).convert("RGB")
    return shown.getpixel((int(shown.width * across), shown.height // 4))


def test_an_enlarged_picture_is_compared_with_the_base_and_the_best(page):
    at(page, 0, 1).click()
    page.click("#zoom-base")
    assert texts(page, ".sides p") == ["Without LoRA", "lr 1e-5, rank 4 · step 4"]
    page.keyboard.press("Escape")
    at(page, 0, 1).click()
    page.click("#zoom-best")
    assert texts(page, "#right") == ["lr 0.001, rank 16"]


def test_everything_can_be_done_by_keyboard(page):
    page.focus("#size")
    page.keyboard.press("Tab")
    wait_for_focus(page, "0,0")  # one stop for the whole matrix
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "c", "ArrowRight", "c"):
        page.keyboard.press(key)
    assert page.locator("#marked-compare").is_visible()
    page.keyboard.press("Enter")
    assert page.locator("#zoom-title").inner_text() == "lr 0.03, rank 16"
    page.keyboard.press("Escape")
    wait_for_focus(page, "1,3")


def test_the_table_sorts_by_every_column(page):
    def column(number: int) -> list[str]:
        return texts(page, f"#table tbody td:nth-child({number})")

    assert texts(page, "#table [aria-sort]") == ["score"] and column(1) == ["3", "2", "1", "0", "4", "5"]
    page.click('[data-sort="lr"]')
    assert column(3) == ["1e-5", "1e-5", "0.001", "0.001", "0.03", "0.03"]
    assert page.locator("#table [aria-sort]").get_attribute("aria-sort") == "ascending"
    page.click('[data-sort="lr"]')
    assert column(3)[0] == "0.03"
    page.click('[data-sort="score:prompt"]')
    assert column(1) == ["4", "0", "1", "2", "3", "5"]  # what has no score comes last
    assert column(6)[0] == "0.90 0.00–1.00"
    page.click('[data-sort="score:prompt"]')
    assert column(1) == ["3", "2", "1", "0", "4", "5"]
    assert column(2)[0] == "★ best" and column(2)[1] == "tie" and column(2)[5] == "failed"


def test_a_run_opens_with_its_pictures_and_commands(page):
    page.click('[data-run="3"] .open')
    assert page.locator('[data-run="3"] .open').get_attribute("aria-expanded") == "true"
    commands = texts(page, ".details code")
    assert commands[1] == "python -m lora_lab stage=train lr=0.001 rank=16"
    assert [command.split()[3].partition("=")[0] for command in commands] == ["stage", "stage", "resume"]
    assert sources(page, ".details img") == ["3/000004-p0-s0", "3/000004-p1-s0"]
    page.click('[data-run="5"] .open')
    assert "the loss of step 3 is nan, at 04.png: lower lr" in page.locator(".details").last.inner_text()


def test_a_command_is_copied(chromium, page_of_a_sweep):
    with opened(chromium, page_of_a_sweep, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.click("#commands .copy")
        page.wait_for_function("document.querySelector('#commands .copy').textContent == 'Copied'")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == page.inner_text("#commands code") and copied.startswith("python -m lora_lab stage=img2img ")


def test_losses_are_plotted_with_a_legend(page):
    assert page.locator("#training-chart canvas").is_visible() and page.locator("#validation-chart canvas").is_visible()
    assert texts(page, "#legend li")[0] == "lr 0.001, rank 16 ★" and len(texts(page, "#legend li")) == 6
    inked = """canvas => { const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(data.buffer)).size }"""
    assert page.locator("#training-chart canvas").evaluate(inked) > 20


def test_korean_is_chosen_by_the_browser_or_the_reader_and_remembered(chromium, page_of_a_sweep):
    with opened(chromium, page_of_a_sweep, locale="ko-KR") as page:
        assert texts(page, "#eyebrow") == ["가장 좋은 설정"] and "동점" in page.inner_text("#sentence")
        assert page.get_attribute("html", "lang") == "ko"
        shown = page.inner_text("body")
        for english in ("Images", "Rows", "Without", "Copy", "Size", "done", "failed", "best", "Loss", "last"):
            assert english not in shown, english
        page.click("#language")
        assert texts(page, "#eyebrow") == ["The best run"]
        page.reload()
        assert texts(page, "#eyebrow") == ["The best run"]


@pytest.mark.parametrize("locale", ["en-GB", "ko-KR"])
def test_a_phone_needs_no_scrolling_sideways(chromium, page_of_a_sweep, locale):
    phone = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "locale": locale}
    with opened(chromium, page_of_a_sweep, **phone) as page:
        width = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
        assert page.evaluate(width) == 360
        at(page, 0, 1).tap()
        box = page.locator("#zoom").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        page.tap("#zoom-base")
        assert page.locator("#pair").bounding_box()["width"] > 250
        page.tap("#slider [data-close]")
        page.locator(".tick").first.tap()  # without a mouse they are always there
        assert page.locator("#marked").is_visible() and page.evaluate(width) == 360


def test_the_dark_scheme_is_used(chromium, page_of_a_sweep):
    with opened(chromium, page_of_a_sweep, color_scheme="dark") as page:
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 22)"


def test_a_copied_page_has_all_its_images(chromium, page_of_a_sweep, tmp_path):
    copy(page_of_a_sweep, tmp_path)
    copytree(page_of_a_sweep.parent / "page", tmp_path / "page")
    with opened(chromium, tmp_path / "index.html") as page:
        page.mouse.wheel(0, 5000)
        page.wait_for_function("[...document.images].filter(i => i.src).every(i => i.complete && i.naturalWidth)")
        assert len(sources(page)) == 7


def test_failed_unfinished_and_missing_runs_are_labelled(chromium, tmp_path):
    folders = write_sweep(tmp_path / "sweep", {"lr": [1e-5, 1e-4, 1e-3]}, missing=1)
    fail(folders[0], "out of memory: say memory=low")
    for picture in (tmp_path / "sweep/0/samples").rglob("*.png"):
        picture.unlink()
    stop(folders[1])
    for picture in (tmp_path / "sweep/1/samples").rglob("*.png"):
        picture.unlink()
    with opened(chromium, rewrite_page(tmp_path / "sweep")) as page:
        assert texts(page, "#counts") == ["3 runs · 1 failed · 1 not finished · 1 not started"]
        assert texts(page, "#eyebrow") == ["No best run yet"]
        assert texts(page, "#sentence") == ["No run has finished yet."]
        cells = texts(page, "#matrix .empty")
        assert cells == ["failed out of memory: say memory=low", "not finished step 4 of 4", "not started"]


def test_runs_that_end_at_different_steps_are_compared_at_their_last(chromium, tmp_path):
    write_run(tmp_path / "sweep" / "0", {"steps": 4})
    write_run(tmp_path / "sweep" / "1", {"steps": 6}, steps=(2, 6))
    with opened(chromium, rewrite_page(tmp_path / "sweep")) as page:
        assert texts(page, "#step-value") == ["last"]
        assert sources(page)[2:] == ["0/000004-p0-s0", "0/000004-p1-s0", "1/000006-p0-s0", "1/000006-p1-s0"]
        page.keyboard.press("[")
        assert texts(page, "#matrix .empty") == ["no image", "no image"]  # the shorter run has no step 6


def test_one_run_alone_is_shown_by_its_steps(chromium, tmp_path):
    write_run(tmp_path / "sweep" / "0", {})
    with opened(chromium, rewrite_page(tmp_path / "sweep")) as page:
        assert texts(page, "#matrix tbody th") == ["Without LoRA", "step 2", "step 4"]
        assert not page.locator("#effects").is_visible()


def test_a_hundred_runs_with_a_thousand_images_load_quickly(chromium, tmp_path):
    swept = {"lr": [n * 1e-4 for n in range(1, 11)], "rank": list(range(1, 11))}
    prompts = [f"A {{trigger}} number {n}" for n in range(10)]
    folders = write_sweep(tmp_path / "sweep", swept, prompts=prompts, steps=(1000,), side=64)
    for number, folder in enumerate(folders):
        finish(folder, score=(number / 100, number / 100 - 0.02, number / 100 + 0.02))
        draw(folder / "samples" / "step-001000" / "p0-s0.png", 128)
    file = rewrite_page(tmp_path / "sweep")
    assert len(list((tmp_path / "sweep" / "page").glob("*/001000-*.png"))) == 1000
    assert file.stat().st_size < 2_000_000
    with opened(chromium, file) as page:
        page.select_option("#rows", "@run")
        assert page.locator("#matrix tbody tr").count() == 101
        loaded = "[...document.images].filter(i => i.complete && i.naturalWidth).length"
        page.wait_for_function(f"{loaded} > 10")
        page.wait_for_timeout(500)
        assert page.evaluate(loaded) < 400  # of 1010: what is in view, and near it
        at(page, 1, 0).scroll_into_view_if_needed()
        at(page, 100, 9).scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('[data-at=\"100,9\"] img').naturalWidth > 0")
        page.click('[data-sort="rank"]')
        assert texts(page, "#table tbody tr:first-child td:nth-child(4)") == ["1"]
        assert texts(page, "#legend li") == ["lr 0.001, rank 10 ★"]  # a hundred colours tell nothing apart


def test_a_page_without_its_full_size_images_shows_the_thumbnails(chromium, page_of_a_sweep, tmp_path):
    for name, file in files_to_share(page_of_a_sweep.parent).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(file, tmp_path / name)
    page = chromium.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    page.wait_for_function("[...document.querySelectorAll('.strip.best img')].every(img => img.naturalWidth == 256)")
    assert page.locator(".strip.best img").count() == 2
    page.locator(".strip.best button").first.click()
    page.wait_for_function("document.getElementById('zoom-picture').naturalWidth == 256")
    assert page.get_attribute("#zoom-picture", "src").endswith(".webp")
    page.close()


def test_drawn_photos_are_rows_beside_what_each_run_drew(chromium, tmp_path):
    weights = {"stage.lora_weight": [0.6, 1], "stage.strength": [0.8, 0.95]}
    folders = write_drawn_sweep(tmp_path / "sweep", weights, ["/a/me.jpg", "/a/you.jpg"])
    with opened(chromium, rewrite_page(tmp_path / "sweep")) as page:
        assert texts(page, "#eyebrow") == ["Not ranked"] and "look at them" in page.inner_text("#sentence")
        heads = [f"lora_weight {weight} strength {strength}" for weight in (0.6, 1) for strength in (0.8, 0.95)]
        assert texts(page, "#matrix thead th") == ["Photo", *heads]
        assert texts(page, "#matrix tbody th") == ["me.jpg", "you.jpg"]
        assert sources(page)[5:7] == ["0/1", "0/000000-1-s0"], "the photo is the first of its row"
        at(page, 1, 2).click()
        told = "caption of the photo a person 1 prompt a MINT 1 strength 0.95 LoRA weight 0.6"
        assert texts(page, "#zoom-details") == [told] and texts(page, "#zoom-text") == ["you.jpg · seed of the image 0"]
        assert sources(page, ".stage img") == ["0/1", "1/000000-1-s0"] and page.locator("#zoom-photo").is_visible()
        page.keyboard.press("ArrowUp")
        assert sources(page, ".stage img") == ["0/0", "1/000000-0-s0"]
        page.click("#zoom-base")
        assert page.get_attribute("#over", "src") == "page/0/0.png"
    for i, folder in enumerate(folders):
        score_drawings(folder, kept=0.9, resemblance=0.2 + i / 10)
    with opened(chromium, rewrite_page(tmp_path / "sweep"), locale="ko-KR") as page:
        assert texts(page, "h1") == ["stage.lora_weight 1 stage.strength 0.95"] and "닮은 정도" in page.inner_text(
            "#sentence"
        )
        assert texts(page, "#matrix thead th")[1] == "lora_weight 1 strength 0.95 0.50 ★", "the best first"
        assert texts(page, ".cell.best p")[:2] == ["사진 유지 0.90", "닮은 정도 0.50"]
        shown = page.inner_text("body")
        for english in ("Photo", "photo\n", "Draw", "kept", "resemblance", "run"):
            assert english not in shown.replace("stage.photo=", ""), english


def test_character_is_plotted_against_kept_with_the_frontier(chromium, tmp_path):
    folders = write_sweep(tmp_path / "sweep", LRS)
    known = ((0.3, 0.8), (0.6, 0.6), (0.5, 0.5), (0.8, 0.2), (0.8, 0.1))
    for folder, (kept, character) in zip(folders, known, strict=False):
        of_photos = {"kept": (kept, kept - 0.1, kept + 0.1), "character": (character, character, character)}
        finish(folder, score=(character, character, character), **of_photos)
    with opened(chromium, rewrite_page(tmp_path / "sweep")) as page:
        points = page.locator("#plot-points button")
        assert [point.get_attribute("data-point") for point in points.all()] == ["0", "2", "1", "4", "3"]
        assert page.locator("#plot-points .frontier").count() == 2 and page.locator("#plot-points .best").count() == 1
        assert page.get_attribute("#plot-intervals", "d").count("M") == 2 * 5
        assert page.get_attribute("#plot-frontier", "d").count("L") == 2, "a line through three points"
        first, last = (points.nth(i).bounding_box() for i in (0, 4))
        assert first["x"] < last["x"] and first["y"] < last["y"], "kept to the right, character up"
        assert texts(page, "#plot-text") == ["0 · lr 1e-5, rank 4 · character 0.80 · kept 0.30 (0.20–0.40)"]
        points.nth(1).hover()
        assert page.inner_text("#plot-text").startswith("2 · lr 0.001, rank 4 · character 0.50")
        points.nth(0).focus()
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight", "Enter"):
            page.keyboard.press(key)
        row = page.locator("#table tr.revealed")
        assert row.get_attribute("data-run") == "1" and texts(page, ".details code")[1].endswith("lr=1e-05 rank=16")
        assert page.evaluate("document.activeElement.closest('tr').dataset.run") == "1"
        points.nth(4).click()
        assert page.locator("#table tr.revealed").get_attribute("data-run") == "3"
        assert page.locator('[data-run="3"] .open').evaluate("row => row.getBoundingClientRect().top") < 860
    finish(folders[0], score=(0.5, 0.4, 0.6), kept=(0.3, 0.2, 0.4))
    for folder in folders[2:]:
        finish(folder, score=(0.5, 0.4, 0.6), character=(0.3, 0.2, 0.4))
    with opened(chromium, rewrite_page(tmp_path / "sweep")) as page:
        assert not page.locator("#tradeoff").is_visible(), "one run has both"


def test_the_plot_of_many_runs_has_no_intervals(chromium, tmp_path):
    for number, folder in enumerate(write_sweep(tmp_path / "sweep", {"rank": list(range(1, 43))})):
        finish(folder, kept=(number / 50, 0, 1), character=(0.5, 0, 1))
    with opened(chromium, rewrite_page(tmp_path / "sweep"), viewport={"width": 360, "height": 740}) as page:
        assert page.locator("#plot-points button").count() == 42 and page.get_attribute("#plot-intervals", "d") == ""
        assert page.evaluate("document.documentElement.scrollWidth") == 360
