"""Every kind of adapter: the file on a fresh base gives the outputs of training."""

import copy
import json
import re
from collections.abc import Iterable

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from safetensors.torch import load_file, save_file
from sdxl_structure import NARROW, outputs, pipeline

from lora_lab.adapters import inject
from lora_lab.adapters.files import describe, kohya_state, network_metadata, save_lora
from lora_lab.adapters.inject import load_adapter_weights, lora_attached
from lora_lab.base.layers import quantize_
from lora_lab.base.sdxl import SDXL
from lora_lab.errors import InputError
from lora_lab.launch.config import CONF, compose
from lora_lab.settings.setting import call_target

BASE = pipeline(NARROW)
FEW = r"(mid|up)_block.*transformer_blocks\.[01]\.attn.\.to_(q|out\.0)"
# Linear layers of several shapes, convolutions of 3x3 and 1x1, and with a step.
ALL = rf"{FEW}|down_blocks\.[01]\.(resnets|downsamplers)\.0\.(conv.*|time_emb_proj)|mid_block.*(proj_in|ff\.net.*proj)"
SCALES = {"alpha_pattern": {"mid_block.*attn1.to_q": 2.5}}
FEWER = sum(1 for name, _ in BASE.unet.named_modules() if re.fullmatch(FEW, name))
PATTERNS = {"rank_pattern": {"attn2.to_q": 1}} | SCALES
KINDS = {
    "LoRA": LoraConfig(r=2, lora_alpha=3, target_modules=ALL),
    "rsLoRA": LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=FEW, **SCALES),
    "by a regular expression": LoraConfig(r=2, lora_alpha=2, target_modules=r".*attn2\.to_[kv]"),
    "DoRA": LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=ALL),
    "DoRA with patterns": LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=FEW, **PATTERNS),
    "PiSSA": LoraConfig(r=2, lora_alpha=3, init_lora_weights="pissa", target_modules=FEW),
    "PiSSA, rank-stabilised": LoraConfig(
        r=3, lora_alpha=2, use_rslora=True, init_lora_weights="pissa_niter_4", target_modules=FEW, **SCALES
    ),
    "LoHa": LoHaConfig(r=2, alpha=3, target_modules=ALL),
    "LoHa in Tucker form": LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, target_modules=ALL, **PATTERNS),
    "LoKr": LoKrConfig(r=1, alpha=3, target_modules=ALL),
    "LoKr in Tucker form": LoKrConfig(r=1, alpha=3, use_effective_conv2d=True, target_modules=ALL),
    "LoKr of two low ranks": LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=ALL, **PATTERNS),
    "LoKr of whole matrices": LoKrConfig(r=64, alpha=300, decompose_factor=2, target_modules=FEW),
}  # fmt: skip


def taught(config, by=0.1):
    """A pipeline with the adapter in training, after an update of random numbers."""
    pipe = copy.deepcopy(BASE)
    torch.manual_seed(1)
    inject.inject_adapter(pipe.unet, copy.deepcopy(config))
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return pipe


def saved(pipe, config, file, dtype=torch.float32):
    state = kohya_state({"unet": pipe.unet}, SDXL.lora_key)
    return save_lora(file, state, dtype, network_metadata(config, state, 1.0))


def far(one, other):
    return (one - other).abs().max().item()


