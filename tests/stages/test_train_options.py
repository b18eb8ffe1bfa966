"""What every option changes in what is learnt, and what an average, a rate of its own or an adapter's options do."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_runs import FAST, assert_same, checkpointed, encoded, lora, metrics, train

from lora_lab.adapters.inject import lora_attached
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.training.data import TrainingData
from lora_lab.training.lora_training import checkpoints
from lora_lab.training.loss import Batch, Objective, objective, per_sample_loss, predict

pytestmark = pytest.mark.usefixtures("elsewhere")


def in_the_file(key: str) -> str:
    """What a LoRA file calls a B matrix of a checkpoint."""
    layer = key.removeprefix("unet.").removesuffix(".lora_B.default.weight").replace(".", "_")
    return f"lora_unet_{layer}.lora_up.weight"


Measure = Callable[[str, str], float]  # of the folders of two runs, one with the option and one without


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return torch.cat([tensor.double().flatten() for tensor in tensors]).norm().item()


def tensors(run: str, name: str) -> list[torch.Tensor]:
    """Those of the LoRA file whose keys end with `name`."""
    return [value for key, value in lora(run).items() if key.endswith(name)]


def weight_updates(run: str) -> dict[str, torch.Tensor]:
    """What the LoRA adds to the weight of each linear layer: alpha / rank * B A."""
    saved = lora(run)
    stems = [key.removesuffix(".alpha") for key in saved if key.endswith(".alpha")]
    pairs = {stem: (saved[f"{stem}.lora_up.weight"], saved[f"{stem}.lora_down.weight"]) for stem in stems}
    return {s: saved[f"{s}.alpha"] / len(down) * up @ down for s, (up, down) in pairs.items() if up.ndim == 2}


def update_size(run: str, layer: str = "") -> float:
    return norm(value for stem, value in weight_updates(run).items() if layer in stem)


def similarity(changed: str, plain: str) -> float:
    """The cosine between what two LoRAs add to the weights."""
    one, other = (torch.cat([v.double().flatten() for v in weight_updates(run).values()]) for run in (changed, plain))
    return torch.cosine_similarity(one, other, dim=0).item()


def signs(changed: str, _: str) -> float:
    """The share of B's numbers that are as many learning rates from zero as three steps forward or back can be."""
    lengths = torch.cat([b.flatten() for b in tensors(changed, "lora_up.weight")]).abs() / 1e-3
    return ((lengths - 1).abs().minimum((lengths - 3).abs()) < 0.02).float().mean().item()


def batches_on(data: TrainingData, loss_objective: Objective, caption_dropout: float = 0.0) -> Iterator[Batch]:
    for step in range(4):
        yield data.batch(seed=11, step=step, part=0, parts=1, batch_size=2, objective=loss_objective,
                         caption_dropout=caption_dropout)  # fmt: skip


def movement(run: str, caption_dropout: float = 0.0) -> float:
    """How far the LoRA moves what the base predicts of the images with their captions, or without."""
    _, data, base = encoded()
    loss_objective = objective(compose(*FAST).loss, base)
    base.network.eval()
    with torch.no_grad():
        batches = list(batches_on(data, loss_objective, caption_dropout))
        before = [predict(base.network, loss_objective, batch) for batch in batches]
        with lora_attached(base, Path(run, "lora", "HANA_TOFU.safetensors")):
            return norm(predict(base.network, loss_objective, b) - old for b, old in zip(batches, before, strict=True))


def error(run: str, mirrored: bool) -> float:
    """The mean squared error on the images, all upright or all mirrored."""
    _, data, base = encoded("dataset.flip=true")
    loss_objective = objective(compose(*FAST, "loss=plain").loss, base)
    chosen = [replace(example, crops=[[crop[mirrored]] for crop in example.crops]) for example in data.examples]
    base.network.eval()
    with torch.no_grad(), lora_attached(base, Path(run, "lora", "HANA_TOFU.safetensors")):
        batches = batches_on(replace(data, examples=chosen), loss_objective)
        return sum(per_sample_loss(base.network, loss_objective, batch).sum().item() for batch in batches)


def times(number: Callable[[str], float]) -> Measure:
    """How many times as large the number of a run is with the option."""
    return lambda changed, plain: number(changed) / number(plain)


size = times(update_size)
size_of_queries = times(lambda run: update_size(run, "to_q") / update_size(run, "to_out"))
size_of_a, size_of_b, size_of_w1 = (
    times(lambda run, name=name: norm(tensors(run, name))) for name in ("lora_down.weight", "lora_up.weight", "lokr_w1")
)
layers = times(lambda run: len(tensors(run, ".alpha")))
numbers = times(lambda run: sum(value.numel() for value in lora(run).values()))
rank_of_queries = times(
    lambda run: len(next(v for key, v in lora(run).items() if key.endswith("to_q.lora_down.weight")))
)
first_loss, first_gradient = (times(lambda run, key=key: metrics(run)[0][key]) for key in ("loss", "grad_norm"))
moved = times(movement)
moved_without_caption = times(lambda run: movement(run, 1.0) / movement(run))
error_of_mirrored_images = times(lambda run: error(run, True) / error(run, False))

