"""A compiled network computes the same. Without the compiler of kernels, which needs a GPU."""

import os

import pytest
import torch

from lora_lab.base.load import load_base
from lora_lab.launch.config import compose
from lora_lab.training.engine import build_single_step, compile_blocks
from lora_lab.training.loss import objective
from lora_lab.training.resolve import resolve_training
from lora_lab.training.trainer import build_training

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "full"])
def test_a_compiled_network_has_the_same_gradient_in_few_graphs(how, tmp_path):
    from torch._dynamo.utils import counters

    def gradient(how: str) -> torch.Tensor:
        torch._dynamo.reset()
        counters.clear()
        config = compose("stage=train", "memory=balanced", "cache=null")
        base = load_base(config.model, CPU)
        training = build_training(base.network, objective(config.loss, base), resolve_training(config, tmp_path))
        build_single_step(training, config.memory, "off", None, base_is_prior=False)
        compile_blocks(training.network, how, None, backend="aot_eager")
        training.train()
        torch.manual_seed(1)
        text = torch.randn(1, 77, training.network.config.cross_attention_dim)
        conditions = {"text_embeds": torch.randn(1, 128), "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]])}
        drawn = training.network(
            torch.randn(1, 4, 16, 16), torch.tensor([500]), text, added_cond_kwargs=conditions
        ).sample
        drawn.square().mean().backward()
        return training.params.master.grad.clone()

    plain, compiled = gradient("off"), gradient(how)
    graphs = counters["stats"]["unique_graphs"]  # blocks of one width share theirs
    assert graphs <= {"blocks": 3, "full": 17}[how] and not counters["graph_break"]
    assert ((compiled - plain).norm() / plain.norm()).item() < 1e-4


@pytest.mark.parametrize(
    ("how", "kinds"),
    [
        ("off", set()),
        ("blocks", {"BasicTransformerBlock"}),
        ("full", {"BasicTransformerBlock", "ResnetBlock2D", "GroupNorm"}),
    ],
)
def test_the_engine_has_torch_compile_what_the_setting_says_into_the_cache(how, kinds, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restored afterwards, because the program sets it
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    resolved = resolve_training(compose("stage=train", f"compile={how}", f"cache={tmp_path / 'cache'}"), tmp_path)
    base = load_base(resolved.model, CPU)
    training = build_training(base.network, objective(resolved.loss, base), resolved)
    build_single_step(training, resolved.memory, resolved.compile, resolved.cache, base_is_prior=False)
    assert set(compiled) == kinds
    expected = str(tmp_path / "cache" / "compiled") if kinds else None
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == expected