def some(plain: tuple[str, ...], kinds: Iterable[str]) -> list:
    """`kinds`, of which only `plain` are tried by the plain tests."""
    return [kind if kind in plain else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", some(("LoRA", "LoKr"), KINDS))
def test_the_file_on_a_fresh_base_gives_the_outputs_of_training(kind, tmp_path):
    config = KINDS[kind]
    pipe, base = taught(config), outputs(BASE)[2]
    file, trained = saved(pipe, config, tmp_path / "x.safetensors"), outputs(pipe)[2]
    assert far(trained, base) > 0.01
    plain = copy.deepcopy(BASE)
    with lora_attached(SDXL(plain), file):
        assert far(outputs(plain)[2], trained) < 2e-6
    assert torch.equal(outputs(plain)[2], base) and not plain.get_list_adapters()
    learning = {name for name, p in pipe.unet.named_parameters() if p.requires_grad}
    with lora_attached(SDXL(pipe), file):  # a validation picture in the middle of training
        assert far(outputs(pipe)[2], trained) < 2e-6
    with lora_attached(SDXL(pipe), None):
        assert torch.equal(outputs(pipe)[2], base)
    assert torch.equal(outputs(pipe)[2], trained)
    assert {name for name, p in pipe.unet.named_parameters() if p.requires_grad} == learning


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "LoKr"])
def test_a_file_for_another_base_is_named_and_leaves_the_base_clean(kind, tmp_path):
    pipe = taught(KINDS[kind])
    state = kohya_state({"unet": pipe.unet}, SDXL.lora_key)
    trained, plain = outputs(pipe)[2], copy.deepcopy(BASE)
    foreign = {key.replace("mid_block", "mid_block_7"): value for key, value in state.items()}
    wider = {key: value if value.ndim < 2 else torch.cat([value, value], dim=1) for key, value in state.items()}
    for name, broken in (("foreign", foreign), ("wider", wider)):
        file = save_lora(tmp_path / f"{name}.safetensors", broken, torch.float32, {})
        for somebody, before in ((plain, outputs(BASE)[2]), (pipe, trained)):
            with (
                pytest.raises(InputError, match=rf"{name}\.safetensors: does not fit"),
                lora_attached(SDXL(somebody), file),
            ):
                raise AssertionError("drew with a broken file")
            assert torch.equal(outputs(somebody)[2], before), name
    assert not plain.get_list_adapters() and pipe.get_list_adapters() == {"unet": ["default"]}


