"""Training on the bundled tiny base: what a user would miss if it broke."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file

from lora_lab.adapters.wear import worn
from lora_lab.base.cache import Cache
from lora_lab.base.encode import Encoder, encode_picture
from lora_lab.base.load import load_base
from lora_lab.config import compose
from lora_lab.demo import BASE, TOFU
from lora_lab.errors import InputError, RunError
from lora_lab.stages import run
from lora_lab.training import loop, step
from lora_lab.training.data import TrainingData, encode_dataset, latent_mask
from lora_lab.training.loss import objective, sample_losses
from lora_lab.training.plan import Plan, make_plan
from lora_lab.training.state import checkpoints

# Six of the tofu pictures: encoding all 24 would be half of the time.
FAST = (
    "stage=train", "dataset=folder", "dataset.root=../tofu", "refiner=off", "device=cpu", "tracker=off",
    "model.judge=null", "rank=4", "batch_size=2", "sampler.steps=2", "stage.save_dtype=fp32",
    "stage.prompts=['A {trigger} with a green background']",
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("tofu")
    rows = [row for row in (TOFU / "metadata.jsonl").read_text().splitlines() if json.loads(row)["file_name"] < "06"]
    (root / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    for i in range(6):
        shutil.copy(TOFU / f"{i:02d}.png", root)
    return root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, pictures, monkeypatch):
    (tmp_path / "tofu").symlink_to(pictures)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def train(folder: str, *overrides: str):
    return run(compose(*FAST, *overrides), Path(folder).absolute())


def lora(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/lora/HANA_TOFU.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def metrics(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def interrupt_at(step: int, monkeypatch) -> None:
    """Ctrl-C while `step` is done."""
    write = loop.MetricsFile.write

    def and_interrupt(self, number, numbers):
        write(self, number, numbers)
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.MetricsFile, "write", and_interrupt)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, pictures):
    """20 steps at once, for every test that needs something to compare with."""
    root = tmp_path_factory.mktemp("uninterrupted")
    (root / "tofu").symlink_to(pictures)
    folder = root / "work"
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    try:
        train("run", "steps=20", "stage.validate_every=10", "stage.checkpoint_every=10")
    finally:
        os.chdir(before)
    return str(folder / "run")


def test_ten_steps_and_ten_resumed_equal_twenty_to_the_bit(uninterrupted):
    train("run", "steps=10")
    train("run", "steps=20", f"resume={Path('run').absolute()}")
    assert_same(lora("run"), lora(uninterrupted))
    assert [line["loss"] for line in metrics("run")] == [line["loss"] for line in metrics(uninterrupted)]


NOISE = "loss.noise_offset=0.1 loss.pyramid_iterations=6 loss.timestep_sampling=logit_normal loss=huber"


DATA = "dataset.flip=true dataset.shuffle_captions=true dataset.keep_tokens=0 dataset.repeats=2"


@pytest.mark.parametrize(
    "how",
    [
        "schedule=cosine stage.lora_plus_ratio=16",
        "optimizer=adamw8bit",
        "optimizer=schedule_free",
        pytest.param("stage.ema_decay=0.9", marks=pytest.mark.slow),
        f"adapter.lora_dropout=0.5 {NOISE}",
        pytest.param(DATA, marks=pytest.mark.slow),
        pytest.param("adapter=pissa", marks=pytest.mark.slow),
        pytest.param("adapter=lokr adapter.module_dropout=0.5", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_leaves_a_checkpoint_that_goes_on_exactly(how, monkeypatch):
    how = how.split()
    train("whole", "steps=6", "stage.validate_every=2", *how)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=r"stopped after step 3.*resume="):
        interrupt_at(3, patch)
        train("cut", "steps=6", *how)
    assert [c.name for c in checkpoints(Path("cut"))] == ["step-000003"]
    assert not Path("cut/result.json").exists()
    train("cut", "steps=6", *how, f"resume={Path('cut').absolute()}")
    assert_same(lora("cut"), lora("whole"))
    assert [line["step"] for line in metrics("cut")] == [1, 2, 3, 4, 5, 6]


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(uninterrupted):
    train("run", "steps=10", "stage.checkpoint_every=5")
    half = Path("run/checkpoints/.step-000015")  # what a kill in the middle of writing leaves
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 1.0}\n{"step": 12, "lo')
    train("run", "steps=20", f"resume={Path('run').absolute()}")
    assert_same(lora("run"), lora(uninterrupted))
    assert [line["step"] for line in metrics("run")] == list(range(1, 21))


def test_a_resumed_run_refuses_to_become_another_one():
    train("run", "steps=2")
    for change, named in (
        ("rank=8", "adapter"),
        ("lr=5e-4", "optimizer"),
        ("seed=1", "seed"),
        ("batch_size=1", "batch_size"),
        ("loss=plain", "loss.weighting"),
        ("stage.ema_decay=0.5", "stage.ema_decay"),
        ("schedule.warmup=1", "schedule"),
        ("dataset.repeats=2", r"dataset\.repeats=\[1\], not \[2\]"),
        ("dataset.random_crop=true", r"dataset\.random_crop"),
        ("dataset.shuffle_captions=true", r"dataset\.shuffle_captions"),
        ("dataset.caption_suffix=x", r"dataset\.caption_suffix"),
    ):
        with pytest.raises(InputError, match=named):
            train("run", "steps=4", change, f"resume={Path('run').absolute()}")
    with pytest.raises(InputError, match="beyond steps=1"):
        train("run", "steps=1", f"resume={Path('run').absolute()}")


def test_a_validation_picture_is_what_inference_gives_in_a_new_process(uninterrupted):
    picture = Path(uninterrupted, "samples", "step-000020", "p0-s0.png")
    code = f"""
