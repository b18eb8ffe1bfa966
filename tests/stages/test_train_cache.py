"""The cache of latents and embeddings: what is encoded again, and what is not."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import assert_same, lora, reworded, train

from lora_lab.demo import TOFU
from lora_lab.errors import InputError

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.slow
def test_a_second_run_encodes_only_what_changed_and_learns_the_same(own_pictures, three_steps, capsys):
    data = ("steps=3", f"dataset.root={own_pictures}", "cache=cache")
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


@pytest.mark.slow
def test_without_a_cache_nothing_is_kept_and_the_same_is_learnt(three_steps, capsys):
    train("run", "steps=3", "cache=null")
    assert_same(lora("run"), three_steps)
    assert not Path("cache").exists() and "encoded" not in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_refused_before_the_base_is_loaded(monkeypatch):
    monkeypatch.setattr("lora_lab.training.base_context.load_base", None)
    Path("file").write_text("")
    with pytest.raises(InputError, match=r"file: cannot be written to .*cache=null"):
        train("run", "cache=file")
