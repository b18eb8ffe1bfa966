"""Training text encoders and new tokens for the trigger, on the bundled tiny base."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import checkpointed, inside, interrupt_at
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_lab.adapters.files import embeddings_path, find_lora
from lora_lab.adapters.inject import lora_attached
from lora_lab.adapters.tokens import installed_tokens, tokenizers_of
from lora_lab.base.encode import Cache, Encoder
from lora_lab.base.load import load_base
from lora_lab.demo import BASE, PHOTOS, TOFU
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.training.data import encode_dataset
from lora_lab.training.engine import build_single_step
from lora_lab.training.loss import Batch, objective, per_sample_loss
from lora_lab.training.resolve import resolve_training
from lora_lab.training.text_encoders import inject_text_adapters
from lora_lab.training.trainer import build_training

# Four of the tofu pictures, encoded once for all tests.
FAST = (
    "stage=train", "dataset=folder", "dataset.root=../tofu", "cache=../cache", "refiner=off", "device=cpu",
    "tracker=off", "model.judge=null", "rank=4", "batch_size=2", "sampler.steps=1", "stage.save_dtype=fp32",
    "stage.prompts=['A {trigger} with a green background']", "stage.validate_every=0",
)  # fmt: skip
ALL = ("text=pivotal", "text.encoders=both")
PROMPT = "A HANA_TOFU with a green background"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("tofu")
    rows = [row for row in (TOFU / "metadata.jsonl").read_text().splitlines() if json.loads(row)["file_name"] < "04"]
    (root / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    for i in range(4):
        shutil.copy(TOFU / f"{i:02d}.png", root)
    return root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, pictures):
    with inside(tmp_path, pictures):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    """Everything learns for four steps; half the way the tokens stop. A checkpoint after every step."""
    with inside(tmp_path_factory.mktemp("trained"), pictures) as folder:
        train("run", *ALL, *EVERY_STEP, "stage.validate_every=2", "stage.ema_decay=0.5")
    return folder


EVERY_STEP = ("steps=4", "stage.checkpoint_every=1", "stage.keep_checkpoints=9")


def train(folder: str, *overrides: str):
    return run_stage(compose(*FAST, *overrides), Path(folder).absolute())


def injected(base, config, adapter):
    return inject_text_adapters(base, CPU, config.text, config.trigger, config.seed, adapter)


class Prepared:
    """A run up to its first step."""

    def __init__(self, *overrides: str):
        self.config = compose(*FAST, *overrides)
        resolved = resolve_training(self.config, Path("run"))
        self.base = load_base(self.config.model, CPU)
        self.base.text_window = self.config.text.window
        self.pipe = self.base.pipe
        tokenizers = tokenizers_of(self.base, "HANA_TOFU", self.config.text.tokens)
        encoder = Encoder(self.base, CPU, Cache(Path(self.config.cache)), False, tokenizers)
        self.data = encode_dataset(resolved.files.samples, resolved.images.crops, resolved.files.texts, False, encoder)
        self.objective = objective(self.config.loss, self.base)
        text_encoders = injected(self.base, self.config, resolved.adapter)
        self.training = build_training(self.pipe.unet, self.objective, resolved, text_encoders)

    def batch(self, step=0, dropout=0.0):
        return self.data.batch(
            seed=0, step=step, part=0, parts=1, batch_size=2, objective=self.objective, caption_dropout=dropout
        )


def pooled_of(run: Prepared) -> torch.Tensor:
    """The pooled text of the run's batch, by the text encoders in training."""
    return run.training.text_encoders(run.batch()).conditioning["pooled_prompt_embeds"]


def losses_of_one_batch(*overrides: str) -> list[float]:
    """What four steps on the same pictures and noise make of the loss, the UNet staying as it is."""
    run = Prepared("lr=1e-12", *overrides)
    engine = build_single_step(run.training, run.config.memory, "off", None, base_is_prior=False)
    losses = []
    for _ in range(4):
        losses.append(engine.backward(run.batch()).item())
        run.training.clip_and_update()
        engine.sync_weights()
    return losses


