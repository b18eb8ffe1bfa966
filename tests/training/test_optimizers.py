"""Every optimizer of conf/optimizer, as training uses it: on one tensor or on matrices, saved and resumed."""

import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_lab.launch.config import CONF, compose
from lora_lab.training.lora_training import FlatParams, LoRATraining
from lora_lab.training.resolve import resolve_optimizer

OPTIONS = sorted(file.stem for file in (CONF / "optimizer").glob("*.yaml"))
SETTINGS = {name: compose(f"optimizer={name}").optimizer for name in OPTIONS}


class Toy:
    """A model of two matrices and the LoRATraining that updates it."""

    def __init__(self, name, *, elementwise=None, ema_decay=0.0, **changes):
        settings = SETTINGS[name] | changes
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(80, 64, bias=False), nn.Linear(64, 80, bias=False))
        nn.init.zeros_(self.layers[1].weight)  # as a LoRA begins
        params = FlatParams(list(self.layers.parameters()), torch.float32)
        flat = settings["elementwise"] if elementwise is None else elementwise
        traits, make_optimizer = resolve_optimizer(settings, torch.device("cpu"))
        optimizer = make_optimizer([params.master] if flat else params.matrices())
        if traits.averages_weights:
            optimizer.train()
        unused = dict.fromkeys(("network", "network_name", "objective", "batch_size", "seed"))
        self.training = LoRATraining(
            params=params, optimizer=optimizer, optimizer_averages=traits.averages_weights,
            schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            settings=SimpleNamespace(max_grad_norm=1.0, ema_decay=ema_decay),
            average=params.master.detach().clone() if ema_decay else None, **unused,
        )  # fmt: skip

    def learn(self, start, end):
        """Steps whose numbers follow from their own; returns the losses."""
        losses = []
        for step in range(start, end):
            x = torch.randn(32, 80, generator=torch.Generator().manual_seed(step % 4))
            loss = (self.layers(x) - x).square().mean()
            loss.backward()
            self.training.params.accumulate_grads()
            self.training.clip_and_update()
            self.training.params.copy_to_model()
            losses.append(loss.item())
        return losses

    @property
    def numbers(self):
        return self.training.params.master.detach().clone()


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_8_bit_optimizers_equal_those_of_bitsandbytes(name):
    """But for their wait for the GPU in every step: tests/gpu/test_cuda_graph.py."""
    target = SETTINGS[name]["_target_"]
    assert target.startswith("lora_lab.")
    ours, theirs = Toy(name), Toy(name, _target_=f"bitsandbytes.optim.{target.rpartition('.')[2]}")
    for toy in (ours, theirs):
        toy.learn(0, 6)
    assert torch.equal(ours.numbers, theirs.numbers)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_optimizer_lowers_the_loss(name):
    more = {"d0": 1e-3} if name == "prodigy" else {"lr": 1e-3}  # its first rate takes hundreds of steps to grow
    losses = Toy(name, **more).learn(0, 60)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_saved_state_resumes_exactly(name):
    whole, first, second = Toy(name), Toy(name), Toy(name)
    whole.learn(0, 6)
    first.learn(0, 3)
    file = io.BytesIO()
    torch.save(first.training.optimizer.state_dict(), file)
    file.seek(0)
    second.training.params.load_(first.numbers)
    second.training.optimizer.load_state_dict(torch.load(file, weights_only=True))
    second.learn(3, 6)
    assert torch.equal(second.numbers, whole.numbers)


@pytest.mark.parametrize("name", OPTIONS)
def test_elementwise_optimizers_give_the_same_result_on_one_tensor(name):
    whole, apart = Toy(name, elementwise=True), Toy(name, elementwise=False)
    for toy in (whole, apart):
        toy.learn(0, 4)
    alike = torch.allclose(whole.numbers, apart.numbers, atol=1e-6)
    assert alike == SETTINGS[name]["elementwise"]


def fused(settings, device) -> bool:
    """What the optimizer for `device` got as `fused`; its parameters stay on the CPU."""
    return resolve_optimizer(settings, device)[1]([nn.Parameter(torch.zeros(1))]).defaults["fused"]


def test_adamw_is_fused_on_a_gpu_by_default():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    settings = SETTINGS["adamw"]
    assert [fused(settings, device) for device in (gpu, cpu)] == [True, False]
    assert fused(settings | {"fused": False}, gpu) is False


def test_swapping_in_a_schedule_free_average_changes_no_step():
    looked, alone = Toy("schedule_free"), Toy("schedule_free")
    alone.learn(0, 6)
    looked.learn(0, 3)
    walking = looked.numbers
    with looked.training.swap_in_saved_weights():
        average = looked.numbers
    z = looked.training.optimizer.state[looked.training.params.master]["z"]
    assert not torch.equal(average, walking)
    assert torch.allclose(walking, 0.1 * z + 0.9 * average, atol=1e-6)  # equation 3 of Defazio et al. 2024, beta 0.9
    assert torch.equal(looked.numbers, walking)
    looked.learn(3, 6)
    assert torch.equal(looked.numbers, alone.numbers)


def test_the_learning_rate_of_prodigy_includes_its_distance():
    toy = Toy("prodigy", d0=1e-3)
    assert toy.training.current_lr() == 1e-3
    toy.learn(0, 30)
    before, rate = toy.numbers, toy.training.current_lr()
    assert rate > 1e-3
    toy.learn(30, 31)
    group, state = toy.training.optimizer.param_groups[0], toy.training.optimizer.state[toy.training.params.master]
    bias = (1 - 0.999**31) ** 0.5 / (1 - 0.9**31)
    step = rate * bias * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["d"] * 1e-8)
    assert torch.allclose(before - toy.numbers, step, rtol=1e-3, atol=1e-7)


def test_the_average_of_the_weights_follows_the_formula():
    averaging, alone = Toy("adamw", ema_decay=0.3), Toy("adamw")
    average = alone.numbers
    for step in range(6):
        averaging.learn(step, step + 1)
        alone.learn(step, step + 1)
        assert torch.equal(averaging.numbers, alone.numbers)
        decay = min(0.3, (1 + step) / (10 + step))  # 0.1, 0.18, 0.25, then 0.3
        average = decay * average + (1 - decay) * alone.numbers
    with averaging.training.swap_in_saved_weights():
        assert torch.allclose(averaging.numbers, average, atol=1e-6)
    assert torch.equal(averaging.numbers, alone.numbers)
