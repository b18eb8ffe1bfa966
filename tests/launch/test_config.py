"""conf/ and experiments/: every file composes, what chooses what, and that nothing of OmegaConf goes further."""

import re
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec

import pytest
import yaml
from omegaconf import Container, OmegaConf

from lora_lab.base.sdxl import FP16_VAE
from lora_lab.errors import InputError
from lora_lab.launch.recipes import CONF, HOME
from lora_lab.settings.schema import STAGES, Config, Folder, Train
from lora_lab.settings.setting import defaults_of

# Groups whose keys are those of another library: an option has all of them.
OPEN = ("adapter", "optimizer", "captioner", "refiner")
OPTIONS = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml"))
RECIPES = sorted(file.stem for file in (HOME / "experiments").glob("*.yaml"))


def needs(group, option):
    """What an option can't be composed without."""
    missing = {("stage", "img2img"): "stage.photo=me.jpg", ("stage", "compare"): "stage.folder=multirun/1",
               ("prior", "pictures"): "prior.root=data/CARTOONS",
               ("prior", "generated"): "prior.prompt='a cartoon character'"}  # fmt: skip
    missing |= {("structure", kind): "structure.controlnet=me/controlnet" for kind in ("depth", "pose", "tile")}
    return [missing[group, option]] if (group, option) in missing else []


def leaves(value, path="config"):
    """(path, value) of everything in dataclasses, dicts and lists."""
    yield path, value
    if is_dataclass(value):
        for entry in fields(value):
            yield from leaves(getattr(value, entry.name), f"{path}.{entry.name}")
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{path}[{key!r}]")


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_is_what_its_file_says(composed, group, option):
    config = composed(f"{group}={option}", *needs(group, option))
    if group == "stage":
        assert type(config.stage) is STAGES[option]
    said = yaml.safe_load((CONF / group / f"{option}.yaml").read_text(encoding="utf-8"))
    said = {key: value for key, value in said.items() if key != "defaults"}
    package = re.match(r"# @package (\w+)", (CONF / group / f"{option}.yaml").read_text(encoding="utf-8"))
    if package and package[1] == "_global_":
        got = {key: getattr(config, key) for key in said}
    elif package:
        got = getattr(config, package[1])
    else:
        got = {group: getattr(config, group)}
        said = {group: said}
    differing = [path for path, value in leaves_of_yaml(said) if not same(read(got, path), value)]
    assert differing == []


