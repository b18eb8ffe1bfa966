"""The ladder: copies of a LoRA that are damaged in known ways, and the order in which judges should put them."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_lab.errors import InputError
from lora_lab.evaluation.ladder import DAMAGES, ORDER, WHOLE, Ladder, write_ladder

RIGHT = {WHOLE: 0.5, "x1.5": 0.47, "x0.6": 0.4, "half": 0.4, "noise": 0.3, "x0.3": 0.1, "x2.5": 0.0}
# What is added to the weight of a layer, by the leaves that the programs' files have.
PRODUCTS = {
    ("lora_down.weight", "lora_up.weight"): lambda down, up: up @ down,
    ("lora_A.weight", "lora_B.weight"): lambda down, up: up @ down,
    ("lora.down.weight", "lora.up.weight"): lambda down, up: up @ down,
    ("lokr_w1", "lokr_w2"): torch.kron,
    ("lokr_w1_a", "lokr_w1_b", "lokr_w2"): lambda a, b, w: torch.kron(a @ b, w),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"): lambda a, b, c, d: (a @ b) * (c @ d),
}
LAYERS = [f"lora_unet_{block}_to_{part}" for block in "abcdefgh" for part in ("k", "out_0", "q", "v")]
SHAPES = {"lora_up.weight": (6, 4), "lora_B.weight": (6, 4), "lora.up.weight": (6, 4)} | {
    leaf: (6, 4) for leaf in ("hada_w1_a", "hada_w2_a", "lokr_w1_a")
}


def tensors(leaves, dtype):
    torch.manual_seed(0)
    return {f"{layer}.{leaf}": torch.randn(SHAPES.get(leaf, (4, 6))).to(dtype) for layer in LAYERS for leaf in leaves}


def update(state, layer, leaves):
    return PRODUCTS[leaves](*(state[f"{layer}.{leaf}"].float() for leaf in leaves))


@pytest.mark.parametrize("leaves", PRODUCTS, ids=lambda leaves: leaves[-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_copy_has_the_update_of_every_kind_of_file_times_its_factor(leaves, dtype, tmp_path):
    state = tensors(leaves, dtype)
    save_file(state, tmp_path / "one.safetensors", metadata={"modelspec.trigger_phrase": "HANA_TOFU"})
    copies = write_ladder(tmp_path / "one.safetensors", tmp_path / "ladder", "one")
    assert list(copies) == list(DAMAGES)
    for name, factor in {"x0.3": 0.3, "x2.5": 2.5}.items():
        damaged = load_file(copies[name])
        for layer in LAYERS:
            torch.testing.assert_close(
                update(damaged, layer, leaves), factor * update(state, layer, leaves), rtol=2e-2, atol=2e-2
            )
        assert all(tensor.dtype is dtype for tensor in damaged.values())
        with safe_open(copies[name], "pt") as file:
            assert file.metadata() == {"modelspec.trigger_phrase": "HANA_TOFU"}
    half = load_file(copies["half"])
    kept = [torch.equal(update(half, layer, leaves), update(state, layer, leaves)) for layer in LAYERS]
    lost = [not update(half, layer, leaves).any() for layer in LAYERS]
    assert sum(kept) == sum(lost) == len(LAYERS) / 2
    noisy = update(load_file(copies["noise"]), LAYERS[0], leaves)
    assert (noisy - update(state, LAYERS[0], leaves)).abs().max() > 0.1


def test_the_same_file_gives_the_same_copies_with_its_embeddings(tmp_path):
    lora = tmp_path / "one.safetensors"
    save_file(tensors(("lora_down.weight", "lora_up.weight"), torch.float32), lora)
    lora.with_name("one_emb.safetensors").write_bytes(b"embeddings")
    first, second = (write_ladder(lora, tmp_path / place, "copy") for place in ("a", "b"))
    for name in DAMAGES:
        ours, theirs = load_file(first[name]), load_file(second[name])
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert first[name].with_name(f"copy-{name}_emb.safetensors").read_bytes() == b"embeddings"


def test_a_file_without_anything_to_scale_is_refused(tmp_path):
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"^other.safetensors has no LoRA, LoHa or LoKr matrix"):
        write_ladder(tmp_path / "other.safetensors", tmp_path / "ladder", "other")


def test_the_right_order_is_as_expected_whatever_the_others_do():
    ladder = Ladder.of("lora/one.safetensors", RIGHT)
    assert ladder.as_expected and not ladder.wrong
    assert list(ladder.scores) == [WHOLE, "x1.5", "x0.6", "half", "noise", "x0.3", "x2.5"]
    assert ladder.describe() == (
        "one: good 0.50 > x1.5 0.47 > x0.6 0.40 = half 0.40 > noise 0.30 > x0.3 0.10 > x2.5 0.00 (as expected)"
    )
    assert Ladder.of("one", RIGHT | {"noise": 0.0, "half": 0.2}).as_expected


def test_half_of_the_layers_is_half_of_every_kind(tmp_path):
    state = tensors(("lora_down.weight", "lora_up.weight"), torch.float32)
    save_file(state, tmp_path / "one.safetensors")
    half = load_file(write_ladder(tmp_path / "one.safetensors", tmp_path, "copy")["half"])
    for part in ("k", "out_0", "q", "v"):
        kept = [half[key].any().item() for key in half if key.endswith(f"to_{part}.lora_up.weight")]
        assert any(kept) and not all(kept)


def test_a_broken_copy_that_scores_is_named():
    ladder = Ladder.of("one", RIGHT | {"x0.3": 0.3, "x2.5": 0.16})
    assert ladder.wrong == ["x2.5 < 0.1"] and not ladder.as_expected


@pytest.mark.parametrize(("first", "second"), ORDER)
def test_each_pair_in_the_wrong_order_or_tied_is_named(first, second):
    ladder = Ladder.of("one", RIGHT | {second: RIGHT[first]})
    assert f"{first} > {second}" in ladder.wrong and not ladder.as_expected
    assert f"not as expected: {', '.join(ladder.wrong)}" in ladder.describe()