@pytest.mark.parametrize("kind", some(("LoRA",), ("LoRA", "DoRA", "LoHa", "LoKr")))
def test_fused_weights_give_the_same_outputs_and_are_restored(kind, tmp_path):
    config = KINDS[kind]
    pipe = taught(config)
    file = saved(pipe, config, tmp_path / "x.safetensors")
    for somebody, weight in ((copy.deepcopy(BASE), 0.5), (pipe, 1.0)):  # at inference, and in the middle of training
        unet, before = somebody.unet, outputs(somebody)[2]
        weights = {parameter: (parameter.data_ptr(), parameter.detach().clone()) for parameter in unet.parameters()}
        with lora_attached(SDXL(somebody), file, weight):
            apart = outputs(somebody)[2]
        with pytest.raises(KeyboardInterrupt), lora_attached(SDXL(somebody), file, weight, fuse=True):
            merged = [layer.merged_adapters for layer in unet.modules() if getattr(layer, "merged_adapters", [])]
            assert merged and all(names == ["attached"] for names in merged)
            assert far(outputs(somebody)[2], apart) < 2e-6
            raise KeyboardInterrupt
        assert torch.equal(outputs(somebody)[2], before)
        assert all(p.data_ptr() == place and torch.equal(p, kept) for p, (place, kept) in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr"])
@pytest.mark.parametrize("fuse", [False, True])
def test_a_weight_set_later_gives_the_outputs_of_attaching_with_it(kind, fuse, tmp_path):
    config, plain = KINDS[kind], copy.deepcopy(BASE)
    base = outputs(plain)[2]
    file, expected = saved(taught(config), config, tmp_path / "x.safetensors"), {}
    for weight in (1.0, 0.6, -0.3):
        with lora_attached(SDXL(plain), file, weight, fuse):
            expected[weight] = outputs(plain)[2]
    with lora_attached(SDXL(plain), file, fuse=fuse) as lora:
        places = [parameter.data_ptr() for parameter in plain.unet.parameters()]
        for weight in (0.6, 1.0, -0.3):
            lora.set_weight(weight)
            assert torch.equal(outputs(plain)[2], expected[weight])
        assert [parameter.data_ptr() for parameter in plain.unet.parameters()] == places
    assert torch.equal(outputs(plain)[2], base)


@pytest.mark.slow
def test_a_quantized_layer_is_not_fused(tmp_path):
    config = KINDS["by a regular expression"]
    file, plain = saved(taught(config), config, tmp_path / "x.safetensors"), copy.deepcopy(BASE)
    quantize_(plain.unet, "int8", "int8", torch.device("cpu"))
    base = outputs(plain)[2]
    with lora_attached(SDXL(plain), file):
        beside = outputs(plain)[2]
    with lora_attached(SDXL(plain), file, fuse=True):
        assert torch.equal(outputs(plain)[2], beside) and far(beside, base) > 0.01
    assert torch.equal(outputs(plain)[2], base)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DoRA", "PiSSA", "LoHa", "LoKr"])
def test_a_new_adapter_changes_nothing_and_half_the_weight_changes_less(kind, tmp_path):
    config = KINDS[kind]
    pipe = copy.deepcopy(BASE)
    base = outputs(pipe)[2]
    inject.inject_adapter(pipe.unet, copy.deepcopy(config))
    assert far(outputs(pipe)[2], base) < 1e-5
    pipe = taught(config)
    file, trained = saved(pipe, config, tmp_path / "x.safetensors"), outputs(pipe)[2]
    plain = copy.deepcopy(BASE)
    with lora_attached(SDXL(plain), file, 0.5):
        assert 0 < far(outputs(plain)[2], base) < far(trained, base) > far(outputs(plain)[2], trained) > 0


def test_half_precision_costs_pissa_no_more_than_lora():
    """Its start is as large as the base: rounded as it is, it would drown what was learnt."""
    config = KINDS["PiSSA"]
    pipe = taught(config, by=1e-3)
    state = kohya_state({"unet": pipe.unet}, SDXL.lora_key)

    def products(state):
        ups = [key for key in state if key.endswith("lora_up.weight")]
        return torch.cat([(state[up] @ state[up.replace("_up.", "_down.")]).flatten() for up in ups])

    exact = products(state)
    rounded = products({key: value.half().float() for key, value in state.items()})
    assert (rounded - exact).norm() / exact.norm() < 1e-3


def merged(weight, tensors):
    """The weight as ComfyUI 0.3 computes it from a file's tensors of one layer (comfy/weight_adapter)."""
    w = {leaf: value.float() for leaf, value in tensors.items()}
    alpha = w["alpha"].item()
    if "hada_w1_a" in w:
        if "hada_t1" in w:
            one, two = (
                torch.einsum("i j k l, j r, i p -> p r k l", w[f"hada_t{n}"], w[f"hada_w{n}_b"], w[f"hada_w{n}_a"])
                for n in (1, 2)
            )
        else:
            one, two = w["hada_w1_a"] @ w["hada_w1_b"], w["hada_w2_a"] @ w["hada_w2_b"]
        return weight + (alpha / w["hada_w1_b"].shape[0]) * (one * two).reshape(weight.shape)
    dim = None
    one, two = w.get("lokr_w1"), w.get("lokr_w2")
    if one is None:
        one, dim = w["lokr_w1_a"] @ w["lokr_w1_b"], w["lokr_w1_b"].shape[0]
    if two is None:
        dim = w["lokr_w2_b"].shape[0]
        two = w["lokr_w2_a"] @ w["lokr_w2_b"]
    if two.ndim == 4:
        one = one[:, :, None, None]
    return weight + (alpha / dim if dim else 1.0) * torch.kron(one, two).reshape(weight.shape)


# LoKr in Tucker form is not among them: ComfyUI gives torch.kron a tensor that it refuses, and leaves the layer out.
@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith(("LoHa", "LoKr")) and k != "LoKr in Tucker form"])
def test_comfyui_s_formula_gives_the_outputs_of_training(kind):
    pipe = taught(KINDS[kind])
    layers = {}
    for key, value in kohya_state({"unet": pipe.unet}, SDXL.lora_key).items():
        stem, _, leaf = key.partition(".")
        layers.setdefault(stem.removeprefix("lora_unet_"), {})[leaf] = value
    plain = copy.deepcopy(BASE)
    with torch.no_grad():
        for name, module in plain.unet.named_modules():
            if name.replace(".", "_") in layers:
                module.weight.copy_(merged(module.weight, layers.pop(name.replace(".", "_"))))
    assert not layers
    assert far(outputs(plain)[2], outputs(pipe)[2]) < 2e-5