import torch; torch.set_num_threads({torch.get_num_threads()})
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
pipe = StableDiffusionXLPipeline.from_pretrained({str(BASE)!r}, dtype=torch.float32)
pipe.load_lora_weights({uninterrupted + "/lora"!r}, weight_name="HANA_TOFU.safetensors")
pipe("A HANA_TOFU with a green background", width=128, height=128, num_inference_steps=2, guidance_scale=5.0,
     generator=torch.Generator("cpu").manual_seed(0)).images[0].save("again.png")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open(picture)))
    assert Image.open(picture).text["prompt"] == "A HANA_TOFU with a green background"


def test_a_base_said_to_predict_v_is_drawn_with_as_it_was_trained():
    """In validation, in plain diffusers, and in img2img of the file, which remembers what the command line said."""
    train("run", "steps=2", "loss=zero_snr")
    shown = np.asarray(Image.open("run/samples/step-000002/p0-s0.png"))
    pipe = StableDiffusionXLPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights("run/lora/HANA_TOFU.safetensors")
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    drawn = pipe(
        "A HANA_TOFU with a green background", width=128, height=128, num_inference_steps=2, guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(drawn), shown)
    asked = ("stage=img2img", "lora=run", "stage.photo=demo:photos/1.png", "stage.prompt='A {trigger}'", "device=cpu",
             "sampler.steps=2")  # fmt: skip

    def photo_drawn(folder, *overrides):
        return np.asarray(Image.open(run(compose(*asked, *overrides), Path(folder)).pictures[0].picture))

    remembered = photo_drawn("a")
    assert np.array_equal(remembered, photo_drawn("b", "loss=zero_snr"))
    otherwise = photo_drawn("c", "loss.prediction=epsilon", "loss.zero_terminal_snr=false")
    assert not np.array_equal(remembered, otherwise)


def test_a_run_leaves_what_is_promised(uninterrupted):
    folder = Path(uninterrupted)
    result = json.loads((folder / "result.json").read_text())
    assert result["stage"] == "train" and result["steps"] == 20
    assert Path(result["lora"]).is_file() and result["seconds"] > 0 and math.isfinite(result["loss"])
    assert set(result["samples"]) == {"10", "20"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["sha256"]) == {"base", "dataset", "captions"} and manifest["packages"]["torch"]
    assert [c.name for c in checkpoints(folder)] == ["step-000010", "step-000020"]
    assert Image.open(folder / "loss.png").size[0] > 100
    assert (folder.parent / "models/lora/HANA_TOFU.safetensors").read_bytes() == Path(result["lora"]).read_bytes()
    with safe_open(result["lora"], "pt") as file:
        notes = file.metadata()
    assert notes["modelspec.trigger_phrase"] == "HANA_TOFU" and notes["ss_network_dim"] == "4"
    assert notes["ss_num_train_images"] == "6" and notes["ss_steps"] == "20"


def test_nothing_is_written_outside_the_run_folder_but_the_published_lora_and_the_cache(uninterrupted):
    root = Path(uninterrupted).parent
    assert {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and "run" not in p.parts[-4:]} >= {
        "models/lora/HANA_TOFU.safetensors"
    }
    assert sorted(p.name for p in root.iterdir()) == ["cache", "models", "run"]


def test_an_older_lora_of_the_same_name_is_kept():
    Path("models/lora").mkdir(parents=True)
    Path("models/lora/HANA_TOFU.safetensors").write_bytes(b"precious")
    train("run", "steps=1")
    assert Path("models/lora/HANA_TOFU.1.safetensors").read_bytes() == b"precious"
    assert load_file("models/lora/HANA_TOFU.safetensors").keys() == lora("run").keys()


def test_resuming_a_finished_run_publishes_nothing_twice():
    train("run", "steps=2")
    train("run", "steps=2", f"resume={Path('run').absolute()}")
    assert [p.name for p in Path("models/lora").iterdir()] == ["HANA_TOFU.safetensors"]


def test_a_second_run_into_the_same_folder_is_refused():
    train("run", "steps=1")
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="has a run already"):
        train("run", "steps=2")
    assert {p: p.stat().st_mtime_ns for p in Path("run").rglob("*") if p.is_file()} == before


