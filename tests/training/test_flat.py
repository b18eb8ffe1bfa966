"""Trainable parameters in one piece of memory: the model sees views, the optimizer the float32 master."""

import pytest
import torch
from torch import nn

from lora_lab.training.lora_training import FlatParams


def model(dtype):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).to(dtype)
    return layers, FlatParams(list(layers.parameters()), dtype)


def one_step(layers, params, optimizer, most=None):
    layers(torch.ones(2, 6, dtype=params.model_copy.dtype)).float().square().sum().backward()
    params.accumulate_grads()
    norm = params.clip_grad_norm(most)
    optimizer.step()
    params.copy_to_model()
    return norm


def test_in_float32_it_trains_as_the_parameters_alone_do():
    layers, params = model(torch.float32)
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    optimizer, other = torch.optim.AdamW([params.master], lr=0.1), torch.optim.AdamW(alone.parameters(), lr=0.1)
    for _ in range(5):
        norm = one_step(layers, params, optimizer, most=0.5)
        alone(torch.ones(2, 6)).square().sum().backward()
        expected = nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
        other.step()
        other.zero_grad()
        assert norm == pytest.approx(expected.item(), rel=1e-5)
    for mine, theirs in zip(layers.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_in_bfloat16_small_updates_are_not_rounded_away():
    layers, params = model(torch.bfloat16)
    before = params.master.detach().clone()
    optimizer = torch.optim.SGD([params.master], lr=1e-7)
    for _ in range(3):
        one_step(layers, params, optimizer)
    assert layers[0].weight.dtype == torch.bfloat16
    assert torch.equal(layers[0].weight.detach().flatten().float(), before[:30].bfloat16().float())
    assert not torch.equal(params.master.detach(), before)


def test_gradients_of_several_batches_add_up_in_float32():
    layers, params = model(torch.bfloat16)
    x = torch.ones(2, 6, dtype=torch.bfloat16)
    layers(x).sum().backward()
    params.accumulate_grads()
    once = params.master.grad.clone()
    for _ in range(300):
        layers(x).sum().backward()
        params.accumulate_grads()
    assert torch.allclose(params.master.grad, 301 * once)  # bfloat16 stops counting at 256


def test_within_in_fp32_the_model_holds_the_float32_master_and_takes_new_weights():
    layers, params = model(torch.bfloat16)
    with torch.no_grad():
        params.master.add_(1e-5)
    with params.in_fp32():
        state = {name: value.clone() for name, value in layers.state_dict().items()}
        assert state["0.weight"].dtype == torch.float32
        assert torch.equal(state["0.weight"].flatten(), params.master.detach()[:30])
        layers.load_state_dict({name: value + 1 for name, value in state.items()})
    assert torch.equal(params.master.detach()[:30], state["0.weight"].flatten() + 1)
    assert torch.equal(layers[0].weight.detach(), (state["0.weight"] + 1).bfloat16())
    one_step(layers, params, torch.optim.SGD([params.master], lr=0.1))  # gradients still find their place
    assert not torch.equal(params.master.detach()[:30], state["0.weight"].flatten() + 1)


def test_loaded_weights_reach_the_model_and_gradients_stay():
    layers, params = model(torch.bfloat16)
    layers(torch.ones(2, 6, dtype=torch.bfloat16)).sum().backward()
    params.accumulate_grads()
    gradient, before = params.master.grad.clone(), params.master.detach().clone()
    params.load_(before + 1)
    assert torch.equal(layers[0].weight.detach().flatten(), (before[:30] + 1).bfloat16())
    params.load_(before)
    assert torch.equal(params.master.detach(), before) and torch.equal(params.master.grad, gradient)


def test_matrices_are_the_same_memory_in_their_shapes():
    layers, params = model(torch.float32)
    matrices = params.matrices()
    assert [m.shape for m in matrices] == [p.shape for p in layers.parameters()]
    layers(torch.ones(1, 6)).sum().backward()
    torch.optim.SGD(matrices, lr=1.0).step()
    params.copy_to_model()
    assert torch.equal(matrices[1], layers[0].bias)
    assert (params.master.grad == 0).all() and (matrices[0].grad == 0).all()
