"""What keeps the base's idea of the class: it changes what is learnt and keeps the class, by draws of its own."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_runs import FAST, assert_same, cut_out, encoded, interrupt_at, lora, metrics, resolved, train

from lora_lab.adapters.inject import lora_attached
from lora_lab.base.encode import Cache, Encoder
from lora_lab.demo import PHOTOS, TOFU
from lora_lab.errors import InputError, RunError
from lora_lab.launch.config import compose
from lora_lab.training import engine
from lora_lab.training import prior as class_pictures
from lora_lab.training.loss import objective, predict
from lora_lab.training.prior import prior_data

pytestmark = pytest.mark.usefixtures("elsewhere")

PREDICTION = ("prior=prediction",)
GENERATED = ("prior=generated", "prior.prompt='a cartoon character'", "prior.number=3")


@pytest.fixture
def others(tmp_path):
    """Three pictures of other characters, without captions."""
    root = tmp_path / "others"
    root.mkdir()
    for i, photo in enumerate(sorted(PHOTOS.glob("*.png"))[:3]):
        shutil.copy(photo, root / f"other-{i}.png")
    return root


def losses(folder: str, key: str = "loss") -> list[float]:
    return [line[key] for line in metrics(folder)]


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_without_weight_a_prior_is_measured_and_changes_neither_draws_nor_what_is_learnt(three_steps):
    train("without", "steps=3", *PREDICTION, "prior.weight=0")
    assert_same(lora("without"), three_steps)
    measured = losses("without", "prior_loss")
    assert measured[0] == 0 < measured[1], "an adapter that is still nothing predicts what the base does"
    train("with", "steps=3", *PREDICTION)
    assert different(lora("with"), three_steps)
    assert losses("with")[0] == losses("without")[0] and losses("with", "prior_loss")[1] == measured[1]


@pytest.mark.slow
def test_a_folder_of_class_pictures_is_learnt_and_named_where_its_loss_is_no_number(
    others, three_steps, monkeypatch, capsys
):
    how = ("prior=pictures", f"prior.root={others}", "prior.prompt='a cartoon character'")
    train("run", "steps=3", *how)
    assert "3 class images of 'a cartoon character' in " in capsys.readouterr().out
    assert different(lora("run"), three_steps) and all(loss > 0 for loss in losses("run", "prior_loss"))
    with safe_open("run/lora/HANA_TOFU.safetensors", "pt") as file:
        assert file.metadata()["ss_num_reg_images"] == "3" and file.metadata()["ss_prior_loss_weight"] == "1.0"
    real = engine.per_sample_loss

    def no_number(unet, asked, batch, target):
        return real(unet, asked, batch, target) * (1 if batch.prior_weight is None else math.nan)

    monkeypatch.setattr(engine, "per_sample_loss", no_number)
    with pytest.raises(RunError, match=r"prior loss of step 1 is nan, at other-\d\.png, other-\d\.png: "):
        train("nan", "steps=1", *how)


@pytest.mark.slow
def test_a_stopped_drawing_of_class_pictures_goes_on_and_other_runs_find_them(monkeypatch, capsys):
    save, drawn = class_pictures.save_picture, []

    def stop_at_the_third(path, picture, notes):
        drawn.append(path.name)
        if len(drawn) == 3:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C
        return save(path, picture, notes)

    def pictures(cache: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path(cache, "class").rglob("*.png")}

    monkeypatch.setattr(class_pictures, "save_picture", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train("stopped", "steps=1", *GENERATED, "cache=cache")
    assert pictures("cache").keys() == {"00000.png", "00001.png"}
    capsys.readouterr()
    train("goes_on", "steps=1", *GENERATED, "cache=cache")
    assert "3 class images of 'a cartoon character', 1 of them still to be rendered" in capsys.readouterr().out
    assert drawn == ["00000.png", "00001.png", "00002.png", "00002.png"]
    train("at_once", "steps=1", *GENERATED, "cache=other")
    assert pictures("cache") == pictures("other") and len(pictures("other")) == 3
    assert_same(lora("goes_on"), lora("at_once"))
    opened = Image.open(next(Path("other", "class").rglob("00000.png")))
    assert opened.size == (128, 128) and opened.text["prompt"] == "a cartoon character"
    assert "prior" in json.loads(Path("at_once/manifest.json").read_text())["sha256"]
    more = resolved(*GENERATED, "cache=cache", "prior.number=4", "lr=1e-4", "rank=8", "seed=1")
    assert (len(more.files.class_samples), len(more.images.class_images)) == (4, 3)
    for change in ("prior.seed=1", "prior.prompt='a cartoon'", "sampler.steps=3", "model.resolution=64"):
        assert not resolved(*GENERATED, "cache=cache", change).images.class_images, change


@pytest.mark.slow
def test_a_run_with_a_prior_goes_on_to_the_bit_and_only_with_that(monkeypatch):
    train("whole", "steps=3", *PREDICTION)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="stopped after step 2"):
        interrupt_at(2, patch)
        train("cut", "steps=3", *PREDICTION)
    goes_on = ("steps=3", f"resume={Path('cut').absolute()}")
    for change, named in (
        ("prior=off", r"prior\.kind=prediction, not None"),
        ("prior.class_noun=tofu", r"prior\.class_noun"),
        ("prior.weight=2", r"prior\.weight"),
    ):
        with pytest.raises(InputError, match=named):
            train("cut", *goes_on, *(PREDICTION if change != "prior=off" else ()), change)
    train("cut", *goes_on, *PREDICTION)
    assert_same(lora("cut"), lora("whole"))
    assert losses("cut", "prior_loss") == losses("whole", "prior_loss")


@pytest.mark.slow
def test_class_pictures_of_a_resumed_run_are_the_same_ones_also_without_a_cache(others):
    train("whole", "steps=4", *GENERATED, "cache=null")
    train("cut", "steps=2", *GENERATED, "cache=null")
    with pytest.raises(InputError, match=r"trained with prior="):
        train("cut", "steps=4", *GENERATED, "cache=null", "sampler.steps=3", f"resume={Path('cut').absolute()}")
    before = {path: path.stat().st_mtime_ns for path in Path("cut/class").rglob("*.png")}
    train("cut", "steps=4", *GENERATED, "cache=null", f"resume={Path('cut').absolute()}")
    assert {path: path.stat().st_mtime_ns for path in Path("cut/class").rglob("*.png")} == before and len(before) == 3
    assert_same(lora("cut"), lora("whole"))
    train("seed", "steps=1", *GENERATED, "cache=null", "prior.seed=1")
    drawn = [path for run in ("whole", "seed") for path in Path(run, "class").rglob("*.png")]
    assert len(drawn) == len({Image.open(path).tobytes() for path in drawn}) == 6
    how = ("prior=pictures", f"prior.root={others}", "prior.prompt=a")
    train("given", "steps=2", *how)
    (others / "other-0.png").unlink()
    with pytest.raises(InputError, match=r"trained with prior="):
        train("given", "steps=4", *how, f"resume={Path('given').absolute()}")


@pytest.mark.slow
def test_accumulated_batches_and_dropout_are_those_of_a_run_without_a_prior():
    how = ("steps=2", "stage.gradient_accumulation=2", "adapter.lora_dropout=0.5", "stage.caption_dropout=0.5")
    train("off", *how)
    train("on", *how, *PREDICTION, "prior.weight=0")
    assert_same(lora("off"), lora("on"))
    assert losses("off") == losses("on")


@pytest.mark.slow
@pytest.mark.parametrize("how", [PREDICTION, GENERATED], ids=["prediction", "generated"])
def test_with_a_prior_too_gradient_checkpointing_and_offload_change_nothing(how):
    train("fast", "steps=3", *how)
    train("balanced", "steps=3", "memory=balanced", "cache=other", *how)
    fast, balanced = lora("fast"), lora("balanced")
    assert all(torch.allclose(fast[key], balanced[key], atol=1e-6) for key in fast)


def class_data(config, training, data, encoder):
    """The data of the prior of `config`, which may be another than that of `training`."""
    return prior_data(
        config.prior, config.triggers, data, training.files.texts, training.files.class_samples,
        training.images.class_images, config.model, training.render, encoder,
    )  # fmt: skip


def drift(file: Path, *prior: str) -> float:
    """How far the LoRA of `file` moves what the UNet predicts of the batches of `prior`."""
    config = compose(*FAST, *prior)
    training, data, base = encoded(*prior)
    of_class = class_data(config, training, data, Encoder(base, training.device, Cache(None), False))
    loss_objective, squares = objective(config.loss, base), []
    base.network.eval()
    for number in range(8):
        batch = of_class.batch(seed=7, step=number, part=0, parts=1, batch_size=2, objective=loss_objective)
        with torch.no_grad():
            before = predict(base.network, loss_objective, batch)
            with lora_attached(base, file):
                squares.append((predict(base.network, loss_objective, batch) - before).square().mean().item())
    return sum(squares) / len(squares)


@pytest.mark.slow
def test_what_the_base_predicts_of_the_class_drifts_less_with_a_prior():
    train("off", "steps=30", "lr=1e-2")
    for kind, how in (("prediction", PREDICTION), ("generated", (*GENERATED, "prior.number=8", "sampler.steps=8"))):
        train(kind, "steps=30", "lr=1e-2", *how)
        without, kept = (drift(Path(run, "lora", "HANA_TOFU.safetensors"), *how) for run in ("off", kind))
        assert kept < 0.6 * without, kind


@pytest.mark.slow
def test_what_the_base_predicts_is_read_by_the_bases_text_encoders():
    """What is learnt shows as an error only if the target is without it; here only text encoders learn anything."""
    train("run", "steps=3", "prior=prediction", "text=lora", "text.encoders=both", "text.encoder_lr=0.1", "lr=1e-9")
    first, *later = losses("run", "prior_loss")
    assert first < 1e-9 and min(later) > 1e-6


def test_the_priors_batch_is_its_own_and_seen_whole_under_the_names_of_the_class(tmp_path):
    """Other draws than the character's, no mask, no dropped caption, no trigger."""
    config = compose(*FAST, *PREDICTION, "prior.class_noun='round thing'")
    training, data, base = encoded(f"loss.mask={cut_out(tmp_path / 'left', (0, 0, 64, 128))}")
    encoder, loss_objective = Encoder(base, training.device, Cache(None), False), objective(config.loss, base)
    of_class = class_data(config, training, data, encoder)
    which = {"seed": 0, "step": 0, "part": 0, "parts": 1, "batch_size": 2, "objective": loss_objective}
    prior, mine = of_class.batch(**which), data.batch(**which, caption_dropout=1.0)
    assert mine.mask is not None and mine.prior_weight is None and prior.mask is None and prior.prior_weight == 1
    assert not torch.equal(prior.noise, mine.noise) and not torch.equal(prior.timesteps, mine.timesteps)
    empty = data.empty["prompt_embeds"]
    assert torch.equal(mine.conditioning["prompt_embeds"][0], empty)
    assert not any(torch.equal(embeds, empty) for embeds in prior.conditioning["prompt_embeds"])
    named = [sample.captions[0].replace("HANA_TOFU", "round thing") for sample in training.files.samples]
    embedded, _ = encoder.encode_texts(named)
    for example, text in zip(of_class.data.examples, named, strict=True):
        assert "round thing" in text and torch.equal(
            example.texts[0][0]["prompt_embeds"], embedded[text]["prompt_embeds"]
        )