def test_the_loss_of_known_noise_falls(uninterrupted):
    """20 steps are few, but the trained LoRA must beat the base on the very batches that it saw."""
    _, data, pipe = encoded()
    asked = objective(compose(*FAST).loss, pipe.scheduler.config)

    def loss() -> float:
        batches = (
            data.batch(seed=0, step=s, part=0, parts=1, batch_size=2, asked=asked, caption_dropout=0.0)
            for s in range(20)
        )
        with torch.no_grad():
            return sum(sample_losses(pipe.unet, asked, batch).mean().item() for batch in batches) / 20

    before = loss()
    with worn(pipe, Path(uninterrupted, "lora", "HANA_TOFU.safetensors")):
        after = loss()
    assert after < before * 0.97


def test_two_half_batches_accumulated_equal_one_whole(tmp_path):
    """Sample i of a step draws the same noise in one batch or two; with one picture the order does not matter."""
    one = tmp_path / "one"
    one.mkdir()
    (one / "00.png").write_bytes((TOFU / "00.png").read_bytes())
    (one / "00.txt").write_text("A HANA_TOFU smiling")
    data = (f"dataset.root={one}", "steps=3", *NOISE.split())
    train("whole", *data, "batch_size=4")
    train("halves", *data, "batch_size=2", "stage.gradient_accumulation=2")
    whole, halves = lora("whole"), lora("halves")
    for key in whole:
        assert torch.allclose(whole[key], halves[key], atol=2e-5), key


def planned(*overrides: str) -> Plan:
    return make_plan(compose(*FAST, *overrides), Path("none").absolute())


def encoded(*overrides: str) -> tuple[Plan, TrainingData, StableDiffusionXLPipeline]:
    """The plan, the data that `overrides` give, and the base that encoded them."""
    config, plan = compose(*FAST, *overrides), planned(*overrides)
    pipe = load_base(config.model, plan.device)
    encoder = Encoder(pipe, plan.device, Cache(None), False)
    return plan, encode_dataset(plan.samples, plan.crops, plan.texts, config.dataset.flip, encoder), pipe


def texts_of(*overrides: str) -> set[str]:
    """Everything that the six pictures are trained with."""
    return {text for texts in planned(*overrides).texts for orders in texts for text in orders}


def test_captions_are_shuffled_within_bounds_and_dressed():
    plain = texts_of()
    assert len(plain) == 6 and not any("{" in text for text in plain)
    shuffled = texts_of("dataset.shuffle_captions=true", "dataset.keep_tokens=0")
    assert len(shuffled) > len(texts_of("dataset.shuffle_captions=true", "dataset.keep_tokens=0",
                                        "dataset.caption_variants=2")) > 6  # fmt: skip
    fronts = {text.split(", ")[0] for text in plain}
    kept = texts_of("dataset.shuffle_captions=true")
    assert {text.split(", ")[0] for text in kept} == fronts != {text.split(", ")[0] for text in shuffled}
    dressed = texts_of("dataset.caption_prefix='this is {trigger}:'", "dataset.caption_suffix=', flat'")
    assert dressed == {f"this is HANA_TOFU: {text}, flat" for text in plain}


def test_the_trigger_may_stand_in_the_prefix(own_pictures):
    reworded(own_pictures, "HANA_TOFU", "tofu", count=-1)
    with pytest.raises(InputError, match="no caption of the 6 pictures has the trigger HANA_TOFU"):
        planned(f"dataset.root={own_pictures}")
    planned(f"dataset.root={own_pictures}", "dataset.caption_prefix='{trigger},'")


def wide_pictures(root: Path) -> Path:
    """Two pictures of 400x120, which cover 160x96 with 160 px to spare, and one that fits."""
    root.mkdir()
    for i, size in enumerate([(400, 120), (400, 120), (128, 128)]):
        Image.effect_noise(size, 90).convert("RGB").save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a HANA_TOFU, {i}")
    return root


def test_random_crops_are_encoded_as_they_are_told(tmp_path):
    root = wide_pictures(tmp_path / "wide")
    masks = wide_pictures(tmp_path / "masks")
    crop = (f"dataset.root={root}", f"loss.mask={masks}", "dataset.random_crop=true", "dataset.flip=true")
    plan, data, pipe = encoded(*crop, "dataset.crops=3")
    assert [len(example.crops) for example in data.examples] == [3, 3, 1]
    for example, cuts in zip(data.examples, plan.crops, strict=True):
        scaled_width = cuts[-1].crop_top_left[1] + cuts[-1].picture.width
        for cut, (upright, mirrored) in zip(cuts, example.crops, strict=True):
            top, left = cut.crop_top_left
            other = scaled_width - cut.picture.width - left
            told = (*cut.original_size, top, left, *cut.target_size)
            assert tuple(upright.time_ids.tolist()) == told
            assert tuple(mirrored.time_ids.tolist()) == (*told[:3], other, *told[4:])
            assert torch.equal(upright.latents, encode_picture(pipe, cut.picture, ""))
            assert torch.equal(mirrored.latents, encode_picture(pipe, ImageOps.mirror(cut.picture), ""))
            assert torch.equal(upright.mask, latent_mask(cut.mask, *upright.latents.shape[1:]))
            assert torch.allclose(mirrored.mask, upright.mask.flip(-1))
    assert not torch.equal(data.examples[0].crops[0][0].mask, data.examples[0].crops[1][0].mask)
    assert [len(cuts) for cuts in planned(*crop).crops] == [4, 4, 1], "dataset.crops is 4 if nothing else is said"


