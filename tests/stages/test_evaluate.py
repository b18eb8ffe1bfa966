"""stage=evaluate scores LoRA files of any trainer by what they draw."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import inside

from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage

PROMPTS = (
    "score.prompts=['A {trigger} with a green background, smiling','A {trigger} with a red background']",
    "score.other_prompts=['A {class_noun} with a teal background','A cat with a red background']",
)
FAST = (
    "stage=evaluate",
    "dataset=folder",
    "dataset.root=../tofu",
    "refiner=off",
    "device=cpu",
    "sampler.steps=2",
    *PROMPTS,
)


def evaluate(folder, *overrides):
    return run_stage(compose(*FAST, *overrides), Path(folder).absolute())


@pytest.fixture(scope="module")
def scored(tmp_path_factory, pictures, made_lora):
    """The same matrices once as they are and once, as of a trainer that writes no notes, a tenth as strong."""
    with inside(tmp_path_factory.mktemp("evaluate"), pictures) as folder:
        state = load_file(made_lora)
        weak = {key: value * 0.1 if "lora_up" in key else value for key, value in state.items()}
        save_file(weak, "weak.safetensors")
        result = evaluate("run", f"lora=[{made_lora},weak.safetensors]")
        return folder, result


def test_every_file_gets_its_scores_and_the_base_too(scored):
    folder, result = scored
    strong, weak = result.loras
    assert (Path(strong.lora).stem, weak.lora) == ("made", "weak.safetensors")
    for scores in (strong.scores, weak.scores, result.scores_before):
        assert next(iter(scores)) == "score" and {"parts", "subject", "prompt", "attributes", "leakage"} <= set(scores)
        for estimate in filter(None, scores.values()):
            assert estimate.low - 1e-3 <= estimate.value <= estimate.high + 1e-3
    assert result.scores_before["leakage"].value == pytest.approx(0, abs=1e-3)
    assert strong.scores["leakage"].value > 2 * weak.scores["leakage"].value > 0, "random matrices disturb everything"
    assert set(vars(result.scores_before["score"]).values()) == {0.0}, "no doubt that the base gained nothing on itself"
    kept = json.loads((folder / "run/result.json").read_text())
    assert kept["loras"][1]["scores"]["subject"]["value"] == weak.scores["subject"].value


def test_every_picture_is_kept_with_its_numbers(scored):
    folder, result = scored
    lines = [json.loads(line) for line in (folder / "run/scores.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * (2 * 2 + 2)
    for line in lines:
        assert Image.open(folder / line["picture"]).text["prompt"] == line["prompt"]
        assert "{" not in line["prompt"]
    mine = [line for line in lines if line["lora"] == "weak.safetensors"]
    subjects = [line["scores"]["subject"] for line in mine[:4]]
    assert np.mean(subjects) == pytest.approx(result.loras[1].scores["subject"].value, abs=1e-3)
    assert all("HANA_TOFU" in line["caption"] for line in mine[:4]) and mine[4]["caption"] is None
    assert mine[4]["prompt"] == "A character with a teal background" and "leakage" in mine[4]["scores"]
    assert Image.open(result.sheet).width > 4 * 256


def test_the_same_file_gets_the_same_scores_again(scored, monkeypatch):
    folder, before = scored
    monkeypatch.chdir(folder)
    after = evaluate("again", "lora=weak.safetensors")
    assert after.loras[0].scores == before.loras[1].scores and after.scores_before == before.scores_before


def test_held_out_pictures_take_the_training_pictures_place(scored, pictures, tmp_path, monkeypatch):
    folder, before = scored
    monkeypatch.chdir(folder)
    (tmp_path / "held").mkdir()
    shutil.copy(pictures / "03.png", tmp_path / "held")
    after = evaluate("held-out", "lora=weak.safetensors", f"score.held_out={tmp_path / 'held'}", "score.attributes=[]")
    assert after.loras[0].scores["subject"] != before.loras[1].scores["subject"]
    assert after.loras[0].scores["prompt"] == before.loras[1].scores["prompt"]
    assert after.loras[0].scores["attributes"] is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], r"lora is missing: set lora=FILE"),
        (["lora=[]"], r"lora is missing"),
        (["lora=[made.safetensors,nobody]"], r"lora=nobody: no such file"),
        (["lora=made.safetensors", "trigger=MINT"], r"trained on the trigger HANA_TOFU, not MINT"),
        (["lora=made.safetensors", "model.judge=null"], r"model\.judge=null: scores need a CLIP"),
        (["lora=made.safetensors", "model.judge=demo:tiny-clop"], r"model\.judge=.* did you mean"),
        (["lora=made.safetensors", "model.dino=./dino"], r"model\.dino=\./dino: no such file"),
        (["lora=made.safetensors", "score.held_out=nowhere"], r"score\.held_out=nowhere: there is no such"),
        (["lora=made.safetensors", "score.held_out=."], r"no pictures in \.: point score\.held_out at"),
        (["lora=made.safetensors", "captioner.base=./blip"], r"captioner\.base=\./blip: no such file"),
        (["lora=made.safetensors", "score.prompts=[]"], r"score\.prompts=\[\]: name at least one"),
        (["lora=made.safetensors", "score.prompts=[a tofu]"], r"'a tofu' is without the character"),
        (["lora=made.safetensors", "score.other_prompts=['a {trigger}']"], r"'a \{trigger\}' has the trigger"),
        (["lora=made.safetensors", "score.seeds=[1,1]"], r"score\.seeds: each is drawn once"),
        (["lora=made.safetensors", "score.attributes=['(']"], r"score\.attributes: '\(' is no regular expression"),
        (["lora=made.safetensors", "class_noun=HANA_TOFU"], r"class_noun='HANA_TOFU': name what others"),
    ],
)
def test_wrong_input_is_refused_before_a_model_loads(elsewhere, made_lora, monkeypatch, overrides, sentence):
    shutil.copy(made_lora, "made.safetensors")
    for loader in ("load_base_for_sampling", "Scorer.load"):
        monkeypatch.setattr(f"lora_lab.stages.evaluate.{loader}", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=sentence):
        evaluate("run", *overrides)