def test_the_up_matrix_of_a_convolution_is_one_by_one():
    state = kohya_state({"unet": taught(KINDS["LoRA"]).unet}, SDXL.lora_key)
    conv = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert state[f"{conv}.lora_down.weight"].shape == (2, 8, 3, 3)
    assert state[f"{conv}.lora_up.weight"].shape == (8, 2, 1, 1)
    dora = kohya_state({"unet": taught(KINDS["DoRA"]).unet}, SDXL.lora_key)
    assert dora[f"{conv}.dora_scale"].shape == (8, 1, 1, 1)
    assert dora["lora_unet_mid_block_attentions_0_proj_in.dora_scale"].shape == (32, 1)


@pytest.mark.parametrize(
    ("kind", "module", "dim", "alpha", "args"),
    [
        ("LoRA", "networks.lora", "2", "3.0", {"conv_dim": "2", "conv_alpha": "3.0"}),
        ("rsLoRA", "networks.lora", "4", "6.0", {}),
        ("DoRA with patterns", "lycoris.kohya", "Dynamic", "3.0", {"algo": "lora"}),
        ("DoRA", "lycoris.kohya", "2", "3.0", {"algo": "lora", "dora_wd": "True"}),
        ("PiSSA", "networks.lora", "4", "6.0", {}),
        ("LoHa in Tucker form", "lycoris.kohya", "Dynamic", "Dynamic", {"algo": "loha", "use_tucker": "True"}),
        ("LoKr", "lycoris.kohya", "1", "3.0", {"algo": "lokr", "factor": "-1", "decompose_both": "False"}),
        ("LoKr of whole matrices", "lycoris.kohya", "64", "64.0", {"algo": "lokr", "factor": "2"}),
    ],
)
def test_the_metadata_says_what_the_file_holds(kind, module, dim, alpha, args):
    notes = network_metadata(KINDS[kind], kohya_state({"unet": taught(KINDS[kind]).unet}, SDXL.lora_key), 1.0)
    assert (notes["ss_network_module"], notes["ss_network_dim"], notes["ss_network_alpha"]) == (module, dim, alpha)
    assert json.loads(notes.get("ss_network_args", "{}")).items() >= args.items()


def refuse(*overrides, start=None, **more):
    settings = compose("stage=train", *overrides).adapter | more
    made = call_target("adapter", {key: {} if value is None else value for key, value in settings.items()})
    inject.validate_adapter(made, settings, 1.0, start)


@pytest.mark.parametrize(
    ("overrides", "more", "named"),
    [
        (["adapter=lora"], {"_target_": "peft.LNTuningConfig", "r": 1}, "adapter"),
        (["adapter=lora"], {"bias": "all"}, r"adapter\.bias"),
        (["adapter=lora"], {"layer_replication": [[0, 1]]}, r"adapter\.layer_replication"),
        (["adapter=lora", "adapter.init_lora_weights=olora"], {}, "init_lora_weights=olora: one of gaussian, pissa"),
        (["adapter=pissa", "adapter.use_dora=true"], {}, "not with DoRA"),
        (["adapter=loha", "adapter.r=0"], {}, r"adapter\.r=0"),
    ],
)
def test_an_adapter_that_no_file_can_hold_is_refused_before_anything_is_loaded(overrides, more, named):
    with pytest.raises(InputError, match=named):
        refuse(*overrides, **more)


@pytest.mark.parametrize("option", sorted(file.stem for file in CONF.glob("adapter/*.yaml")))
def test_every_key_of_an_option_reaches_peft(option):
    before = compose(f"adapter={option}").adapter
    shares = [f"adapter.{key}=0.3" for key in before if key.endswith("dropout")]
    flags = [f"adapter.{key}={str(not value).lower()}" for key, value in before.items() if isinstance(value, bool)]
    patterns = ["adapter.rank_pattern={attn2.to_q: 3}", "adapter.alpha_pattern={.*to_k: 5}"]
    asked = [f"adapter={option}", "adapter.r=7", "adapter.target_modules=.*to_q", *shares, *flags, *patterns]
    settings = compose(*asked).adapter
    made = call_target("adapter", settings)
    assert {key: getattr(made, key) for key in settings if key != "_target_"} | {
        "_target_": f"peft.{type(made).__name__}"
    } == settings
    assert settings["rank_pattern"] == {"attn2.to_q": 3} and settings["r"] == 7
    if option != "pissa":  # which asks for DoRA here
        inject.validate_adapter(made, settings, 1.0, None)