# The options of a run, what is measured of it beside a run without them, between what bounds, and why.
CHANGES = [
    ("seed=1", similarity, -0.1, 0.1, "A begins with other random numbers"),
    ("lr=2e-3", size, 1.8, 2.1, "Adam's steps are as long as the learning rate"),
    ("loss.snr_gamma=0.01", first_loss, 0.0, 0.2, "every timestep of a higher SNR weighs less"),
    ("loss=zero_snr", first_loss, 10, 100, "the base predicts noise, and is measured by the velocity"),
    ("stage.caption_dropout=1.0", moved_without_caption, 1.3, 3, "no caption is read in training"),
    ("schedule.warmup=2", size, 0.4, 0.6, "the factors of the three steps are 0, 1/2 and 1"),
    ("schedule=cosine", size, 0.6, 0.8, "the factors of the three steps are 1, 3/4 and 1/4"),
    ("adapter.lora_alpha=2", size, 0.45, 0.55, "alpha is half of the rank 4, and Adam moves B as far"),
    ("adapter.lora_dropout=0.5", first_gradient, 1.1, 2, "the inputs that stay count twice, which adds variance"),
    ("optimizer.weight_decay=0.5", size_of_a, 0.998, 0.999, "each of three steps takes lr * 0.5 of A"),
    ("optimizer=adamw8bit", similarity, 0.9999, 0.9999999, "it is AdamW up to the rounding of its state"),
    ("targets=ff", layers, 1.3, 1.5, "2 feed-forward layers join the 8 of attention, and there are projections"),
]  # fmt: skip
SLOW_CHANGES = [
    ("loss=huber", first_loss, 0.3, 0.9, "large errors count linearly"),
    ("loss.noise_offset=0.1", first_loss, 1.01, 1.2, "the base expects no offset"),
    ("optimizer=lion8bit", signs, 0.99, 1.0, "every step is one learning rate forward or back"),
    ("optimizer=adafactor", size, 0.75, 0.95, "the mean square of an update is at most 1, and there is no momentum"),
    ("optimizer=schedule_free", size, 0.5, 0.8, "the average over the steps is saved, which lies behind the last"),
    ("targets=all", layers, 1.8, 2.0, "convolutions and time embeddings join"),
    ("adapter.target_modules=.*attn2.*to_q", layers, 0.12, 0.13, "one layer of eight"),
    ("adapter.rank_pattern={to_q: 2}", rank_of_queries, 0.5, 0.5, "rank 2 instead of 4"),
    ("adapter.alpha_pattern={to_q: 1}", size_of_queries, 0.2, 0.3, "alpha 1 instead of 4"),
    ("adapter=rslora", size, 1.8, 2.1, "alpha is divided by 2, the root of the rank, instead of 4"),
    ("adapter=dora", moved, 1.05, 1.3, "the magnitudes of the weights are trained too"),
    ("adapter=pissa", moved, 1.5, 3, "A and B begin with the largest singular values, so neither gradient is zero"),
    ("adapter=loha", numbers, 1.9, 2.1, "a product of two LoRAs"),
    ("adapter=lokr", numbers, 0.1, 0.3, "a Kronecker product of small matrices"),
]  # fmt: skip
CHANGES_OF_OTHER_RUNS = [
    ("steps=12 lr=3e-3", "dataset.flip=true", error_of_mirrored_images, 0.8, 0.97, "half of the images are mirrored"),
    ("steps=3 optimizer.eps=1", "stage.max_grad_norm=0.001", size_of_b, 0.02, 0.05,
     "steps are proportional to gradients of norm 0.02 to 0.05"),
    *(("steps=1 targets=all adapter=dora", *row) for row in (
        ("adapter.use_rslora=true", moved, 1.5, 2.1, "alpha is divided by 2, the root of the rank, instead of 4"),
        ("adapter.alpha_pattern={to_q: 1}", size_of_queries, 0.2, 0.3, "alpha 1 instead of 4"),
    )),
    *(("steps=1 targets=ff adapter=pissa", *row) for row in (
        ("adapter.init_lora_weights=pissa_niter_1", size_of_b, 0.85, 0.97, "one iteration misses some of the values"),
        ("adapter.lora_dropout=0.5", first_loss, 1.1, 2, "dropout takes from the base's own weights"),
    )),
    *(("steps=1 targets=all adapter=loha", *row) for row in (
        ("adapter.alpha=2", moved, 0.45, 0.55, "alpha 2 instead of 4"),
        ("adapter.rank_dropout=0.5", first_gradient, 1.1, 2, "the rows that stay count twice, which adds variance"),
        ("adapter.use_effective_conv2d=true", numbers, 0.6, 0.8, "convolutions of 3x3 in Tucker form"),
    )),
    *(("steps=1 targets=all adapter=lokr", *row) for row in (
        ("adapter.decompose_factor=2", numbers, 2.5, 4, "the first matrix is 2x2, so the second is larger"),
        ("adapter.decompose_both=true", numbers, 0.9, 0.99, "the first matrix is a product too where that is smaller"),
        ("adapter.init_weights=lycoris", size_of_w1, 50, 500, "the second matrix begins at zero, not the first"),
    )),
]  # fmt: skip


