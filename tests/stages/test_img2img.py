"""stage=img2img: images have their bucket's size, prompts are written down, seeds and strength take effect."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_edt
from unloadable import unloadable_models

from lora_lab.demo import PHOTOS
from lora_lab.errors import InputError
from lora_lab.images.edges import canny
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage

FAST = ("stage=img2img", "device=cpu", "sampler.steps=4", "stage.strength=0.8")


def draw(folder: Path, *overrides: str):
    return run_stage(compose(*FAST, *overrides), folder)


def test_a_photo_is_captioned_refined_and_drawn(tmp_path, made_lora):
    result = draw(tmp_path / "run", f"lora={made_lora}", f"stage.photo={PHOTOS / '1.png'}")
    (drawn,) = result.pictures
    assert "green background" in drawn.caption and "HANA_TOFU" not in drawn.caption
    assert drawn.prompt.startswith("A HANA_TOFU with a green background") and "skin" not in drawn.prompt
    picture = Image.open(drawn.picture)
    assert picture.size == (128, 128) and picture.text["prompt"] == drawn.prompt
    (row,) = map(json.loads, (tmp_path / "run/prompts.jsonl").read_text().splitlines())
    assert row["prompt"] == drawn.prompt and row["seed"] == 0
    sheet = Image.open(result.sheet)
    assert sheet.width > 3 * 256 and json.loads((tmp_path / "run/result.json").read_text())["sheet"] == result.sheet


@pytest.mark.slow
def test_a_prompt_of_which_the_end_is_not_read_is_named(tmp_path, capsys):
    words = f"refiner.vocabulary=[{{pattern: green, replacement: '{' '.join(f'v{i}' for i in range(60))}'}}]"
    asked = (f"stage.photo={PHOTOS / '1.png'}", "stage.lora_weight=0", words)
    draw(tmp_path / "cut", *asked)
    assert "tokens: CLIP reads 77, so shorten it or set text.max_tokens=225" in capsys.readouterr().out
    draw(tmp_path / "whole", *asked, "text.max_tokens=225")
    assert "CLIP reads" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_lora_and_its_weight_matter(tmp_path, made_lora):
    photo = f"stage.photo={PHOTOS / '1.png'}"

    def pixels(name, *overrides):
        result = draw(tmp_path / name, photo, "stage.prompt='A {trigger}'", *overrides)
        assert result.pictures[0].prompt == "A HANA_TOFU" and result.pictures[0].caption is None
        return np.asarray(Image.open(result.pictures[0].picture)).astype(int)

    full, half = pixels("full", f"lora={made_lora}"), pixels("half", f"lora={made_lora}", "stage.lora_weight=0.5")
    none = pixels("none", "stage.lora_weight=0")
    assert np.abs(full - none).mean() > np.abs(half - none).mean() > 1


@pytest.mark.slow
def test_settings_of_sampler_and_memory_take_effect(tmp_path, made_lora):
    photo = f"stage.photo={PHOTOS / '1.png'}", "stage.prompt='A {trigger}'", f"lora={made_lora}", "model.precision=bf16"

    def pixels(name, *overrides):
        pictures = draw(tmp_path / name, *photo, "stage.seeds=[0,1]", *overrides).pictures
        return np.stack([np.asarray(Image.open(drawn.picture)).astype(int) for drawn in pictures])

    plain = pixels("plain")
    for option in ("sampler.fuse=true", "memory.vae_tiling=true"):
        assert 0 < np.abs(pixels(option, option) - plain).mean() < 4, option


def test_with_offload_the_pictures_are_the_same(tmp_path, made_lora):
    photo = f"stage.photo={PHOTOS / '1.png'}", "stage.prompt='A {trigger}'", f"lora={made_lora}"
    (plain,) = draw(tmp_path / "plain", *photo).pictures
    (offloaded,) = draw(tmp_path / "offload", *photo, "memory.offload=true", "device='cpu:0'").pictures  # not "cpu"
    assert np.array_equal(*(np.asarray(Image.open(drawn.picture)) for drawn in (plain, offloaded)))


def test_a_list_and_a_folder_of_photos_with_two_seeds(tmp_path, made_lora):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.open(PHOTOS / "2.png").resize((300, 200)).save(folder / "wide.png")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "wide.png", other / "wide.png")  # two photos of one name
    result = draw(
        tmp_path / "run", f"lora={made_lora}", f"stage.photo=['{folder}','{other / 'wide.png'}']", "stage.seeds=[1,2]",
        "stage.prompt='a {trigger}'",
    )  # fmt: skip
    assert len(result.pictures) == 4 and len({drawn.picture for drawn in result.pictures}) == 4
    assert {Image.open(drawn.picture).size for drawn in result.pictures} == {(160, 96)}
    one, two = (np.asarray(Image.open(drawn.picture)) for drawn in result.pictures[:2])
    assert not np.array_equal(one, two)


def test_low_strength_keeps_more_of_the_photo(tmp_path):
    photo = np.asarray(Image.open(PHOTOS / "5.png").resize((128, 128))).astype(int)

    def distance(strength):
        overrides = (
            f"stage.photo={PHOTOS / '5.png'}",
            "stage.lora_weight=0",
            "stage.prompt='a cat'",
            f"stage.strength={strength}",
        )
        result = draw(tmp_path / str(strength), *overrides, "sampler.steps=8")
        return np.abs(np.asarray(Image.open(result.pictures[0].picture)).astype(int) - photo).mean()

    assert distance(0.2) < distance(1.0)


def test_a_wrong_input_is_refused_before_the_base_loads(tmp_path, made_lora):
    unloadable = unloadable_models(tmp_path / "models")
    photo = f"stage.photo={PHOTOS / '1.png'}"
    for overrides, words in (
        ((photo, f"lora={made_lora}", "stage.strength=0.1"), "leaves no step to run"),
        ((photo,), "lora is missing"),
        ((photo, f"lora={made_lora}", "trigger=OTHER"), "trained on the trigger HANA_TOFU, not OTHER"),
        ((f"lora={made_lora}", f"stage.photo={tmp_path / 'nobody.jpg'}"), r"nobody\.jpg"),
        ((photo, "lora=HANNA"), "HANNA"),
        ((photo, f"lora={made_lora}", "loss.zero_terminal_snr=true"), "predicts epsilon"),
        ((photo, f"lora={made_lora}", "captioner.beams=0"), r"captioner\.beams=0"),
        ((photo, f"lora={made_lora}", "refiner.replace=[{pattern: '('}]"), r"refiner\.replace\[0\]"),
        ((photo, f"lora={made_lora}", "stage.prompt=a", "model.resolution=8"), r"model\.resolution|resolution=8"),
    ):
        with pytest.raises(InputError, match=words):
            draw(tmp_path / "run", *unloadable, *overrides)


@pytest.fixture
def many(tmp_path, made_lora):
    """Ten images of two shapes, drawn in batches of three, of photos that are captioned in batches of two."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(1, 6):
        size = (200, 130) if number in (3, 4) else (128, 128)
        Image.open(PHOTOS / f"{number}.png").resize(size).save(folder / f"{number}.png")
    options = (f"lora={made_lora}", f"stage.photo={folder}", "stage.seeds=[0,1]")
    return (*options, "sampler.batch_size=3", "captioner.batch_size=2")


