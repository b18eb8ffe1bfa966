"""Wrong pictures, captions, LoRAs, photos and models: one sentence that names them, before any model is loaded."""

import json
import os
import shutil
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from unloadable import unloadable_models

from lora_lab.captions.files import read_captions
from lora_lab.demo import PHOTOS, TOFU
from lora_lab.errors import InputError
from lora_lab.launch.run_job import run_stage
from lora_lab.runs import display_path
from lora_lab.stages import train as _train  # noqa: F401  (imported here, so that its seconds are no test's)
from lora_lab.training.resolve import resolve_training

TRIGGER = "HANA_TOFU"
PHOTO = str(sorted(PHOTOS.glob("*.png"))[0])


def tofu(folder, names=("00.png", "01.png", "02.png", "03.png"), say=lambda text: text):
    """Some of the bundled pictures with their captions."""
    folder.mkdir(parents=True)
    captions = read_captions(TOFU)
    for name in names:
        shutil.copyfile(TOFU / name, folder / name)
    write_captions(folder, {name: say(captions[name]) for name in names})
    return folder


def write_captions(folder, captions):
    rows = (json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items())
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unloadable(tmp_path_factory):
    """Models whose loading is refused in a sentence of its own, so that any other sentence came before it."""
    return unloadable_models(tmp_path_factory.mktemp("models"))


def refused(composed, *overrides, folder=Path("run")):
    """The one sentence that a run is refused with."""
    with pytest.raises(InputError) as caught:
        run_stage(composed("tracker=off", *overrides), folder)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 400, sentence
    return sentence


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["stage=train", "model.judge=null", "steps=1"], "model.base="),
        (["stage=caption", "dataset=folder", "dataset.root=TOFU", "stage.mode=propose"], "captioner.base="),
        (["stage=img2img", f"stage.photo='{PHOTO}'", "stage.lora_weight=0"], "captioner.base="),
        (["stage=img2img", f"stage.photo='{PHOTO}'", "stage.lora_weight=0", "stage.prompt=a"], "model.base="),
    ],
)
def test_a_damaged_model_is_named_where_nothing_else_is_wrong(composed, here, unloadable, overrides, key):
    tofu(here / "TOFU")
    assert key in refused(composed, *unloadable, *overrides)


def damage_jpeg(folder):
    Image.open(TOFU / "04.png").convert("RGB").save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:900])


def name_a_text_png(folder):
    (folder / "text.png").write_text("no picture")


