"""Every setting says what it means and what it decides; values mean what was typed."""

import re
from dataclasses import asdict, replace
from typing import get_args

import pytest

from lora_lab.errors import InputError
from lora_lab.launch import command_line, config
from lora_lab.launch.config import CONF
from lora_lab.launch.help import help_text
from lora_lab.settings.schema import OptimizerTraits, fields_of, values_of
from lora_lab.settings.setting import Decision, facts_of
from lora_lab.settings.stages import STAGES

NEEDED = {
    "stage=img2img": ["stage.photo=me.jpg"],
    "stage=compare": ["stage.folder=multirun/1"],
    "prior=pictures": ["prior.root=data/CARTOONS"],
    "prior=generated": ["prior.prompt='a cartoon character'"],
    **{f"structure={kind}": ["structure.controlnet=me/controlnet"] for kind in ("depth", "pose", "tile")},
}
OPTIONS = [f"{file.parent.name}={file.stem}" for file in sorted(CONF.glob("*/*.yaml"))]


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("option", OPTIONS)
def test_every_key_of_a_composed_configuration_says_what_it_decides_and_whether_jobs_may_differ(composed, option):
    config = composed(option, *NEEDED.get(option, []))
    values = {value.key: value for value in values_of(config)}
    assert set(values) == set(leaves(asdict(config)))
    for value in values.values():
        assert value.facts.decides and set(value.facts.decides) <= set(get_args(Decision)), value.key
        assert isinstance(value.facts.per_job, bool), value.key


def test_every_setting_has_a_meaning():
    meanings = {key: info.description for key, info in fields_of()}
    assert len(meanings) > 100 and [key for key, meaning in meanings.items() if not meaning] == []
    for meaning in meanings.values():
        assert not meaning.endswith("."), "the meanings are parts of lines and of tables"