def leaves_of_yaml(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves_of_yaml(value, (*path, key))
        else:
            yield (*path, key), value


def read(tree, path):
    for key in path:
        tree = tree[key] if isinstance(tree, dict) else getattr(tree, key)
    return tree


def same(got, said):
    if isinstance(said, str) and ("${" in said or said == "???"):
        return True
    return got == (float(said) if isinstance(got, float) else said)  # YAML 1.1 reads 1e-4 as a string


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_every_recipe_composes_with_every_stage(composed, recipe, stage):
    assert type(composed(f"stage={stage}", f"experiment={recipe}", *needs("stage", stage)).stage) is STAGES[stage]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_begins_with_the_command_that_runs_it(recipe):
    first = (HOME / "experiments" / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(rf"# python -m lora_lab .*\bexperiment={recipe}\b.*", first)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_an_option_says_what_it_is_and_explains_the_keys_of_other_libraries(group, option):
    lines = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if not line.startswith("# @package")).startswith("# "), "what the option is"
    for line in lines:
        if group in (*OPEN, "targets") and re.match(r"\w+:", line) and line != "defaults:":
            assert "  # " in line, line


@pytest.mark.parametrize(("group", "option"), [name for name in OPTIONS if name[0] not in (*OPEN, "targets", "stage")])
def test_an_option_holds_only_what_it_changes(group, option):
    tree = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"), resolve=False)
    defaults = defaults_of(Config)
    tree = tree if group in tree else {group: tree}
    repeated = [
        path
        for path, value in leaves_of_yaml(tree)
        if path[0] != "defaults" and value == read_or(defaults, path) != "???"
    ]
    assert repeated == [], "the default says so already"


def read_or(tree, path):
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def test_sdxl_brings_its_captioner_optimizer_memory_and_dataset(composed):
    config = composed("model=sdxl", "stage=train")
    assert config.model.name == "sdxl" and config.captioner["name"] == "blip" and config.dataset.root is None
    assert config.optimizer["_target_"] == "lora_lab.training.optimizers.AdamW8bit"
    assert config.memory.gradient_checkpointing and config.memory.offload
    assert config.refiner["vocabulary"] == [], "the rules for the bundled tofu know nothing of another character"


def test_the_command_line_overrides_what_the_model_chooses(composed):
    config = composed(
        "optimizer=adamw", "memory=fast", "captioner=blip_tiny", "refiner=off", "dataset=tofu", "lr=1", "model=sdxl"
    )
    assert config.optimizer["_target_"] == "torch.optim.AdamW" and not config.memory.offload and config.lr == 1
    assert (
        config.captioner["name"] == "blip_tiny" and config.dataset.root == "demo:tofu" and not config.refiner["replace"]
    )


def test_the_recipe_sdxl_has_the_figures_of_the_original(composed):
    config = composed("stage=train", "experiment=sdxl")
    assert (config.model.resolution, config.batch_size, config.lr, config.steps, config.seed) == (1024, 1, 1e-4, 500, 0)
    assert config.model.base == "stabilityai/stable-diffusion-xl-base-1.0"
    assert config.model.vae == "auto" and FP16_VAE == "madebyollin/sdxl-vae-fp16-fix"
    assert (config.schedule.name, config.schedule.warmup) == ("constant_with_warmup", 0)
    assert config.optimizer["_target_"] == "lora_lab.training.optimizers.AdamW8bit"
    assert isinstance(config.stage, Train) and config.memory.gradient_checkpointing
    assert (config.loss.weighting, config.loss.snr_gamma) == ("min_snr", 5.0)


def test_ones_own_recipe_is_found_and_wins_over_the_models_choice_and_the_packages_recipe(
    composed, tmp_path, monkeypatch
):
    (tmp_path / "experiments").mkdir()
    mine = "defaults:\n  - override /model: sdxl\n  - override /optimizer: adamw\nrank: 5\n"
    (tmp_path / "experiments" / "mine.yaml").write_text(mine)
    (tmp_path / "experiments" / "smoke.yaml").write_text("rank: 6\n")
    monkeypatch.chdir(tmp_path)
    config = composed("experiment=mine")
    assert (
        config.optimizer["_target_"] == "torch.optim.AdamW" and config.captioner["name"] == "blip" and config.rank == 5
    )
    assert composed("experiment=mine", "rank=7", "optimizer=adamw8bit").rank == 7
    assert composed("experiment=smoke").rank == 6 and composed("experiment=smoke").steps == 300


def test_lr_rank_and_trigger_reach_what_depends_on_them(composed):
    config = composed("lr=3e-3", "rank=5", "trigger=MINT", "optimizer=adamw8bit")
    assert config.optimizer["lr"] == 3e-3 and config.adapter["r"] == 5 and config.adapter["lora_alpha"] == 5
    assert config.name == "MINT"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_nothing_of_omegaconf_is_left_in_a_typed_configuration(composed, stage):
    config = composed(f"stage={stage}", *needs("stage", stage))
    if stage == "img2img":
        config = composed("stage=img2img", "stage.photo=[a.jpg,b.jpg]")
        assert config.stage.photo == ["a.jpg", "b.jpg"]
    found = list(leaves(config))
    assert [path for path, value in found if isinstance(value, Container)] == []
    assert len(found) > 60 and isinstance(config, Config)


def targets():
    for file in sorted(CONF.glob("*/*.yaml")):
        for target in re.findall(r"_target_: ([\w.]+)", file.read_text(encoding="utf-8")):
            yield f"{file.parent.name}/{file.stem}", target


@pytest.mark.parametrize(("option", "target"), targets())
def test_what_an_option_builds_can_be_imported(option, target):
    package = target.partition(".")[0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    parts = target.split(".")
    module = next(n for n in range(len(parts) - 1, 0, -1) if _is_module(".".join(parts[:n])))
    found = import_module(".".join(parts[:module]))
    for name in parts[module:]:
        found = getattr(found, name)
    assert callable(found)


def _is_module(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_a_dataset_is_one_folder_or_several_with_their_repeats(composed):
    assert composed("dataset.root=2026", "dataset.repeats=3").dataset.folders == [Folder("2026", 3)]
    dataset = composed("dataset.root=[a,{root:b,repeats:5},{root:c}]", "dataset.repeats=2").dataset
    assert dataset.folders == [Folder("a", 2), Folder("b", 5), Folder("c", 2)]
    with pytest.raises(InputError, match=r"dataset\.root: several folders are for stage=train"):
        _ = dataset.folder
    assert composed("dataset.root=[a]").dataset.folder == "a"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("dataset.root=[]", r"name at least one folder"),
        ("dataset.root=[a,{root:b,repeat:2}]", r"\{root: FOLDER, repeats: 2\}"),
        ("dataset.root=[{root:b,repeats:0}]", r"repeats must be at least 1"),
        ("dataset.root=[{root:b,repeats:many}]", r"\{root: FOLDER, repeats: 2\}"),
        ("dataset.root=[[a]]", r"\['a'\] is no folder"),
        ("dataset.repeats=0", r"repeats must be at least 1"),
        ("dataset.crops=1", r"crops must be at least 2"),
        ("dataset.keep_tokens=-1", r"keep_tokens must be at least 0"),
        ("dataset.caption_variants=1", r"caption_variants must be at least 2"),
    ],
)
def test_a_dataset_that_makes_no_sense_is_refused(composed, override, sentence):
    with pytest.raises(InputError, match=sentence):
        composed(override)