def test_pissa_refuses_layers_and_ranks_without_singular_values():
    for config, named in (
        (LoraConfig(r=2, init_lora_weights="pissa", target_modules=["conv1"]), "PiSSA is for linear layers"),
        (LoraConfig(r=99, init_lora_weights="pissa", target_modules=FEW), r"adapter\.r=99: .* has \d\d?$"),
    ):
        with pytest.raises(InputError, match=named):
            inject.inject_adapter(copy.deepcopy(BASE).unet, config)


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "DoRA", "LoHa in Tucker form", "LoKr of two low ranks"])
def test_training_starts_from_a_file_even_at_another_alpha(kind, tmp_path):
    config = KINDS[kind]
    pipe = taught(config)
    file, trained = saved(pipe, config, tmp_path / "x.safetensors"), outputs(pipe)[2]
    other = copy.deepcopy(config)
    for key in ("alpha", "lora_alpha"):
        if hasattr(other, key):
            setattr(other, key, 7)
    again = copy.deepcopy(BASE)
    inject.inject_adapter(again.unet, other)
    assert far(outputs(again)[2], trained) > 0.01
    inject.load_adapter_weights(SDXL(again), file)
    assert far(outputs(again)[2], trained) < 2e-6


def test_training_starts_from_a_file_with_diffusers_keys(tmp_path):
    from peft import get_peft_model_state_dict

    config = LoraConfig(r=2, lora_alpha=2, target_modules=FEW)
    pipe = taught(config)
    pipe.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    again = copy.deepcopy(BASE)
    inject.inject_adapter(again.unet, copy.deepcopy(config))
    inject.load_adapter_weights(SDXL(again), tmp_path / "pytorch_lora_weights.safetensors")
    assert torch.equal(outputs(again)[2], outputs(pipe)[2])
    assert again.get_list_adapters() == {"unet": ["default"]}


def test_a_file_of_another_rank_kind_or_target_is_refused_with_both_named(tmp_path):
    file = saved(taught(KINDS["LoRA"]), KINDS["LoRA"], tmp_path / "x.safetensors")
    there = describe(load_file(str(file)))
    assert there == f"LoRA of rank 2 in {len(load_file(str(file))) // 3} layers"
    for config, here in (
        (LoraConfig(r=4, target_modules=ALL), there.replace("rank 2", "rank 4")),
        (LoraConfig(r=2, target_modules=FEW), f"LoRA of rank 2 in {FEWER} layers"),
        (LoHaConfig(r=2, target_modules=FEW), f"LoHa of rank 2 in {FEWER} layers"),
    ):
        again = copy.deepcopy(BASE)
        inject.inject_adapter(again.unet, config)
        with pytest.raises(InputError, match=f"holds {there}, but this run trains {here}"):
            inject.load_adapter_weights(SDXL(again), file)


@pytest.mark.parametrize("alpha", [2.0, 8.0])  # as in the adapter, and another
@pytest.mark.parametrize("name", ["float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_training_starts_from_a_file_of_any_number_format(name, alpha, tmp_path):
    base, dtype = SDXL(copy.deepcopy(BASE)), getattr(torch, name)
    torch.manual_seed(0)
    base.network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=FEW, init_lora_weights=False))
    file = tmp_path / "start.safetensors"
    stored = {key: value.to(dtype) for key, value in kohya_state({"unet": base.network}, base.lora_key).items()}
    save_file(stored | {key: torch.tensor(alpha) for key in stored if key.endswith(".alpha")}, file)
    load_adapter_weights(base, file)
    for key, value in kohya_state({"unet": base.network}, base.lora_key).items():
        if not key.endswith(".alpha"):
            expected = stored[key].float() * (alpha / 2 if "lora_up" in key else 1)
            assert torch.allclose(value, expected, rtol=1e-6), key