def contents(folder):
    """The files that a run leaves, by name, without the name of its folder."""
    names = ["prompts.jsonl", "captions.jsonl", "sheet.png", *sorted(p.name for p in folder.glob("[!.]*-s*.png"))]
    return {name: (folder / name).read_bytes().replace(str(folder).encode(), b"") for name in names}


def interrupt(run, folder, lost):
    """A copy of `run` in `folder` as if it had been killed in the middle of a line, without some images."""
    shutil.copytree(run, folder)
    for name in ("prompts.jsonl", "captions.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text[: len(text) * 2 // 3])
    for name in [path.name for path in sorted(folder.glob("*-s*.png"))[lost]]:
        (folder / name).unlink()
    (folder / "sheet.png").unlink()
    return {path: path.stat().st_ino for path in folder.glob("*-s*.png")}


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_files_and_draws_only_what_is_missing(tmp_path, many):
    whole = draw(tmp_path / "whole", *many)
    rows = [json.loads(line) for line in (tmp_path / "whole/prompts.jsonl").read_text().splitlines()]
    places = [(f"{number}.png", seed) for number in range(1, 6) for seed in (0, 1)]
    assert [(Path(row["photo"]).name, row["seed"]) for row in rows] == places and len(whole.pictures) == 10
    kept = interrupt(tmp_path / "whole", tmp_path / "killed", slice(5, 8))  # of the second shape's two batches, and 5
    draw(tmp_path / "killed", *many, f"resume={tmp_path / 'killed'}")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    drawn = {path.stem for path, inode in kept.items() if path.stat().st_ino != inode}
    assert drawn <= {"3-s0", "3-s1", "4-s0", "4-s1"}, "only batches of which an image was missing"
    interrupt(tmp_path / "whole", tmp_path / "drawn", slice(0))
    base = [option for option in unloadable_models(tmp_path / "models") if option.startswith("model.base")]
    with pytest.raises(InputError, match=r"model\.base="):  # another base draws everything again
        draw(tmp_path / "drawn", *many, f"resume={tmp_path / 'drawn'}", *base)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_files(tmp_path, many):
    draw(tmp_path / "whole", *many)
    command = [sys.executable, "-m", "lora_lab", *FAST, *many, "tracker=off", f"hydra.run.dir={tmp_path / 'killed'}"]
    for images in (0, 1, 5):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list((tmp_path / "killed").glob("[!.]*-s*.png"))) <= images:
                time.sleep(0.02)
            process.kill()
        command = [sys.executable, "-m", "lora_lab", f"resume={tmp_path / 'killed'}"]
    assert subprocess.run(command).returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.png"))


