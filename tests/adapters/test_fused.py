"""Attention with its LoRA fused computes what peft's layers compute."""

from copy import deepcopy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import Linear

from lora_lab.adapters.fused import FusedAttention, FusedLinear, fuse
from lora_lab.base.load import load_base
from lora_lab.launch.config import compose
from lora_lab.training.lora_training import FlatParams

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def base():
    return load_base(compose("stage=train").model, torch.device("cpu")).network


@pytest.fixture
def unet(base):
    return deepcopy(base)


def learner(unet, **settings):
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 3, "target_modules": ATTENTION} | settings))
    for name, parameter in unet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trained = [(name, p) for name, p in unet.named_parameters() if p.requires_grad]
    return FlatParams([p for _, p in sorted(trained, key=lambda each: ".lora_B." in each[0])], torch.float32)


def ask(unet):
    source = torch.Generator().manual_seed(1)
    conditions = {"text_embeds": torch.randn(2, 128, generator=source), "time_ids": torch.full((2, 6), 128.0)}
    noisy, text = torch.randn(2, 4, 16, 16, generator=source), torch.randn(2, 77, 256, generator=source)
    return unet(noisy, torch.tensor([50, 700]), text, added_cond_kwargs=conditions, return_dict=False)[0]


def unfuse(unet):
    unet.set_attn_processor(AttnProcessor2_0())
    for module in unet.modules():
        if isinstance(module, FusedLinear):
            module.__class__ = Linear


def answer(unet, learnt):
    drawn = ask(unet)
    drawn.square().mean().backward()
    learnt.accumulate_grads()
    gradient = learnt.master.grad.clone()
    learnt.master.grad.zero_()
    return drawn.detach(), gradient


def fused_layers(unet) -> tuple[int, int]:
    """How many attentions are fused, and how many single layers."""
    processors = unet.attn_processors.values()
    return sum(isinstance(p, FusedAttention) for p in processors), sum(
        isinstance(module, FusedLinear) for module in unet.modules()
    )


@pytest.mark.parametrize(
    ("settings", "single"),
    [({}, 22), ({"use_rslora": True}, 22), ({"target_modules": [*ATTENTION, "ff.net.2"]}, 33)],
)
def test_output_and_gradient_are_those_of_peft(unet, settings, single):
    learnt = learner(unet, **settings)
    unet.train()
    drawn, gradient = answer(unet, learnt)
    fuse(unet, learnt)
    assert fused_layers(unet) == (22, single)
    fused_drawn, fused_gradient = answer(unet, learnt)
    assert torch.allclose(drawn, fused_drawn, atol=1e-5)
    assert (gradient - fused_gradient).norm() < 1e-5 * gradient.norm()


def test_an_update_reaches_the_fused_and_the_plain_layers(unet):
    learnt = learner(unet)
    fuse(unet, learnt)
    before = ask(unet).detach()
    with torch.no_grad():
        learnt.master.mul_(1.5)
    learnt.copy_to_model()
    fused = ask(unet).detach()
    assert not torch.allclose(before, fused, atol=1e-3)
    unfuse(unet)
    assert torch.allclose(fused, ask(unet), atol=1e-5)
    ups = [value.flatten() for key, value in get_peft_model_state_dict(unet).items() if "lora_B" in key]
    assert torch.equal(torch.cat(ups), learnt.master.detach()[-sum(map(len, ups)) :])


def test_without_the_adapter_in_training_the_base_is_untouched(unet):
    learnt = learner(unet)
    fuse(unet, learnt)
    unet.disable_adapters()
    bare = ask(unet).detach()
    unfuse(unet)
    assert torch.equal(bare, ask(unet))
    unet.enable_adapters()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_layers_with_more_than_a_plain_lora_are_left_to_peft(unet, settings):
    fuse(unet, learner(unet, **settings))
    assert fused_layers(unet) == (0, 0)


def test_projections_of_different_rank_are_not_fused(unet):
    learnt = learner(unet, rank_pattern={"to_k": 2})
    drawn, gradient = answer(unet, learnt)
    fuse(unet, learnt)
    assert fused_layers(unet) == (0, 4 * 22)
    fused_drawn, fused_gradient = answer(unet, learnt)
    assert torch.allclose(drawn, fused_drawn, atol=1e-5)
    assert (gradient - fused_gradient).norm() < 1e-5 * gradient.norm()
