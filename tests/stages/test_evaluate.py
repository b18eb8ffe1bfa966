"""stage=evaluate scores LoRA files of any trainer by what they draw."""

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import inside

from lora_lab.errors import InputError, RunError
from lora_lab.evaluation.ladder import DAMAGES, WHOLE
from lora_lab.evaluation.scores import Scorer, Scorers, open_pictures
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
    "score.photos=demo:photos/4.png",
    "score.photo_steps=2",
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
    assert len(lines) == 3 * (2 * 2 + 2 + 1)
    for line in lines:
        assert Image.open(folder / line["picture"]).text["prompt"] == line["prompt"]
        assert "{" not in line["prompt"]
    mine = [line for line in lines if line["lora"] == "weak.safetensors"]
    subjects = [line["scores"]["subject"] for line in mine[:4]]
    assert np.mean(subjects) == pytest.approx(result.loras[1].scores["subject"].value, abs=1e-3)
    assert all("HANA_TOFU" in line["caption"] for line in mine[:4]) and mine[4]["caption"] is None
    assert mine[4]["prompt"] == "A character with a teal background" and "leakage" in mine[4]["scores"]
    assert Image.open(result.sheet).width > 4 * 256
    assert mine[6]["photo"].endswith("photos/4.png") and mine[6]["prompt"].startswith("HANA_TOFU, a mini cartoon")
    assert mine[6]["scores"]["kept"] == pytest.approx(result.loras[1].scores["kept"].value, abs=1e-3)
    assert Image.open(folder / mine[6]["picture"]).size == (128, 128)


@pytest.mark.slow
def test_the_score_asks_for_resemblance_to_photos_too(scored, monkeypatch):
    folder, before = scored
    monkeypatch.chdir(folder)
    (with_photo,) = [lora.scores for lora in before.loras if lora.lora == "weak.safetensors"]
    (without,) = [lora.scores for lora in evaluate("plain", "lora=weak.safetensors", "score.photos=null").loras]
    product = without["score"].value * with_photo["resemblance"].value
    assert with_photo["score"].value == pytest.approx(product**0.5, abs=2e-3)
    assert "resemblance" not in without and without["parts"] == with_photo["parts"]
    assert before.scores_before["character"].value == before.scores_before["resemblance"].value == 0


@pytest.mark.slow
def test_the_same_file_gets_the_same_scores_again(scored, monkeypatch):
    folder, before = scored
    monkeypatch.chdir(folder)
    after = evaluate("again", "lora=weak.safetensors")
    assert after.loras[0].scores == before.loras[1].scores and after.scores_before == before.scores_before


@pytest.mark.slow
def test_held_out_pictures_take_the_training_pictures_place(scored, pictures, tmp_path, monkeypatch):
    folder, before = scored
    monkeypatch.chdir(folder)
    (tmp_path / "held").mkdir()
    shutil.copy(pictures / "03.png", tmp_path / "held")
    after = evaluate("held-out", "lora=weak.safetensors", f"score.held_out={tmp_path / 'held'}", "score.attributes=[]")
    assert after.loras[0].scores["subject"] != before.loras[1].scores["subject"]
    assert after.loras[0].scores["prompt"] == before.loras[1].scores["prompt"]
    assert after.loras[0].scores["attributes"] is None


def content(folder):
    """What stage=evaluate left in `folder`, whatever the folder is called."""
    files = [*Path(folder).glob("samples/*/*.png"), Path(folder, "sheet.png")]
    lines = Path(folder, "scores.jsonl").read_text()
    return lines.replace(str(Path(folder).absolute()), ""), {f.relative_to(folder): f.read_bytes() for f in files}


@pytest.mark.slow
def test_training_images_are_freed_before_the_first_lora_is_rendered(elsewhere, made_lora, monkeypatch):
    opened = []

    def and_watch(*arguments):
        pictures = open_pictures(*arguments)
        opened.extend(weakref.ref(picture) for own in pictures.values() for picture in own)
        return pictures

    def alive_when_a_lora_is_rendered(*arguments):
        raise RunError(f"{sum(picture() is not None for picture in opened)} of {len(opened)}")

    monkeypatch.setattr("lora_lab.stages.evaluate.open_pictures", and_watch)
    monkeypatch.setattr("lora_lab.evaluation.scores.render_with_lora", alive_when_a_lora_is_rendered)
    with pytest.raises(RunError, match=r"^0 of 6$"):
        evaluate("run", f"lora={made_lora}")