def test_random_crops_change_what_is_learnt_where_there_is_room_for_them(tmp_path, capsys):
    root = f"dataset.root={wide_pictures(tmp_path / 'wide')}"
    train("centre", root, "steps=3")
    train("random", root, "steps=3", "dataset.random_crop=true", "name=random")
    assert "9 of 3 pictures" in capsys.readouterr().out
    centre, random = lora("centre"), load_file("random/lora/random.safetensors")
    assert any(not torch.equal(centre[key], random[key]) for key in centre)


def test_folders_are_shown_as_often_as_they_say(tmp_path, pictures, capsys):
    one, two = wide_pictures(tmp_path / "one"), tmp_path / "tofu"
    _, data, _ = encoded(f"dataset.root=[{{root: {one}, repeats: 4}}, {two}]", "dataset.repeats=2")
    shown = [data.examples[i].name for bucket in data.buckets for i in bucket]
    assert {name: shown.count(name) for name in shown} == {
        **{f"one/{i}.png": 4 for i in range(3)}, **{f"{two.resolve().name}/{i:02d}.png": 2 for i in range(6)}
    }  # fmt: skip
    train("run", f"dataset.root=[{{root: {one}, repeats: 4}}, {two}]", "steps=9")
    printed = capsys.readouterr().out
    # 8 and 4 + 6 pictures an epoch, two a batch
    assert "9 pictures in" in printed and "one (4 times), " in printed and "9 steps of 2 (1.0 epochs)" in printed