@pytest.mark.slow
def test_an_image_of_other_settings_is_drawn_again(tmp_path, made_lora):
    photo = f"stage.photo={PHOTOS / '1.png'}", "stage.prompt='A {trigger}'", f"lora={made_lora}"
    (first,) = draw(tmp_path / "run", *photo).pictures
    before = Path(first.picture).read_bytes()
    draw(tmp_path / "run", *photo, f"resume={tmp_path / 'run'}", "stage.lora_weight=0.5")
    assert Path(first.picture).read_bytes() != before
    draw(tmp_path / "run", *photo, f"resume={tmp_path / 'run'}")
    assert Path(first.picture).read_bytes() == before


def test_photos_of_long_names_have_images(tmp_path):
    name = "두" * 83  # 249 bytes
    shutil.copy(PHOTOS / "1.png", tmp_path / f"{name}.png")
    shutil.copy(PHOTOS / "2.png", tmp_path / f"{name[:-1]}부.png")
    result = draw(tmp_path / "run", f"stage.photo={tmp_path}", "stage.lora_weight=0", "stage.prompt=a")
    assert len({drawn.picture for drawn in result.pictures}) == 2
    assert all(Path(drawn.picture).is_file() for drawn in result.pictures)


@pytest.mark.slow
def test_a_mask_keeps_the_photo_outside_of_the_person_and_a_change_of_it_draws_again(tmp_path):
    place = PHOTOS / "2.png"
    options = f"stage.photo={place}", "stage.lora_weight=0", "stage.prompt='a green cup'", "model.resolution=256"
    (first,) = draw(tmp_path / "run", *options, "stage.mask=person").pictures
    drawn, photo = np.asarray(Image.open(first.picture)), np.asarray(Image.open(place).convert("RGB"))
    mask = np.asarray(Image.open(tmp_path / "run/mask/2.png"))
    assert np.array_equal(drawn[mask == 0], photo[mask == 0]) and 0.3 < (mask == 0).mean() < 0.9
    assert np.abs(drawn[mask == 255].astype(int) - photo[mask == 255]).mean() > 10
    before = Path(first.picture).stat().st_ino
    draw(tmp_path / "run", *options, "stage.mask=person", f"resume={tmp_path / 'run'}")
    assert Path(first.picture).stat().st_ino == before
    draw(tmp_path / "run", *options, "stage.mask=person", "stage.feather=0.1", f"resume={tmp_path / 'run'}")
    assert Path(first.picture).stat().st_ino != before