def test_a_key_that_decides_the_weights_and_may_change_says_why():
    changing = {key: facts.may_change for key, info in fields_of() if (facts := facts_of(info)).may_change}
    assert set(changing) == {"steps", "memory.linear_weights", "memory.convolution_weights", "memory.vae_tiling"}


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("name=2024", lambda config: config.name, "2024"),
        ("trigger=2024", lambda config: config.name, "2024"),
        ("trigger=true", lambda config: config.trigger, "true"),
        ("lr=1", lambda config: config.lr, 1.0),
        ("lr='1e-4'", lambda config: config.lr, 1e-4),
        ("rank='4'", lambda config: config.rank, 4),
        ("dataset.flip=yes", lambda config: config.dataset.flip, True),
        ("dataset.root=2026", lambda config: config.dataset.folder, "2026"),
        ("model.vae=null", lambda config: config.model.vae, None),
        ("publish=false", lambda config: config.publish, False),
        ("sampler.negative_prompt=", lambda config: config.sampler.negative_prompt, ""),
        ("tracker.tags=[a,1]", lambda config: config.tracker.tags, ["a", "1"]),
    ],
)
def test_a_value_means_what_was_typed(composed, override, read, value):
    assert read(composed(override)) == value and type(read(composed(override))) is type(value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rank=true", "rank=True: not a whole number"),
        ("rank=4.0", r"rank=4\.0: not a whole number"),
        ("lr=true", "lr=True: not a number"),
        ("trigger=null", "trigger=null: trigger must have a value"),
        ("trigger=[a]", r"trigger=\['a'\]: not a text"),
        ("score.prompts=A", r"score\.prompts: not a list, write score\.prompts=\[\.\.\.\]"),
        ("stage.kind=nothing", r"stage\.kind=nothing: kind is one of check, caption, .*pipeline"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(composed, override, sentence):
    with pytest.raises(InputError, match=sentence):
        composed(override)


def test_a_replaced_value_is_checked_and_the_rest_is_kept(composed):
    config = composed("stage=train", "lr=3e-4")
    assert replace(config, rank=3).lr == 3e-4 and replace(config, rank=3).dataset is config.dataset
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        replace(config, rank=0)


def test_what_kind_of_optimizer_it_is_comes_from_its_file(composed):
    traits, keywords = OptimizerTraits.split(composed("optimizer=prodigy").optimizer)
    assert traits == OptimizerTraits(elementwise=True, finds_lr=True, state_bytes=16)
    assert keywords["_target_"] == "prodigyopt.Prodigy" and "d_coef" in keywords
    assert not {"elementwise", "averages_weights", "finds_lr", "state_bytes"} & keywords.keys()
    with_less, _ = OptimizerTraits.split({"_target_": "mine.SGD", "elementwise": True, "lr": 1.0})
    assert with_less == OptimizerTraits(elementwise=True, averages_weights=False, finds_lr=False, state_bytes=8)
    for key, value, sentence in (
        ("elementwise", None, "set true if the optimizer updates every number by itself"),
        ("finds_lr", 1, "optimizer.finds_lr=1: not true or false"),
        ("averages_weights", "no", "optimizer.averages_weights=no: not true or false"),
        ("state_bytes", True, "optimizer.state_bytes=True: not a number of bytes"),
    ):
        with pytest.raises(InputError, match=sentence):
            OptimizerTraits.split({"elementwise": True, key: value})


def test_the_help_has_the_meanings_of_the_settings():
    meanings = {key: info.description for key, info in fields_of()}
    lines = re.findall(r"^  (stage\.)?(\w+)=\S+ +(?:\((\w+)\) )?(.+)$", help_text().partition("\nSettings")[2], re.M)
    assert len(lines) == 16
    for prefix, key, stage, meaning in lines:
        field = STAGES[stage].__pydantic_fields__[key] if prefix else None
        assert meaning == (field.description if field else meanings[key])


def test_stages_name_only_keys_that_exist(composed):
    keys = {key for key, _ in fields_of()}
    configs = [composed(f"stage={name}", *NEEDED.get(f"stage={name}", [])) for name in STAGES]
    named = {key.replace("stage.train.", "stage.") for config in configs for key in config.stage.inputs(config)}
    assert {"dataset.root", "stage.photo"} <= named <= keys


def typed(*words):
    """The last point of a command line, as the program reads it."""
    arguments = command_line.read_arguments([*words])
    return command_line.check(arguments.overrides, arguments.multirun).runs[-1]


SPELLINGS = ["2024_01", "1.10", "1e3", "007", "0x10", "true", "TRUE", "NAN", "1e5", "-1.0", ".5", "+1", "1_0.0", "inf"]


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_text_keeps_the_spelling_that_was_typed(tmp_path, monkeypatch, text):
    config.register()
    got = typed(
        "stage=train", f"name={text}", f"class_noun={text}", f"tracker.tags=[a,{text}, {text}]",
        f"dataset.root=[{{root:{text},repeats:5}},{text}]", f"lora=[{text}]", f"stage.prompts=[{text},'{text}']",
        f"captioner.name={text}", f"stage.start_from={text}", "rank=1_0", "lr=1e-3",
    )  # fmt: skip
    assert (got.name, got.class_noun, got.tracker.tags) == (text, text, ["a", text, text])
    assert (got.dataset.root, got.lora) == ([{"root": text, "repeats": 5}, text], [text])
    assert (got.stage.prompts, got.captioner["name"], got.stage.start_from) == ([text, text], text, text)
    assert (got.rank, got.lr) == (10, 1e-3)
    (tmp_path / "experiments").mkdir()
    recipe = f"name: {text}\ntracker: {{tags: [{text}]}}\ndataset: {{root: [{{root: {text}, repeats: 2}}]}}\n"
    (tmp_path / "experiments" / "mine.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    got = typed("stage=check", "experiment=mine")
    assert (got.name, got.tracker.tags, got.dataset.root) == (text, [text], [{"root": text, "repeats": 2}])


@pytest.mark.parametrize("text", ["2024_01", "1.10", "TRUE"])
@pytest.mark.parametrize("sweep", ["name=a,{}", "name=choice(a,{})", "name=choice(a,'{}')", "name=tag(x,choice(a,{}))"])
def test_a_swept_text_keeps_its_spelling(text, sweep):
    config.register()
    assert typed("-m", "stage=check", sweep.format(text), f"trigger={text}").name == text


@pytest.mark.parametrize("home", ["~", "$HOME"])
def test_the_users_folder_may_be_written_short_wherever_a_path_is(monkeypatch, tmp_path, home):
    config.register()
    monkeypatch.setenv("HOME", str(tmp_path))
    places = ["dataset.root", "lora", "resume", "cache", "model.base", "model.vae", "model.config", "model.judge",
              "model.dino", "score.held_out", "loss.mask", "captioner.base", "stage.start_from"]  # fmt: skip
    got = values_of(typed("stage=train", *(f"{key}={home}/a b" for key in places)))
    assert {v.key: v.value for v in got if v.key in places} == dict.fromkeys(places, f"{tmp_path}/a b")
    got = typed("stage=img2img", f"stage.photo=[{home}/a.png,b.png,{home}/d.png]", f"dataset.root=[{{root:{home}/e}}]")
    assert got.stage.photo == [f"{tmp_path}/a.png", "b.png", f"{tmp_path}/d.png"]
    assert got.dataset.folder == f"{tmp_path}/e"
    for key in ("run", "sweep"):
        words = command_line.read_arguments([f"hydra.{key}.dir={home}/out/${{now:%Y}}"]).overrides
        assert config.with_hydra(words).hydra[key].dir.startswith(f"{tmp_path}/out/2")