def test_one_of_several_captions_is_read_at_a_time(own_pictures, three_steps):
    lines = [json.loads(line) for line in (own_pictures / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        line["text"] = [line["text"], line["text"]]
    (own_pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train("same", "steps=3", f"dataset.root={own_pictures}")
    assert_same(lora("same"), three_steps)
    for line in lines:
        line["text"][1] = "HANA_TOFU"
    (own_pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train("two", "steps=3", f"dataset.root={own_pictures}", "name=two")
    two = load_file("two/lora/two.safetensors")
    assert any(not torch.equal(two[key], three_steps[key]) for key in two)
    with safe_open("two/lora/two.safetensors", "pt") as file:
        assert json.loads(file.metadata()["ss_tag_frequency"])["HANA_TOFU"]["HANA_TOFU"] == 6
        assert file.metadata()["ss_num_train_images"] == "6"


def cut_out(folder: Path, box: tuple[int, int, int, int]) -> Path:
    """Masks of the six pictures, white in `box`."""
    folder.mkdir()
    for i in range(6):
        mask = Image.new("L", (128, 128))
        mask.paste(255, box)
        mask.save(folder / f"{i:02d}.png")
    return folder


@pytest.mark.slow
def test_masks_decide_what_of_the_pictures_is_learnt(three_steps, tmp_path, capsys):
    white, left = cut_out(tmp_path / "white", (0, 0, 128, 128)), cut_out(tmp_path / "left", (0, 0, 64, 128))
    train("white", "steps=3", f"loss.mask={white}")
    assert_same(lora("white"), three_steps)
    train("left", "steps=3", f"loss.mask={left}")
    assert "left; what is not white weighs 0" in capsys.readouterr().out
    assert not torch.equal(*(torch.cat([v.flatten() for v in x.values()]) for x in (lora("left"), three_steps)))
    assert all(one["loss"] < all_of["loss"] for one, all_of in zip(metrics("left"), metrics("white"), strict=True))
    assert "masks" in json.loads(Path("left/manifest.json").read_text())["sha256"]
    train("lenient", "steps=3", f"loss.mask={left}", "loss.unmasked_weight=1")
    assert_same(lora("lenient"), three_steps)


@pytest.mark.slow
def test_a_masked_run_goes_on_with_the_same_masks_wherever_they_are(tmp_path):
    left, other = cut_out(tmp_path / "left", (0, 0, 64, 128)), cut_out(tmp_path / "other", (0, 0, 99, 128))
    train("whole", "steps=4", f"loss.mask={left}", "dataset.flip=true")
    train("cut", "steps=2", f"loss.mask={left}", "dataset.flip=true")
    go_on = ("steps=4", f"resume={Path('cut').absolute()}", "dataset.flip=true")
    for mask, named in ((other, "masks"), ("none", r"loss\.mask"), ("alpha", r"loss\.mask")):
        with pytest.raises(InputError, match=f"trained with {named}="):
            train("cut", *go_on, f"loss.mask={mask}")
    train("cut", *go_on, f"loss.mask={left.rename(tmp_path / 'moved')}")
    assert_same(lora("cut"), lora("whole"))


def test_pictures_of_several_shapes_are_trained_in_buckets(tmp_path, capsys):
    shapes = tmp_path / "shapes"
    shapes.mkdir()
    for i, size in enumerate([(200, 200), (300, 200), (200, 300), (310, 200)]):
        Image.effect_noise(size, 90).convert("RGB").save(shapes / f"{i}.png")
        (shapes / f"{i}.txt").write_text("a HANA_TOFU")
    train("run", f"dataset.root={shapes}", "steps=4")
    printed = capsys.readouterr().out
    assert "1 of 128x128" in printed and "2 of 160x96" in printed and "1 of 96x160" in printed
    assert all(math.isfinite(line["loss"]) for line in metrics("run"))


@pytest.fixture(scope="module")
def three_steps(uninterrupted):
    """Three steps without any option, in the folder of the long run's neighbour."""
    before = Path.cwd()
    os.chdir(Path(uninterrupted).parent)
    try:
        train("three", "steps=3", "name=three")
    finally:
        os.chdir(before)
    return load_file(Path(uninterrupted).parent / "three/lora/three.safetensors")


@pytest.mark.parametrize(
    "change",
    ["seed=1", "lr=2e-3", "loss.snr_gamma=0.01", "loss=huber", "loss=zero_snr", "loss.noise_offset=0.1",
     "stage.caption_dropout=1.0", "dataset.flip=true", "dataset.shuffle_captions=true",
     "dataset.caption_prefix='a drawing of'", "dataset.caption_suffix=', flat'", "schedule.warmup=2",
     "adapter.lora_alpha=2", "stage.max_grad_norm=0.001", "optimizer.weight_decay=0.5", "optimizer=adamw8bit",
     "optimizer=lion8bit", "optimizer=adafactor", "optimizer=schedule_free", "schedule=cosine",
     "targets=ff", "targets=all", "adapter.target_modules=.*attn2.*to_q", "adapter.rank_pattern={to_q: 2}",
     "adapter.alpha_pattern={to_q: 1}", "adapter.lora_dropout=0.5", "adapter=rslora", "adapter=dora", "adapter=pissa",
     "adapter=loha", "adapter=lokr", "stage.lora_plus_ratio=16"],
)  # fmt: skip
def test_an_option_changes_what_is_learnt(change, three_steps):
    train("changed", "steps=3", change)
    plain, changed = three_steps, lora("changed")
    assert plain.keys() != changed.keys() or any(not torch.equal(plain[key], changed[key]) for key in plain)


def test_prodigys_own_rate_is_what_is_logged_and_shown(capsys):
    train("run", "steps=6", "optimizer=prodigy", "optimizer.d0=1e-3", "optimizer.d_coef=10")  # to grow early
    assert "Prodigy with an lr of its own, 1; lr=0.001 is not used" in capsys.readouterr().out
    rates = [line["lr"] for line in metrics("run")]
    assert rates[0] == 1e-3 and rates == sorted(rates) and rates[-1] > 1e-3
    with safe_open("run/lora/HANA_TOFU.safetensors", "pt") as file:
        assert file.metadata()["ss_learning_rate"] == "1.0"


def test_the_average_of_a_schedule_free_optimizer_is_what_is_saved():
    train("run", "steps=3", "optimizer=schedule_free")
    walking = load_file("run/checkpoints/step-000003/adapter.safetensors")
    saved = {key: value for key, value in lora("run").items() if not key.endswith(".alpha")}
    key = next(key for key in walking if "lora_B" in key)
    name = "lora_unet_" + key.removesuffix(".lora_B.weight").replace(".", "_") + ".lora_up.weight"
    average, last = saved[name], walking[key]
    assert not torch.equal(average, last)
    assert average.norm() < last.norm()  # it began at zero, and the average comes after


def test_the_average_over_the_steps_is_saved_and_drawn_and_the_checkpoint_has_both(three_steps):
    train("run", "steps=3", "stage.ema_decay=0.99", "stage.checkpoint_every=1", "stage.keep_checkpoints=9")
    steps = [load_file(str(c / "adapter.safetensors")) for c in checkpoints(Path("run"))]
    saved = lora("run")
    for key in (key for key in steps[0] if "lora_B" in key):
        name = "lora_unet_" + key.removesuffix(".lora_B.weight").replace(".", "_") + ".lora_up.weight"
        average = torch.zeros_like(saved[name])  # as every LoRA begins
        for n, weights in enumerate(steps):
            average = average.lerp(weights[key], 1 - (1 + n) / (10 + n))
        assert torch.allclose(saved[name], average, atol=1e-7)
        assert torch.equal(steps[-1][key], three_steps[name])  # training itself is the one without
    train("plain", "steps=3")
    drawn, plain = (np.asarray(Image.open(f"{run}/samples/step-000003/p0-s0.png")) for run in ("run", "plain"))
    assert not np.array_equal(drawn, plain)


def validation(folder: str) -> dict[int, float]:
    lines = [json.loads(line) for line in Path(folder, "validation.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["step"] for line in lines})
    return {line["step"]: line["loss"] for line in lines}


MEASURED = ("stage.validation_loss_every=1", "stage.validation_timesteps=[300,600,900]")


@pytest.fixture(scope="module")
def measured(three_steps, uninterrupted):
    """The same three steps with a measurement after each."""
    before = Path.cwd()
    os.chdir(Path(uninterrupted).parent)
    try:
        result = train("measured", "steps=3", "name=measured", *MEASURED)
    finally:
        os.chdir(before)
    folder = Path(uninterrupted).parent / "measured"
    assert result.validation_loss == validation(folder)[3]
    return folder


def test_measuring_the_validation_loss_changes_nothing_that_is_learnt(measured, three_steps):
    assert_same(load_file(measured / "lora/measured.safetensors"), three_steps)


def test_the_validation_loss_falls_and_is_taken_up_again_by_a_resumed_run(measured):
    whole = validation(measured)
    assert list(whole) == [0, 1, 2, 3] and whole[3] < whole[0]
    train("cut", "steps=2", *MEASURED)
    train("cut", "steps=3", *MEASURED, f"resume={Path('cut').absolute()}")
    assert validation("cut") == whole
    train("cut", "steps=3", *MEASURED, f"resume={Path('cut').absolute()}")
    assert validation("cut") == whole


@pytest.mark.slow
def test_validation_losses_of_runs_with_other_seeds_and_losses_can_be_compared(measured, tmp_path, capsys):
    """Before the first step, when every LoRA is still nothing, they are one number: that of the base."""
    start = validation(measured)[0]
    left = cut_out(tmp_path / "left", (0, 0, 64, 128))
    other = ("loss=huber", "loss.noise_offset=0.2", f"loss.mask={left}", "dataset.flip=true", "batch_size=4", "seed=9")
    train("other", "steps=1", *MEASURED, *other)
    assert validation("other")[0] == pytest.approx(start, rel=1e-5)
    assert "of the training pictures, which can be learnt by heart" in capsys.readouterr().out
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for i in (6, 7):
        shutil.copy(TOFU / f"{i:02d}.png", held_out)
        (held_out / f"{i:02d}.txt").write_text("A tofu")
    train("held", "steps=1", *MEASURED, f"stage.validation_root={held_out}", "stage.validation_timesteps=[300]")
    assert f"of 2 pictures in {held_out}" in capsys.readouterr().out
    assert "validation" in json.loads(Path("held/manifest.json").read_text())["sha256"]
    train("elsewhere", "steps=1", *MEASURED, f"stage.validation_root={held_out}")
    assert len({round(validation(run)[0], 4) for run in ("other", "held", "elsewhere")}) == 3


def test_the_validation_loss_is_the_mean_error_of_the_prediction(measured):
    """Computed again from the base's files, for one picture at a time and at one timestep at a time."""
    from lora_lab.base.cache import Cache
    from lora_lab.base.encode import Encoder
    from lora_lab.base.load import load_base
    from lora_lab.training.data import encode_dataset
    from lora_lab.training.plan import make_plan
    from lora_lab.training.randomness import generator

    config = compose(*FAST)
    plan = make_plan(config, Path("none"))
    pipe = load_base(config.model, plan.device)
    errors = []
    encoder = Encoder(pipe, plan.device, Cache(None), offload=False)
    for example in encode_dataset(plan.samples, plan.crops, plan.texts, False, encoder).examples:
        view, text = example.crops[0][0], example.texts[0][0]
        for t in (300, 600, 900):
            noise = torch.randn(view.latents.shape, generator=generator("validation", example.name, t))
            kept = pipe.scheduler.alphas_cumprod[t]
            noisy = kept.sqrt() * view.latents + (1 - kept).sqrt() * noise
            conditions = {"text_embeds": text.pooled[None], "time_ids": view.time_ids[None]}
            with torch.no_grad():
                predicted = pipe.unet(noisy[None], t, text.tokens[None], added_cond_kwargs=conditions).sample
            errors.append((predicted[0] - noise).square().mean().item())
    assert validation(measured)[0] == pytest.approx(sum(errors) / len(errors), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["dora", "pissa", "loha", "lokr"])
def test_an_option_of_an_adapter_changes_what_is_learnt(adapter):
    asked = ("steps=1", f"adapter={adapter}", "targets=ff" if adapter == "pissa" else "targets=all")
    train("plain", *asked)
    changes = {
        "dora": ["adapter.use_rslora=true", "adapter.alpha_pattern={to_q: 1}"],
        "pissa": ["adapter.init_lora_weights=pissa_niter_1", "adapter.lora_dropout=0.5"],
        "loha": ["adapter.alpha=2", "adapter.rank_dropout=0.5", "adapter.use_effective_conv2d=true"],
        "lokr": ["adapter.decompose_factor=2", "adapter.decompose_both=true", "adapter.init_weights=lycoris"],
    }
    for i, change in enumerate(changes[adapter]):
        train(f"{i}", *asked, change)
        plain, changed = lora("plain"), lora(f"{i}")
        same = plain.keys() == changed.keys() and all(
            plain[key].shape == changed[key].shape and torch.equal(plain[key], changed[key]) for key in plain
        )
        assert not same, change


def test_lora_plus_lets_b_learn_faster_and_leaves_a(three_steps):
    """A's gradient is zero in the first step, since B is; after it A stands still, and B is 16 times as far."""
    train("one", "steps=1", "optimizer.weight_decay=0")
    train("plus", "steps=1", "optimizer.weight_decay=0", "stage.lora_plus_ratio=16")
    one, plus = lora("one"), lora("plus")
    for key in one:
        times = 16 if key.endswith("lora_up.weight") else 1
        assert torch.allclose(plus[key], times * one[key], rtol=1e-4), key
    notes = metadata_of("plus")
    assert json.loads(notes["ss_network_args"]) == {"loraplus_lr_ratio": "16.0"}
    with pytest.raises(InputError, match="only LoRA and DoRA"):
        train("loha", "steps=1", "adapter=loha", "stage.lora_plus_ratio=16")


def metadata_of(folder):
    with safe_open(f"{folder}/lora/HANA_TOFU.safetensors", "pt") as file:
        return file.metadata()


def test_training_starts_from_a_lora_file_and_goes_on_only_with_that(three_steps, uninterrupted):
    """One step with a learning rate of next to nothing leaves what the file holds."""
    file = Path(uninterrupted, "lora", "HANA_TOFU.safetensors")
    train("run", "steps=1", "lr=1e-12", f"stage.start_from={file}", "optimizer.weight_decay=0")
    for key, value in lora(uninterrupted).items():
        assert torch.allclose(lora("run")[key], value, atol=1e-9), key
    train("more", "steps=2", f"stage.start_from={file}")
    whole = lora("more")
    train("cut", "steps=1", f"stage.start_from={file}")
    goes_on = ("steps=2", f"resume={Path('cut').absolute()}")
    with pytest.raises(InputError, match="start"):
        train("cut", *goes_on, f"stage.start_from={Path(uninterrupted, 'lora', 'HANA_TOFU-000010.safetensors')}")
    with pytest.raises(InputError, match="start"):
        train("cut", *goes_on)
    train("cut", *goes_on, f"stage.start_from={file}")
    assert_same(lora("cut"), whole)


def test_a_file_that_training_cannot_start_from_is_refused(uninterrupted):
    with pytest.raises(InputError, match=r"stage\.start_from=nothing: no such file"):
        train("run", "steps=1", "stage.start_from=nothing")
    with pytest.raises(InputError, match=r"holds LoRA of rank 4 in \d+ layers, but this run trains LoRA of rank 8 in"):
        train("rank", "steps=1", "rank=8", f"stage.start_from={uninterrupted}")
    with pytest.raises(InputError, match="PiSSA begins with the base's weights"):
        train("pissa", "steps=1", "adapter=pissa", f"stage.start_from={uninterrupted}")


def test_gradient_checkpointing_and_offload_change_nothing():
    train("fast", "steps=3", "memory=fast")
    train("balanced", "steps=3", "memory=balanced", "stage.validate_every=1")
    fast, balanced = lora("fast"), lora("balanced")
    for key in fast:
        assert torch.allclose(fast[key], balanced[key], atol=1e-6), key


def test_with_offload_the_unet_goes_to_the_device_when_all_is_encoded(monkeypatch):
    arrived, to, device = [], torch.nn.Module.to, torch.device("cpu:0")  # the CPU, told apart by name

    def watched(self, *arguments, **settings):
        if device in arguments:
            arrived.append(type(self).__name__)
        return to(self, *arguments, **settings)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    train("run", "steps=1", "memory=balanced", "device='cpu:0'")
    turns = ["CLIPTextModel", "CLIPTextModelWithProjection", "AutoencoderKL", "UNet2DConditionModel"]
    assert [name for name in arrived if name in turns][:4] == turns


@pytest.fixture
def own_pictures(pictures, tmp_path):
    """A copy of the six pictures that a test may change."""
    return Path(shutil.copytree(pictures, tmp_path / "own"))


def reworded(root: Path, old: str, new: str, count: int = 1) -> None:
    file = root / "metadata.jsonl"
    file.write_text(file.read_text().replace(old, new, count))


def test_a_second_run_encodes_only_what_changed_and_learns_the_same(own_pictures, three_steps, capsys):
    data = ("steps=3", f"dataset.root={own_pictures}")
    train("first", *data)
    assert "encoded 7 of 7 texts and 6 of 6 views of pictures in" in capsys.readouterr().out
    train("second", *data, "seed=0", "rank=4", "name=second")
    assert "encoded 0 of 7 texts and 0 of 6 views of pictures" in capsys.readouterr().out
    assert_same(lora("first"), three_steps)
    assert_same(load_file("second/lora/second.safetensors"), three_steps)
    reworded(own_pictures, "HANA_TOFU", "tiny HANA_TOFU")
    shutil.copy(TOFU / "07.png", own_pictures / "03.png")
    train("changed", *data)
    assert "encoded 1 of 7 texts and 1 of 6 views of pictures" in capsys.readouterr().out


def test_without_a_cache_nothing_is_kept_and_the_same_is_learnt(three_steps, capsys):
    train("run", "steps=3", "cache=null")
    assert_same(lora("run"), three_steps)
    assert not Path("cache").exists() and "encoded" not in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_refused_before_the_base_is_loaded(monkeypatch):
    monkeypatch.setattr("lora_lab.stages.train.load_base", None)
    Path("file").write_text("")
    with pytest.raises(InputError, match=r"file: cannot be written to .*cache=null"):
        train("run", "cache=file")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(monkeypatch):
    real = step.sample_losses
    calls = []

    def sometimes_nan(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 4 else 1)

    monkeypatch.setattr(step, "sample_losses", sometimes_nan)
    with pytest.raises(RunError, match=r"step 4 is nan, at 0\d\.png, 0\d\.png: "):
        train("run", "steps=6", "stage.checkpoint_every=2")
    state = load_file(str(checkpoints(Path("run"))[-1] / "adapter.safetensors"))
    assert checkpoints(Path("run"))[-1].name == "step-000002"
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("at", [4, 6], ids=["between", "last step"])
def test_an_infinite_gradient_of_a_finite_loss_stops_the_run_before_anything_is_written(at, monkeypatch):
    real = step.sample_losses
    calls = []

    def sometimes_steep(*arguments):
        calls.append(1)
        losses = real(*arguments)
        if len(calls) == at:
            losses.register_hook(lambda gradient: gradient * math.inf)
        return losses

    monkeypatch.setattr(step, "sample_losses", sometimes_steep)
    with pytest.raises(RunError, match=rf"gradient's norm of step {at} is (inf|nan), at 0\d\.png, 0\d\.png: "):
        train("run", "steps=6", "stage.checkpoint_every=1", "stage.validate_every=1")
    assert checkpoints(Path("run"))[-1].name == f"step-{at - 1:06d}"
    state = load_file(str(checkpoints(Path("run"))[-1] / "adapter.safetensors"))
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert [line["step"] for line in metrics("run")] == list(range(1, at))
    assert max(p.name for p in Path("run/lora").iterdir()) == f"HANA_TOFU-{at - 1:06d}.safetensors"
    assert not Path("models").exists()


def test_only_the_newest_checkpoints_are_kept():
    train("run", "steps=6", "stage.checkpoint_every=1", "stage.keep_checkpoints=3")
    assert [c.name for c in checkpoints(Path("run"))] == ["step-000004", "step-000005", "step-000006"]


def test_identity_is_measured_before_and_after():
    result = train("run", "steps=1", "model.judge=demo:tiny-clip")
    assert -1 <= result.identity_before <= 1 and -1 <= result.identity <= 1
    assert len(list(Path("run/samples/identity-before").glob("*.png"))) == 8
    assert json.loads(Path("run/result.json").read_text())["identity"] == result.identity


def test_an_offline_wandb_run_holds_the_losses_the_pictures_and_the_settings(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))  # no .netrc of whoever runs the tests
    train("run", "steps=3", "tracker=wandb", "tracker.mode=offline", "tracker.group=nightly", *MEASURED)
    (record,) = Path("run/wandb").glob("offline-run-*")
    asked = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)]
    records = [json.loads(line) for line in subprocess.run(asked, check=True, capture_output=True).stdout.splitlines()]
    rows = [r["history"]["item"] for r in records if r["type"] == "history"]
    losses = {row["global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in metrics("run")})
    measured = {row["global_step"]: row["validation/loss"] for row in rows if "validation/loss" in row}
    assert measured == pytest.approx(validation("run"))
    (drawn,) = [row for row in rows if "validation/p0-s0.path" in row]
    logged = Image.open(record / "files" / drawn["validation/p0-s0.path"]).convert("RGB")
    assert np.array_equal(np.asarray(logged), np.asarray(Image.open("run/samples/step-000003/p0-s0.png")))
    assert "A HANA_TOFU with a green background" in drawn["validation/p0-s0.caption"]
    assert "nightly" in json.dumps(records) and '"rank"' in json.dumps(records)