def learnt(folder: Path | str, step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint has of the text encoders."""
    its = checkpointed(f"{folder}/checkpoints/step-{step:06d}")
    return {name: numbers for name, numbers in its.items() if not name.startswith("unet.")}


def moved(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {key for key in one if not torch.equal(one[key], other[key])}


def notes(file: str) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "parts"),
    [("none", 0), ("first", 12 * 2), ("second", 16 * 2), ("both", 28 * 2)],
)
def test_the_text_encoders_that_are_asked_for_get_a_lora(how, parts):
    if how == "none":
        assert list(Prepared("text.tokens=1").training.adapted_components) == ["unet"]
        return
    run = Prepared(f"text.encoders={how}")
    names = {"first": ["text_encoder"], "second": ["text_encoder_2"], "both": ["text_encoder", "text_encoder_2"]}
    assert list(run.training.adapted_components) == ["unet", *names[how]]
    found = [n for p in names[how] for n, q in getattr(run.pipe, p).named_parameters() if q.requires_grad]
    assert len(found) == parts and all(".self_attn." in name for name in found)


def test_each_has_its_rate_and_lora_plus_its_ratio_in_each():
    run = Prepared(
        *ALL, "lr=1e-3", "text.encoder_lr=2e-4", "text.token_lr=5e-3", "stage.lora_plus_ratio=16",
        "schedule.name=linear", "steps=4", "text.encoder_stop=0.5", "text.token_stop=1",
    )  # fmt: skip
    groups, expected = run.training.optimizer.param_groups, [1e-3, 16e-3, 2e-4, 32e-4, 2e-4, 32e-4, 5e-3]
    assert [group["lr"] for group in groups] == pytest.approx(expected)
    assert [group["weight_decay"] for group in groups] == [0.01] * 6 + [0.0]
    assert run.training.current_lr() == 1e-3
    for share in (0.75, 0.5, 0.25):
        run.training.optimizer.step()
        run.training.schedule.step()
        on = [1, 1, *[share > 0.5] * 4, 1]  # until step 2 of 4
        rates = [share * rate * is_on for rate, is_on in zip(expected, on, strict=True)]
        assert [group["lr"] for group in groups] == pytest.approx(rates)
    assert Prepared("text=lora", "lr=1e-3").training.optimizer.param_groups[1]["lr"] == 1e-3


def test_what_has_stopped_shortens_no_others_gradient():
    run = Prepared("text=pivotal", "steps=2", "text.token_stop=0.5", "stage.max_grad_norm=null")
    tokens = sum(vectors.numel() for vectors in (t.vectors for t in run.training.text_encoders.tokens.values()))
    assert tokens == 2 * (96 + 160)
    for counted in (len(run.training.params.master), len(run.training.params.master) - tokens):
        run.training.params.master.grad.fill_(1.0)
        assert run.training.clip_and_update().grad_norm.item() == pytest.approx(counted**0.5)


@pytest.mark.parametrize(
    "how",
    [
        "text=lora text.encoder_lr=1e-2",
        pytest.param("text=pivotal text.token_lr=0.1 text.token_stop=1", marks=pytest.mark.slow),
    ],
)
def test_the_text_alone_can_lower_the_loss(how):
    losses = losses_of_one_batch(*how.split())
    assert losses[-1] < losses[0] - 1e-4
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("limit", [77, pytest.param(225, marks=pytest.mark.slow)])
def test_a_step_reads_texts_as_inference_does_and_waits_for_no_number(limit):
    run = Prepared("text=lora", f"text.max_tokens={limit}")
    batch = run.batch()
    read = run.training.text_encoders(batch)
    texts = [example.texts[0][0] for example in run.data.examples]
    captions = [row["text"] for row in map(json.loads, Path("../tofu/metadata.jsonl").read_text().splitlines())]
    ids = batch.conditioning["input_ids"]
    for i in range(2):
        which = next(k for k, text in enumerate(texts) if torch.equal(text["input_ids"], ids[i]))
        (alone,) = run.base.encode_texts(captions[which : which + 1], CPU, False)  # the LoRA's B is zero yet
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            assert torch.allclose(alone[name], read.conditioning[name][i], atol=1e-5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {name: mode.from_tensor(value) for name, value in batch.tensors().items()}
        fake = run.training.text_encoders(Batch.from_tensors(inputs)).conditioning
    assert fake["prompt_embeds"].shape == (2, run.base.text_window, 256)
    assert fake["pooled_prompt_embeds"].shape == (2, 128)


@pytest.mark.slow
def test_a_caption_left_out_is_what_inference_takes_for_no_prompt():
    run = Prepared("text=pivotal")
    read = run.training.text_encoders(run.batch(dropout=1.0)).conditioning
    assert not read["prompt_embeds"].any() and not read["pooled_prompt_embeds"].any()
    assert pooled_of(run).any(dim=1).all()
    run.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    encoder = Encoder(run.base, CPU, Cache(None), False, run.base.tokenizers)
    empty = encode_dataset([], [], [], False, encoder).empty
    (encoded,) = run.base.encode_texts([""], CPU, False)
    batch = run.batch()
    conditioning = batch.conditioning | {name: value.expand(2, *value.shape) for name, value in empty.items()}
    read = run.training.text_encoders(replace(batch, conditioning=conditioning)).conditioning
    assert torch.allclose(read["prompt_embeds"][0], encoded["prompt_embeds"], atol=1e-5)


@pytest.mark.slow
def test_new_tokens_begin_as_a_word_or_with_the_tables_statistics():
    run = Prepared("text.tokens=3", "text.tokens_from=tofu hat")
    table = load_base(run.config.model, CPU).pipe.text_encoder.get_input_embeddings().weight
    words = run.pipe.tokenizer("tofu hat", add_special_tokens=False).input_ids
    vectors = run.training.text_encoders.tokens["clip_l"].vectors
    assert torch.equal(vectors, table[[words[i % len(words)] for i in range(3)]])
    drawn, other = (
        Prepared("text.tokens=50", *s).training.text_encoders.tokens["clip_l"].vectors.data for s in ((), ("seed=1",))
    )
    assert not torch.equal(drawn, other)
    assert drawn.std() == pytest.approx(table.std().item(), rel=0.1)
    assert (drawn.mean(0) - table.mean(0)).abs().mean() < 0.3 * table.std()


@pytest.mark.slow
def test_a_new_token_is_no_end_of_text():
    """SDXL's second encoder says 2, and transformers then takes the largest id for the end."""
    run = Prepared("text=pivotal")
    pooled = pooled_of(run)
    run.pipe.text_encoder_2.text_model.eos_token_id = 2
    assert not torch.allclose(pooled_of(run), pooled)
    base = load_base(run.config.model, CPU)
    base.pipe.text_encoder_2.text_model.eos_token_id = 2
    adapter = resolve_training(run.config, Path("run")).adapter
    read = injected(base, run.config, adapter)(run.batch())
    assert torch.equal(read.conditioning["pooled_prompt_embeds"], pooled)


def test_what_stops_stays_exactly_and_the_rest_goes_on(trained):
    first, half, end = (learnt(trained / "run", step) for step in (1, 2, 4))
    tokens = {key for key in first if key.endswith(".vectors")}
    assert len(tokens) == 2 and tokens <= moved(first, half)
    # Nothing of the first encoder's last layer reaches the UNet, as in every SDXL; only weight decay moves it.
    last = {key for key in first if key.startswith("text_encoder.encoder.layers.2.") and "lora_B" in key}
    assert len(last) == 4 and moved(half, end) == first.keys() - tokens - last


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw8bit", "lion8bit", "adafactor", "came"])
def test_every_optimizer_leaves_what_stops_exactly(optimizer):
    train("run", *ALL, "text.encoder_stop=0.5", *EVERY_STEP, f"optimizer={optimizer}", "schedule=cosine")
    assert moved(learnt("run", 1), learnt("run", 2)) and not moved(learnt("run", 2), learnt("run", 4))


def test_validation_is_what_plain_diffusers_draws_with_both_files(trained):
    file = trained / "models" / "lora" / "HANA_TOFU.safetensors"
    embeddings = load_file(str(embeddings_path(file)))
    assert embeddings_path(file).name == "HANA_TOFU_emb.safetensors"
    assert {key: tuple(value.shape) for key, value in embeddings.items()} == {"clip_l": (2, 96), "clip_g": (2, 160)}
    state = load_file(str(file))
    assert {key[:10] for key in state} == {"lora_unet_", "lora_te1_t", "lora_te2_t"}
    assert all(state[key].any() for key in state if "te" in key and ".alpha" not in key and "layers_2" not in key)
    assert notes(str(file))["ss_text_encoder_lr"] == "0.001" and notes(str(file))["lora_lab_tokens"] == "2"
    shown = np.asarray(Image.open(trained / "run" / "samples" / "step-000004" / "p0-s0.png"))

    def drawn(pipe, prompt):
        noise = torch.Generator("cpu").manual_seed(0)
        return np.asarray(pipe(prompt, width=128, height=128, num_inference_steps=1, generator=noise).images[0])

    pipe = StableDiffusionXLPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    before = drawn(pipe, PROMPT)
    pipe.load_lora_weights(str(file))
    without = drawn(pipe, PROMPT)
    names = ["<s0>", "<s1>"]
    first, second = (pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2)
    for key, (encoder, tokenizer) in {"clip_l": first, "clip_g": second}.items():
        pipe.load_textual_inversion(embeddings[key], token=names, text_encoder=encoder, tokenizer=tokenizer)
    assert np.array_equal(drawn(pipe, PROMPT.replace("HANA_TOFU", "<s0><s1>")), shown)
    assert not np.array_equal(without, shown) and not np.array_equal(before, without)


def test_a_file_is_found_with_its_embeddings_and_never_taken_for_them(trained, monkeypatch):
    monkeypatch.chdir(trained)
    assert find_lora("HANA_TOFU").name == "HANA_TOFU.safetensors"
    shutil.copytree("run", "killed")  # before it wrote its result
    Path("killed/result.json").unlink(missing_ok=True)
    assert find_lora("killed").name == "HANA_TOFU.safetensors"
    Path("killed/lora/HANA_TOFU.safetensors").unlink()
    Path("killed/lora/HANA_TOFU_emb.safetensors").unlink()
    assert find_lora("killed").name == "HANA_TOFU-000002.safetensors"
    with pytest.raises(InputError, match=r"models/lora has HANA_TOFU$"):
        find_lora("nothing")


@pytest.mark.slow
def test_img2img_draws_with_the_embeddings_and_misses_them(trained):
    shutil.copytree(trained / "models", "models")
    file = Path("models/lora/HANA_TOFU.safetensors")

    def drawn(folder, *more):
        asked = ("stage=img2img", "device=cpu", "sampler.steps=2", f"stage.photo={sorted(PHOTOS.glob('*.png'))[0]}")
        result = run_stage(compose(*asked, "lora=HANA_TOFU", f"stage.prompt={PROMPT}", *more), Path(folder).absolute())
        return np.asarray(Image.open(result.pictures[0].picture))

    right, emb = drawn("right"), load_file(str(embeddings_path(file)))
    save_file({key: -value for key, value in emb.items()}, str(embeddings_path(file)))
    assert not np.array_equal(drawn("wrong"), right)
    save_file({key: value[:1] for key, value in emb.items()}, str(embeddings_path(file)))
    with pytest.raises(InputError, match="does not hold the embeddings of 2 new tokens"):
        drawn("short")
    embeddings_path(file).unlink()
    with pytest.raises(InputError, match=r"trigger HANA_TOFU is 2 new tokens, .*HANA_TOFU_emb.safetensors: put"):
        drawn("without")


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ALL], ids=["frozen", "all"])
def test_the_end_of_a_long_text_is_learnt_and_drawn_and_the_file_says_so(how, capsys):
    def learnt(folder, end, *more):
        caption = f"dataset.caption_suffix='{'with ' * 80}{end}'"
        return load_file(train(folder, "steps=2", "publish=false", caption, *how, *more).lora)

    def drawn(folder, end, *more):
        photo = f"stage.photo={sorted(PHOTOS.glob('*.png'))[0]}"
        prompt = f"stage.prompt='A {{trigger}} {'with ' * 80}{end}'"
        asked = ("stage=img2img", "device=cpu", "sampler.steps=2", "lora=long", "dataset=folder", photo, prompt)
        result = run_stage(compose(*asked, *more), Path(folder).absolute())
        return np.asarray(Image.open(result.pictures[0].picture))

    assert not moved(learnt("cut", "a hat"), learnt("also_cut", "the sea"))
    assert how or "CLIP reads 77, so shorten it or set text.max_tokens=150" in capsys.readouterr().out  # said once
    assert moved(learnt("long", "a hat", "text.max_tokens=150"), learnt("other", "the sea", "text.max_tokens=150"))
    assert "CLIP reads" not in capsys.readouterr().out
    assert notes("long/lora/HANA_TOFU.safetensors")["ss_max_token_length"] == "150"
    assert "ss_max_token_length" not in notes("cut/lora/HANA_TOFU.safetensors")
    first = drawn("hat", "a hat")
    assert "trained with text.max_tokens=150" in capsys.readouterr().out
    assert not np.array_equal(first, drawn("sea", "the sea"))
    assert np.array_equal(drawn("hat_77", "a hat", "text.max_tokens=77"), drawn("sea_77", "sea", "text.max_tokens=77"))
    with pytest.raises(InputError, match=r"text\.max_tokens=150, not 77"):
        train("long", "steps=3", f"dataset.caption_suffix='{'with ' * 80}a hat'", *how, "resume=long")