def edge_agreement(photo, image):
    """The share of the edges of either picture that have one of the other within two pixels: their harmonic mean."""
    ours, theirs = (np.asarray(canny(picture, 100, 200))[..., 0] > 0 for picture in (photo, image))
    near = [(distance_transform_edt(~b)[a] <= 2).mean() for a, b in ((ours, theirs), (theirs, ours))]
    return 2 / sum(1 / max(share, 1e-9) for share in near)


@pytest.mark.slow
def test_the_bundled_controlnet_keeps_the_contours_of_the_photo(tmp_path):
    photos, found = [str(PHOTOS / f"{number}.png") for number in (2, 4, 7)], {}
    options = f"stage.photo={photos}", "stage.lora_weight=0", "stage.prompt='a person'", "sampler.batch_size=3"
    for name in ("off", "canny"):
        drawn = draw(tmp_path / name, *options, f"structure={name}", "stage.strength=1", "sampler.steps=6").pictures
        pairs = [(Image.open(image.photo).convert("RGB").resize((128, 128)), image.picture) for image in drawn]
        found[name] = np.mean([edge_agreement(photo, Image.open(picture)) for photo, picture in pairs])
    assert found["off"] < 0.5 < 0.7 < found["canny"], found


AUTO = ("stage=img2img", "device=cpu", "sampler.steps=4", "stage.draft_steps=3", "stage.budget=2")


@pytest.fixture
def references(tmp_path, made_lora):
    """The settings of a LoRA whose training images are known, which are its own drawings."""
    folder = tmp_path / "references"
    drawn = ("stage.prompt='A {trigger}'", "stage.strength=1", f"stage.photo={PHOTOS / '2.png'}", "stage.seeds=[1,2,3]")
    for drawing in draw(tmp_path / "own", f"lora={made_lora}", *drawn).pictures:
        folder.mkdir(exist_ok=True)
        shutil.copy(drawing.picture, folder)
    return f"lora={made_lora}", f"dataset.root={folder}", "dataset=folder", "refiner=avatars"


def test_weight_and_strength_are_chosen_for_each_photo_by_its_drafts(tmp_path, references):
    settings = (*AUTO, *references, f"stage.photo=[{PHOTOS / '1.png'},{PHOTOS / '4.png'}]")
    folder = tmp_path / "run"
    result = run_stage(compose(*settings), folder)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == len(result.pictures) == 2
    for row in rows:
        assert len(row["drafts"]) == 2 and all(Path(draft["picture"]).is_file() for draft in row["drafts"])
        best = max(row["drafts"], key=lambda draft: draft["scores"]["resemblance"])
        assert (row["lora_weight"], row["strength"]) == (best["lora_weight"], best["strength"])
        scores = row["scores"]
        assert scores["resemblance"] == pytest.approx((scores["character"] * scores["kept"]) ** 0.5, abs=1e-3)
        assert scores["kept"] == pytest.approx(sum(row["kept"].values()) / len(row["kept"]), abs=1e-3)
        assert "colours of the background" in row["kept"]
    whole = json.loads((folder / "result.json").read_text())
    for name in ("resemblance", "kept", "character"):
        values = [row["scores"][name] for row in rows]
        assert whole[name]["value"] == pytest.approx(sum(values) / 2, abs=1e-3)
        assert whole[name]["low"] <= whole[name]["value"] <= whole[name]["high"]
    assert (whole["lora_weight"], whole["strength"]) == (None, None)