def enlarge(folder):
    """A PNG of 20000 x 20000 pixels by its header; nobody should get as far as its pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    (folder / "huge.png").write_bytes(data)


def lose_a_picture(folder):
    (folder / "02.png").unlink()


def name_in_latin_1(folder):
    shutil.copyfile(folder / "00.png", folder / os.fsdecode(b"caf\xe9.png"))


def name_with_an_escape(folder):
    shutil.copyfile(folder / "00.png", folder / "\x1b[2J\n.png")


def put_a_pipe(folder):
    (folder / "01.png").unlink()
    os.mkfifo(folder / "01.png")


def link_to_another_place(folder):
    (folder / "01.png").rename(folder.parent / "01.png")
    (folder / "01.png").symlink_to("../01.png")


def break_captions(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "00.png", "text": "A HANA_TOFU"\n')


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("spoil", "stages", "words"),
    [
        (damage_jpeg, ["check", "caption", "pipeline"], ["cut.jpg is cut off or damaged"]),
        (name_a_text_png, ["check", "caption", "pipeline"], ["text.png is not a picture"]),
        (enlarge, ["check", "caption", "pipeline"], ["huge.png has over 100 megapixels"]),
        (name_in_latin_1, ["check", "caption", "refine", "convert", "train", "pipeline"], ["caf\\xe9.png", "rename"]),
        (name_with_an_escape, ["check", "caption", "refine", "train", "pipeline"], ["\\x1b[2J\\x0a.png", "rename"]),
        (put_a_pipe, ["check", "train"], ["caption for 01.png", "FIFO", "never opened"]),
        (link_to_another_place, ["check", "train"], ["caption for 01.png", "dataset.follow_links=true"]),
        (lose_a_picture, ["check", "train"], ["caption for 02.png", "no such picture"]),
        (break_captions, ["check", "caption", "refine", "train"], ["metadata.jsonl"]),
        (empty, ["check", "caption", "train", "pipeline"], ["no pictures in", "TOFU"]),
        (empty, ["refine", "convert"], ["no captions in", "TOFU"]),
    ],
)
def test_a_damaged_dataset_is_refused_by_name_and_left_unchanged(composed, here, unloadable, spoil, stages, words):
    folder = tofu(here / "data" / "TOFU")
    spoil(folder)
    before = contents(folder)
    for stage in stages:
        sentence = refused(composed, *unloadable, f"stage={stage}", "dataset=folder", "dataset.root=data/TOFU")
        for word in words:
            assert word in sentence, stage
        assert contents(folder) == before


@pytest.mark.parametrize("spoil", [damage_jpeg, enlarge])
def test_training_opens_every_picture_before_it_loads_the_base(composed, here, unloadable, spoil):
    folder = tofu(here / "TOFU")
    spoil(folder)
    new = next(path.name for path in folder.iterdir() if path.name in ("cut.jpg", "huge.png"))
    write_captions(folder, read_captions(folder) | {new: f"A {TRIGGER}"})
    assert new in refused(composed, *unloadable, "stage=train", "dataset=folder", "dataset.root=TOFU")


def test_names_decomposed_on_disk_are_the_names_composed_in_the_captions(composed, here):
    folder = here / "두부"
    folder.mkdir()
    names = [f"두부 {number}.png" for number in range(3)]
    for number, name in enumerate(names):
        shutil.copyfile(TOFU / f"0{number}.png", folder / unicodedata.normalize("NFD", name))
    write_captions(folder, {name: f"A {TRIGGER}, smiling" for name in names})
    config = composed("stage=check", "dataset=folder", "dataset.root='두부'")
    assert run_stage(config, here / "run").findings.captions == 3
    training = resolve_training(composed("stage=train", "dataset=folder", "dataset.root='두부'"), here / "run")
    assert [sample.name for sample in training.files.samples] == names


def test_a_run_folder_that_cannot_be_made_is_refused_before_the_work(composed, here, unloadable):
    (here / "file").write_text("")
    for folder in (here / "file" / "run", Path("/proc/run")):
        sentence = refused(composed, *unloadable, "stage=train", folder=folder)
        assert sentence.startswith(f"{display_path(folder)}: ") and "hydra.run.dir=" in sentence


def test_captions_without_the_trigger_are_not_trained_on(composed, here, unloadable):
    folder = tofu(here / "TOFU", say=lambda text: text.replace(TRIGGER, "tofu"))
    sentence = refused(composed, *unloadable, "stage=train", "dataset=folder", "dataset.root=TOFU")
    assert TRIGGER in sentence and "stage=refine" in sentence
    assert read_captions(folder)["00.png"].startswith("A tofu")


@pytest.mark.parametrize("stage", ["train", "pipeline", "check"])
def test_masks_are_checked_before_a_model_loads(composed, here, unloadable, stage):
    folder, masks = tofu(here / "TOFU"), here / "masks"
    overrides = [*unloadable, f"stage={stage}", "dataset=folder", "dataset.root=TOFU"]
    masks.mkdir()
    for name in ("00.png", "01.png", "02.png"):
        Image.new("L", (128, 128), 255).save(masks / name)
    runs = (here / "runs" / str(number) for number in range(9))  # a pipeline leaves its copy of the pictures
    assert "masks has no mask for 03.png" in refused(composed, *overrides, "loss.mask=masks", folder=next(runs))
    Image.new("L", (64, 128), 255).save(masks / "03.png")
    sentence = refused(composed, *overrides, "loss.mask=masks", folder=next(runs))
    assert "03.png is 64x128, but 03.png is 128x128" in sentence
    for name in ("00.png", "02.png"):
        Image.open(folder / name).convert("RGB").save(folder / name)
    assert "00.png has no alpha channel" in refused(composed, *overrides, "loss.mask=alpha", folder=next(runs))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer=adamw", "optimizer.eps=-1"], ["optimizer.eps=-1: eps must be above 0"]),
        (
            ["optimizer=adafactor", "optimizer.relative_step=true"],
            ["Adafactor cannot be created", "relative_step=True"],
        ),
        (["optimizer.elementwise=null"], ["optimizer.elementwise=None", "set true"]),
        (["optimizer=schedule_free", "stage.ema_decay=0.9"], ["stage.ema_decay", "average of its own"]),
        (["optimizer.elementwise=1"], ["optimizer.elementwise=1", "set true"]),
        (["model.base=nowhere.safetensors"], ["model.base=nowhere.safetensors"]),
        (["model.base=demo:tiny-sdlx"], ["model.base=demo:tiny-sdlx", "tiny-sdxl"]),
        (["dataset.root=demo:tofuu"], ["dataset.root=demo:tofuu", "tofu"]),
        ([f"dataset.root={'x' * 256}"], ["dataset.root=x", "File name too long", "correct the name"]),
        (["device=tpu"], ["device=tpu"]),
        (["loss.zero_terminal_snr=true"], ["loss.zero_terminal_snr", "predicts epsilon"]),
    ],
)
def test_wrong_settings_of_training_are_refused_before_the_base_loads(composed, here, unloadable, overrides, words):
    sentence = refused(composed, *unloadable, "stage=train", *overrides)
    for word in words:
        assert word in sentence


@pytest.mark.parametrize("name", ["prodigy", "schedule_free", "came"])
def test_an_optimizer_whose_package_is_missing_says_how_to_get_it(composed, here, unloadable, monkeypatch, name):
    config = composed("stage=train", f"optimizer={name}")
    package = config.optimizer["_target_"].partition(".")[0]
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    sentence = refused(composed, *unloadable, "stage=train", f"optimizer={name}")
    assert f"needs the package {package}" in sentence and 'pip install "lora_lab[optimizers]"' in sentence


@pytest.mark.parametrize("stage", ["caption", "refine", "convert"])
def test_the_bundled_pictures_are_never_written_to(composed, here, unloadable, stage):
    before = contents(TOFU)
    more = ["stage.mode=replace"] if stage == "caption" else []
    if stage == "refine":
        more = ["trigger=MINT"]
    try:
        run_stage(composed(f"stage={stage}", *unloadable, *more), here / "run")
    except InputError as error:
        assert "bundled" in str(error)
    assert contents(TOFU) == before


def lora(file, trigger=TRIGGER, **tensors):
    file.parent.mkdir(parents=True, exist_ok=True)
    layer = {f"lora_unet_x.lora_{side}.weight": torch.zeros(1, 1) for side in ("down", "up")}
    save_file(tensors or layer, file, metadata={"modelspec.trigger_phrase": trigger})
    return file


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["lora is missing", "lora=NAME"]),
        (["lora=HANA_TOFO"], ["lora=HANA_TOFO", "did you mean HANA_TOFU?"]),
        (["lora=text.safetensors"], ["text.safetensors", "not a readable .safetensors"]),
        (["lora=empty.safetensors"], ["empty.safetensors", "not a readable .safetensors"]),
        (["lora=unfinished"], ["lora=unfinished", "no finished LoRA"]),
        (["lora=mint.safetensors"], ["mint.safetensors", "trained on the trigger MINT", "trigger=MINT"]),
        (["lora=HANA_TOFU", "stage.strength=0.01"], ["stage.strength=0.01", "sampler.steps=30"]),
        (["lora=HANA_TOFU", "stage.photo=nobody.jpg"], ["stage.photo=nobody.jpg", "there is no such file"]),
        (["lora=HANA_TOFU", "stage.photo=text.safetensors"], ["text.safetensors is not a picture"]),
        (["lora=HANA_TOFU", "stage.photo=3"], ["stage.photo=3"]),
        (["lora=HANA_TOFU", "stage.photo=[]"], ["stage.photo"]),
        (["lora=HANA_TOFU", "stage.photo=unfinished"], ["no pictures in unfinished"]),
        (["lora=HANA_TOFU", "model.base=demo:tiny-sdlx"], ["model.base=demo:tiny-sdlx", "tiny-sdxl"]),
        (["lora=HANA_TOFU", "captioner.base=./nowhere"], ["captioner.base=./nowhere"]),
    ],
)
def test_img2img_is_refused_before_a_model_loads(composed, here, unloadable, overrides, words):
    lora(here / "models" / "lora" / "HANA_TOFU.safetensors")
    lora(here / "mint.safetensors", trigger="MINT")
    (here / "text.safetensors").write_text("no tensors")
    (here / "empty.safetensors").write_bytes(b"")
    (here / "unfinished").mkdir()
    photo = [] if any(o.startswith("stage.photo") for o in overrides) else [f"stage.photo='{PHOTO}'"]
    sentence = refused(composed, *unloadable, "stage=img2img", *photo, *overrides)
    for word in words:
        assert word in sentence


def test_a_file_that_is_not_a_base_is_named(composed, here):
    (here / "base.safetensors").write_bytes(b"no tensors at all")
    tofu(here / "TOFU")
    sentence = refused(composed, "stage=train", "dataset=folder", "dataset.root=TOFU", "model.base=base.safetensors")
    assert "model.base=base.safetensors" in sentence


@pytest.mark.parametrize(("base", "words"), [("demo:tiny-clip", ["clip", "not BLIP"]), ("empty", ["empty"])])
def test_a_folder_without_a_captioner_is_named_and_captions_are_kept(composed, here, base, words):
    folder = tofu(here / "TOFU")
    (folder / "metadata.jsonl").unlink()
    (here / "empty").mkdir()
    before = contents(folder)
    sentence = refused(composed, "stage=caption", "dataset=folder", "dataset.root=TOFU", f"captioner.base={base}")
    for word in words:
        assert word in sentence
    assert contents(folder) == before


def test_a_lora_of_another_model_is_named(composed, here):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(4, 7),
        f"{name}.lora_up.weight": torch.ones(7, 4),
        f"{name}.alpha": torch.tensor(4.0),
    }
    lora(here / "other.safetensors", **tensors)
    few = ["sampler.steps=2", "stage.prompt='A {trigger}'", f"stage.photo='{PHOTO}'"]
    assert "other.safetensors" in refused(composed, "stage=img2img", "lora=other.safetensors", *few)
    lora(here / "none.safetensors", nothing=torch.from_numpy(np.zeros(3)))
    assert "none.safetensors" in refused(composed, "stage=img2img", "lora=none.safetensors", *few)