@pytest.mark.slow
def test_publishing_moves_an_older_file_with_its_embeddings(trained):
    shutil.copytree(trained / "models", "models")
    old = load_file("models/lora/HANA_TOFU_emb.safetensors")
    train("plain", "steps=1")
    assert {file.name for file in Path("models/lora").iterdir()} == {
        "HANA_TOFU.safetensors", "HANA_TOFU.1.safetensors", "HANA_TOFU.1_emb.safetensors",
    }  # fmt: skip
    assert not moved(load_file("models/lora/HANA_TOFU.1_emb.safetensors"), old)
    assert "lora_lab_tokens" not in notes("models/lora/HANA_TOFU.safetensors")


@pytest.mark.slow
def test_wearing_a_file_leaves_nothing_behind(trained):
    file, run = trained / "models" / "lora" / "HANA_TOFU.safetensors", Prepared(*ALL)
    base, pipe, before = run.base, run.pipe, run.training.text_encoders(run.batch()).tensors()
    own, put = base.tokenizers, installed_tokens(base)
    learning = [p for part in run.training.components.values() for p in part.parameters() if p.requires_grad]
    places = [p.data_ptr() for part in run.training.components.values() for p in part.parameters()]
    for lora in (file, None):
        with lora_attached(base, lora):
            count = len(pipe.tokenizer) - len(own[0])
            assert count == (2 if lora else 0) and bool(installed_tokens(base)) == bool(lora)
            assert not any(pipe.text_encoder.get_input_embeddings() is tokens for tokens in put.values())
    assert base.tokenizers == own and installed_tokens(base) == put
    after = run.training.text_encoders(run.batch())
    # Where a captured step reads and writes.
    assert [p.data_ptr() for part in run.training.components.values() for p in part.parameters()] == places
    assert all(torch.equal(value, before[name]) for name, value in after.tensors().items())
    assert [p for part in run.training.components.values() for p in part.parameters() if p.requires_grad] == learning
    assert per_sample_loss(pipe.unet, run.objective, after).requires_grad
    base = load_base(run.config.model, CPU)
    (plain,) = base.encode_texts([PROMPT], CPU, False)
    with lora_attached(base, file):
        (attached,) = base.encode_texts([PROMPT], CPU, False)
        assert not torch.equal(attached["pooled_prompt_embeds"], plain["pooled_prompt_embeds"])
    (again,) = base.encode_texts([PROMPT], CPU, False)
    assert torch.equal(again["prompt_embeds"], plain["prompt_embeds"])