@pytest.mark.slow
def test_interrupted_scoring_keeps_what_it_has_and_goes_on_there(scored, made_lora, monkeypatch, capsys):
    folder, before = scored
    monkeypatch.chdir(folder)
    score, done = Scorer.score, []

    def killed_at_the_second(self, lora, *arguments):
        if len(done) == 1:
            done.append(None)
            raise KeyboardInterrupt
        done.append(lora.stem)
        return score(self, lora, *arguments)

    monkeypatch.setattr(Scorer, "score", killed_at_the_second)
    loras = f"lora=[{made_lora},weak.safetensors]"
    with pytest.raises(KeyboardInterrupt):
        evaluate("killed", loras)
    assert "1 of 2 LoRA are scored, the others will be with resume=killed\n" in capsys.readouterr().out
    whole, so_far = (Path(run, "scores.jsonl").read_text().splitlines() for run in ("run", "killed"))
    assert len(so_far) == len(whole) * 2 // 3 and not Path("killed/result.json").exists()
    result = evaluate("killed", loras, "resume=killed")
    assert done == ["made", None, "weak"], "each is scored once"
    assert (result.loras[0].scores, result.loras[1].scores) == (before.loras[0].scores, before.loras[1].scores)
    assert result.scores_before == before.scores_before and content("killed") == content("run")
    monkeypatch.setattr(Scorer, "score", lambda *arguments: exec("raise EOFError"))
    with pytest.raises(EOFError):  # with other seeds what was scored does not count
        evaluate("killed", loras, "resume=killed", "score.seeds=[0]", "score.attributes=[]")


def test_a_file_that_turns_out_not_to_fit_is_named_before_another_is_scored(scored, made_lora, monkeypatch):
    """In another program's names, so that only the loaded base knows its layers."""
    folder, _ = scored
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Scorer, "score_base", lambda *arguments: pytest.fail("the base was drawn"))
    name = "unet.down_blocks.1.attentions.0.proj_in.lora"
    save_file({f"{name}.down.weight": torch.ones(2, 7), f"{name}.up.weight": torch.ones(7, 2)}, "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors: does not fit this base as a LoRA"):
        evaluate("unfit", f"lora=[{made_lora},other.safetensors]")


BASE = {"ss_sd_model_name": "demo:tiny-sdxl"}
EPSILON = BASE | {"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "False"}
VELOCITY = BASE | {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"}


@pytest.mark.parametrize(
    ("first", "second", "fit"),
    [
        (EPSILON, EPSILON, True),
        (EPSILON, {}, True),
        ({}, EPSILON, True),
        ({}, {}, True),
        (VELOCITY, VELOCITY, True),
        (EPSILON, BASE | {"modelspec.prediction_type": "epsilon"}, True),
        (EPSILON, BASE | {"ss_zero_terminal_snr": "None"}, True),
        (EPSILON, VELOCITY | {"ss_sd_model_name": "another base"}, True),
        (VELOCITY, EPSILON, False),
        (EPSILON, BASE | {"modelspec.prediction_type": "v"}, False),
        (VELOCITY, VELOCITY | {"ss_zero_terminal_snr": "False"}, False),
        (VELOCITY, {}, False),  # which predicts as the base does, epsilon
    ],
)
def test_only_files_of_known_and_different_predictions_are_refused(
    elsewhere, made_lora, monkeypatch, first, second, fit
):
    for name, metadata in (("own", first), ("others", second)):
        save_file(load_file(made_lora), f"{name}.safetensors", metadata=metadata)
    monkeypatch.setattr(Scorers, "load", lambda *arguments: exec("raise EOFError"))
    sentence = r"loss\.\w+ is \w+ for own\.safetensors and \w+ for others\.safetensors, .*: score them separately"
    with pytest.raises(*((EOFError,) if fit else (InputError,)), match=None if fit else sentence):
        evaluate("run", "lora=[own.safetensors,others.safetensors]")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], r"lora is missing: set lora=FILE"),
        (["lora=[]"], r"lora is missing"),
        (["lora=[made.safetensors,nobody]"], r"lora=nobody: no such file"),
        (["lora=[made.safetensors,made.safetensors,wide.safetensors]"], r"wide\.safetensors: does not fit this base"),
        (["lora=[made.safetensors,nan.safetensors]"], r"nan\.safetensors: .* not finite"),
        (["lora=[made.safetensors,long.safetensors]"], r"made\.safetensors .* text\.max_tokens=77, long\.\w+ with 225"),
        (["lora=[made.safetensors,made.ckpt]"], r"lora=made\.ckpt: a \.ckpt file can hold code"),
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
    shutil.copy(made_lora, "made.ckpt")
    state = load_file(made_lora)
    save_file(state, "long.safetensors", metadata={"ss_max_token_length": "225"})
    save_file(
        {key: value.repeat(1, 2) if "lora_down" in key else value for key, value in state.items()}, "wide.safetensors"
    )
    save_file({key: value / 0 for key, value in state.items()}, "nan.safetensors")
    for loader in ("sampling.generate.load_base_for_sampling", "stages.evaluate.Scorers.load"):
        monkeypatch.setattr(f"lora_lab.{loader}", lambda *a: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=sentence):
        evaluate("run", *overrides)


@pytest.mark.slow
def test_a_ladder_scores_damaged_copies_and_says_their_order(elsewhere, made_lora, capsys):
    result = evaluate("run", f"lora={made_lora}", "stage.ladder=true", "score.seeds=[0]")
    (ladder,) = result.ladders
    assert ladder.lora == str(made_lora) and set(ladder.scores) == {WHOLE, *DAMAGES}
    assert [Path(one.lora).stem for one in result.loras] == ["made", *(f"made-{name}" for name in DAMAGES)]
    assert list(ladder.scores.values()) == sorted(ladder.scores.values(), reverse=True)
    assert json.loads(Path("run/result.json").read_text())["ladders"][0]["wrong"] == ladder.wrong
    assert ladder.describe() in capsys.readouterr().out