def rows(table: list[tuple], slow: bool) -> list:
    return [pytest.param(*row, id=" ".join(row[:-4]), marks=pytest.mark.slow if slow else ()) for row in table]


@pytest.mark.parametrize(
    ("change", "measure", "low", "high", "why"), [*rows(CHANGES, slow=False), *rows(SLOW_CHANGES, slow=True)]
)
@pytest.mark.slow
def test_an_option_changes_what_is_learnt(change, measure, low, high, why, three_steps_run):
    train("changed", "steps=3", change)
    assert low <= measure("changed", three_steps_run) <= high, why


@pytest.mark.parametrize(("run", "change", "measure", "low", "high", "why"), rows(CHANGES_OF_OTHER_RUNS, slow=True))
def test_an_option_changes_what_another_run_learns(run, change, measure, low, high, why):
    train("plain", *run.split())
    train("changed", *run.split(), change)
    assert low <= measure("changed", "plain") <= high, why


@pytest.mark.slow
def test_prefix_and_suffix_are_learnt_as_if_they_stood_in_the_captions(own_pictures, three_steps):
    train("options", "steps=3", "dataset.caption_prefix='a drawing of'", "dataset.caption_suffix=', flat'")
    lines = [json.loads(line) for line in (own_pictures / "metadata.jsonl").read_text().splitlines()]
    written = [line | {"text": f"a drawing of {line['text']}, flat"} for line in lines]
    (own_pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    train("written", "steps=3", f"dataset.root={own_pictures}")
    assert_same(lora("options"), lora("written"))
    assert any(not torch.equal(value, three_steps[key]) for key, value in lora("written").items())


@pytest.mark.slow
def test_prodigys_own_rate_is_what_is_logged_and_shown(capsys):
    train("run", "steps=6", "optimizer=prodigy", "optimizer.d0=1e-3", "optimizer.d_coef=10")  # to grow early
    assert "Prodigy with its own lr, 1; lr=0.001 is not used" in capsys.readouterr().out
    rates = [line["lr"] for line in metrics("run")]
    assert rates[0] == 1e-3 and rates == sorted(rates) and rates[-1] > 1e-3
    with safe_open("run/lora/HANA_TOFU.safetensors", "pt") as file:
        assert file.metadata()["ss_learning_rate"] == "1.0"


def test_the_average_of_a_schedule_free_optimizer_is_what_is_saved():
    train("run", "steps=3", "optimizer=schedule_free")
    walking = checkpointed("run/checkpoints/step-000003")
    saved = {key: value for key, value in lora("run").items() if not key.endswith(".alpha")}
    key = next(key for key in walking if "lora_B" in key)
    name = in_the_file(key)
    average, last = saved[name], walking[key]
    assert not torch.equal(average, last)
    assert average.norm() < last.norm()  # it began at zero, and the average comes after


@pytest.mark.slow
def test_the_average_over_the_steps_is_saved_and_drawn_and_the_checkpoint_has_both(three_steps):
    train("run", "steps=3", "stage.ema_decay=0.99", "stage.checkpoint_every=1", "stage.keep_checkpoints=9")
    steps = [checkpointed(c) for c in checkpoints(Path("run"))]
    saved = lora("run")
    for key in (key for key in steps[0] if "lora_B" in key):
        name = in_the_file(key)
        average = torch.zeros_like(saved[name])  # as every LoRA begins
        for n, weights in enumerate(steps):
            average = average.lerp(weights[key], 1 - (1 + n) / (10 + n))
        assert torch.allclose(saved[name], average, atol=1e-7)
        assert torch.equal(steps[-1][key], three_steps[name])  # training itself is the one without
    train("plain", "steps=3")
    drawn, plain = (np.asarray(Image.open(f"{run}/samples/step-000003/p0-s0.png")) for run in ("run", "plain"))
    assert not np.array_equal(drawn, plain)


@pytest.mark.slow
def test_lora_plus_lets_b_learn_faster_and_leaves_a():
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


@pytest.mark.slow
def test_training_starts_from_a_lora_file_and_goes_on_only_with_that(uninterrupted):
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


@pytest.mark.slow
def test_a_file_that_training_cannot_start_from_is_refused(uninterrupted):
    with pytest.raises(InputError, match=r"stage\.start_from=nothing: no such file"):
        train("run", "steps=1", "stage.start_from=nothing")
    with pytest.raises(InputError, match=r"holds LoRA of rank 4 in \d+ layers, but this run trains LoRA of rank 8 in"):
        train("rank", "steps=1", "rank=8", f"stage.start_from={uninterrupted}")
    with pytest.raises(InputError, match="PiSSA starts from the base's weights"):
        train("pissa", "steps=1", "adapter=pissa", f"stage.start_from={uninterrupted}")