@pytest.mark.slow
def test_a_run_of_all_goes_on_to_the_bit(trained, monkeypatch):
    """Without the validation pictures of the one that was not stopped, which so change nothing either."""
    how = [*ALL, "steps=4", "stage.ema_decay=0.5"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(1, patch)
        train("cut", *how)
    train("cut", *how, f"resume={Path('cut').absolute()}")
    for name in ("HANA_TOFU", "HANA_TOFU_emb"):
        one, other = (load_file(f"{at}/lora/{name}.safetensors") for at in ("cut", trained / "run"))
        assert not moved(one, other)
    for change, named in (("text.token_lr=1", "text.token_lr"), ("text.encoder_lr=1", "text.encoder_lr")):
        with pytest.raises(InputError, match=f"trained with {named}"):
            train("cut", *how, change, f"resume={Path('cut').absolute()}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "optimizer=adamw8bit stage.lora_plus_ratio=4 adapter.lora_dropout=0.2 stage.caption_dropout=0.5",
        "optimizer=adafactor schedule=cosine memory=balanced",
        "optimizer=schedule_free text.token_stop=1 stage.gradient_accumulation=2",
        "adapter=lokr text.encoders=none model.precision=bf16",
    ],
)
def test_other_choices_learn_and_go_on_to_the_bit(how, monkeypatch):
    how = [*ALL, *how.split(), "steps=4", "stage.validation_loss_every=2"]
    train("whole", *how)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(3, patch)
        train("cut", *how)
    train("cut", *how, f"resume={Path('cut').absolute()}")
    for name in ("HANA_TOFU", "HANA_TOFU_emb"):
        assert not moved(*(load_file(f"{run}/lora/{name}.safetensors") for run in ("cut", "whole")))
    assert (
        moved(learnt("whole", 4), learnt("cut", 3)) or "adapter=lokr" in how
    )  # there tokens alone, which have stopped