@pytest.mark.slow
def test_where_weight_or_strength_is_given_the_images_are_only_scored(tmp_path, references):
    settings = (*AUTO, *references, f"stage.photo={PHOTOS / '1.png'}", "stage.prompt='A {trigger}, smiling'")
    (drawn,) = run_stage(compose(*settings, "stage.strength=0.6"), tmp_path / "scored").pictures
    assert (drawn.lora_weight, drawn.strength, drawn.drafts) == (1.0, 0.6, None) and "smiling" in drawn.kept
    plain = run_stage(compose(*settings, "stage.strength=0.6", "stage.resemblance=false"), tmp_path / "plain")
    assert plain.resemblance is None and plain.pictures[0].scores is None
    assert np.array_equal(*(np.asarray(Image.open(image.picture)) for image in (drawn, plain.pictures[0])))


@pytest.mark.slow
def test_a_choice_that_was_killed_resumes_to_the_same_images(tmp_path, references):
    settings = (*AUTO, *references, f"stage.photo=[{PHOTOS / '1.png'},{PHOTOS / '4.png'}]", "stage.choices=2")

    def contents(folder):
        lines = (folder / "prompts.jsonl").read_text().replace(str(folder), "")
        return lines, {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.png")}

    whole = tmp_path / "whole"
    result = run_stage(compose(*settings), whole)
    names = [Path(image.picture).name for image in result.pictures]
    assert names == ["1-s0.png", "1-s0-2.png", "4-s0.png", "4-s0-2.png"]
    first, second = result.pictures[:2]
    assert (first.lora_weight, first.strength) != (second.lora_weight, second.strength)
    killed = Path(shutil.copytree(whole, tmp_path / "killed"))
    for file in (*killed.glob("*.png"), *killed.glob("drafts/*/4*.png"), killed / "result.json"):
        file.unlink()  # what a kill before the last draft leaves
    run_stage(compose(*settings, f"resume={killed}"), killed)
    assert contents(killed) == contents(whole)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("stage.auto=true",), "set dataset.root to their folder"),
        (("stage.auto=true", "stage.lora_weight=.8", "stage.strength=.5"), "leave one of them out"),
        (("stage.auto=true", "stage.resemblance=false"), "leave out stage.resemblance=false"),
        (("stage.auto=true", "stage.lora_weight=0"), "leave out stage.lora_weight=0"),
        (("stage.choices=3", "stage.budget=2"), "stage.choices=3"),
        (("stage.lora_schedule=[]",), "stage.lora_schedule=[]"),
    ],
)
def test_a_choice_that_has_nothing_to_compare_is_refused(tmp_path, made_lora, words, sentence):
    settings = (*AUTO, *unloadable_models(tmp_path), f"lora={made_lora}", f"stage.photo={PHOTOS / '1.png'}")
    with pytest.raises(InputError) as refusal:
        run_stage(compose(*settings, *words), tmp_path / "run")
    assert sentence in str(refusal.value)


@pytest.mark.slow
def test_the_weight_may_change_over_the_steps(tmp_path, made_lora):
    settings = f"lora={made_lora}", f"stage.photo={PHOTOS / '1.png'}", "stage.prompt='A {trigger}'"

    def pixels(name, *words):
        return np.asarray(Image.open(draw(tmp_path / name, *settings, *words).pictures[0].picture)).astype(int)

    half = pixels("half", "stage.lora_schedule=[0.5,0.5]")
    assert np.array_equal(half, pixels("weight", "stage.lora_weight=0.5"))
    rising, falling = pixels("rising", "stage.lora_schedule=[0,1]"), pixels("falling", "stage.lora_schedule=[1,0]")
    assert np.abs(rising - falling).mean() > 1 and np.abs(rising - half).mean() > 1