def test_a_prior_that_makes_no_sense_is_refused_before_the_base_loads(others, monkeypatch):
    monkeypatch.setattr("lora_lab.training.base_context.load_base", None)
    captioned = Path(shutil.copytree(others, others.with_name("captioned")))
    for picture in captioned.glob("*.png"):
        picture.with_suffix(".txt").write_text("A HANA_TOFU")
    damaged = Path(shutil.copytree(others, others.with_name("damaged")))
    (damaged / "other-1.png").write_bytes((TOFU / "00.png").read_bytes()[:900])
    (others.with_name("empty")).mkdir()
    pictures = "prior=pictures"
    for how, sentence in (
        (["prior=generated"], r"prior\.prompt is missing: prior=generated needs it"),
        (["prior=generated", "prior.prompt=' '"], r"prior\.prompt is missing"),
        ([pictures], r"prior\.root is missing"),
        (
            ["prior.weight=2"],
            r"prior\.weight=2\.0: weight belongs to prior=pictures or prior=generated or prior=prediction",
        ),
        (["prior.class_noun=dog"], r"prior\.class_noun=dog: class_noun belongs to prior=prediction, set that too"),
        ([*PREDICTION, "prior.weight=-1"], r"prior\.weight=-1\.0: weight must be at least 0"),
        ([*PREDICTION, "prior.weight=nan"], r"prior\.weight=nan"),
        ([*GENERATED, "prior.number=0"], r"prior\.number=0: number must be at least 1"),
        ([*GENERATED, "prior.seed=-1"], r"prior\.seed=-1: seed must be at least 0"),
        ([*PREDICTION, "prior.class_noun='a HANA_TOFU'"], r"prior\.class_noun=a HANA_TOFU: the trigger HANA_TOFU is"),
        ([*GENERATED, "prior.prompt='a HANA_TOFU'"], r"prior\.prompt=a HANA_TOFU: the trigger HANA_TOFU is"),
        ([pictures, "prior.root=nowhere"], r"prior\.root=nowhere: there is no such"),
        ([pictures, f"prior.root={others.with_name('empty')}"], r"no pictures in .*empty: point prior\.root at"),
        (
            [pictures, f"prior.root={others}"],
            r"prior\.root: no captions in .*others.*or set one caption .* prior\.prompt=",
        ),
        ([pictures, f"prior.root={captioned}"], r"prior\.root: the caption of .*other-0\.png has the trigger"),
        ([pictures, "prior.root=../tofu", "prior.prompt=a"], r"prior\.root: .*00\.png is in dataset\.root too"),
        ([pictures, f"prior.root={damaged}", "prior.prompt=a"], r"other-1\.png is cut off or damaged"),
    ):
        with pytest.raises(InputError, match=sentence) as caught:
            train("run", "steps=1", *how)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