@pytest.mark.slow
def test_training_begins_with_what_the_files_hold(trained):
    file = trained / "models" / "lora" / "HANA_TOFU.safetensors"
    train("more", *ALL, "steps=1", "lr=1e-30", "text.token_lr=1e-30", f"stage.start_from={file}")
    state, begun = load_file(str(file)), load_file("more/lora/HANA_TOFU.safetensors")
    assert state.keys() == begun.keys() and all(torch.allclose(state[key], begun[key], atol=1e-9) for key in state)
    emb, begun = load_file(str(embeddings_path(file))), load_file("more/lora/HANA_TOFU_emb.safetensors")
    assert not moved(emb, begun)
    for how, named in (
        ("text=lora", r"has 2 new tokens for its trigger, but this run trains 0: set text\.tokens=2"),
        ("text=pivotal text.tokens=3", "has 2 new tokens"),
        ("text=pivotal", "but this run trains LoRA of rank 4 in"),
        ("text=pivotal text.encoders=first", "but this run trains LoRA of rank 4 in"),
    ):
        with pytest.raises(InputError, match=named):
            train("other", *how.split(), "steps=1", f"stage.start_from={file}")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("text.encoders=third", r"text\.encoders=third: encoders is one of none, first, second, both"),
        ("text.encoders=both text.encoder_lr=0", r"text\.encoder_lr=0.*above 0"),
        ("text=lora text.encoder_stop=0", r"text\.encoder_stop=0.*above 0"),
        ("text=lora text.encoder_stop=1.5", r"text\.encoder_stop=1\.5: encoder_stop must be above 0 and at most 1"),
        ("text=pivotal text.token_stop=2", r"text\.token_stop=2.*: token_stop must be above 0 and at most 1"),
        ("text=pivotal text.token_lr=-1", r"text\.token_lr=-1.*above 0"),
        ("text.max_tokens=100", r"text\.max_tokens=100: one of 77, 150, 225"),
        ("text.tokens=-1", r"text\.tokens=-1: tokens must be at least 0"),
        ("text.tokens=76", r"text\.tokens=76: a text has 75 tokens"),
        ("text.encoder_lr=1", r"text\.encoder_lr=1.*: no text encoder is trained, set text\.encoders=both"),
        ("text.encoder_stop=0.5", r"text\.encoder_stop=0\.5: no text encoder is trained"),
        ("text.tokens_from=tofu", r"text\.tokens_from=tofu: there are no new tokens, set text\.tokens=2"),
        ("text.tokens=1 text.tokens_from=' '", r"text\.tokens_from: name a word"),
        *(
            (f"text=lora adapter={kind}", "text encoders take LoRA and rsLoRA and no other kind")
            for kind in ("dora", "lokr", "pissa")
        ),
        ("text=lora optimizer=prodigy", "optimizer=Prodigy: finds one learning rate for all parameters"),
        ("text=pivotal optimizer=schedule_free", r"text\.token_stop=0\.5: AdamWScheduleFree saves an average"),
    ],
)
def test_what_cannot_be_is_refused_before_the_base_is_loaded(how, said, monkeypatch):
    monkeypatch.setattr("lora_lab.training.base_context.load_base", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(InputError, match=said) as caught:
        train("run", *(part for part in how.replace("' '", "'\u00a0'").split(" ")))
    assert "\n" not in str(caught.value)


def test_new_tokens_are_read_where_the_trigger_stands_and_nowhere_else():
    base = load_base(compose(*FAST).model, CPU)
    for copied, own in zip(tokenizers_of(base, "HANA_TOFU", 2), base.tokenizers, strict=True):
        assert copied.tokenize("A HANA_TOFU, waving") == ["a</w>", "<s0>", "<s1>", ",</w>", *own.tokenize("waving")]
        assert copied.tokenize("A tofu, waving") == own.tokenize("A tofu, waving")
        assert len(copied) == len(own) + 2
    base.tokenizers[0].add_tokens("<s1>")
    with pytest.raises(InputError, match="tokenizer has <s"):
        tokenizers_of(base, "HANA_TOFU", 2)
