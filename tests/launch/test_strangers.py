"""Recipes and records of somebody else: what they may not set is refused in one sentence, and nothing is called."""

import json
import os
import pickle
from pathlib import Path

import pytest
import yaml

from lora_lab.board.record import read_yaml, recorded_settings
from lora_lab.errors import InputError
from lora_lab.launch import config, recipes
from lora_lab.launch.command_line import expand_resume
from lora_lab.launch.config import refuse_targets
from lora_lab.settings.setting import is_allowed, locate


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


# A target and its arguments; TRAP is a pickle that creates the folder RUN, and CODE does so in Python.
CALLS = [
    ("torch.load", {"f": "TRAP", "weights_only": False}),
    ("torch.hub.load", {"repo_or_dir": "HUB", "model": "run", "source": "local"}),
    ("torch.serialization.load", {"f": "TRAP", "weights_only": False}),
    ("torch.optim.adamw.torch.load", {"f": "TRAP", "weights_only": False}),
    ("torch.jit.load", {"f": "TRAP"}),
    ("joblib.load", {"filename": "TRAP"}),
    ("numpy.load", {"file": "TRAP", "allow_pickle": True}),
    ("pickle.load", {"file": "TRAP"}),
    ("pickle.loads", {"data": "TRAP"}),
    ("pandas.read_pickle", {"filepath_or_buffer": "TRAP"}),
    ("os.system", {"command": "mkdir RUN"}),
    ("os.mkdir", {"path": "RUN"}),
    ("os.popen", {"cmd": "mkdir RUN"}),
    ("posix.system", {"command": "mkdir RUN"}),
    ("subprocess.Popen", {"args": ["mkdir", "RUN"]}),
    ("subprocess.run", {"args": ["mkdir", "RUN"]}),
    ("pathlib.Path.mkdir", {"self": "RUN"}),
    ("shutil.rmtree", {"path": "KEPT"}),
    ("shutil.copytree", {"src": "KEPT", "dst": "RUN"}),
    ("builtins.eval", {"source": "CODE"}),
    ("builtins.exec", {"source": "CODE"}),
    ("builtins.__import__", {"name": "evil"}),
    ("importlib.import_module", {"name": "evil"}),
    ("runpy.run_path", {"path_name": "evil.py"}),
    ("runpy.run_module", {"mod_name": "evil"}),
    ("code.interact", {}),
    ("webbrowser.open", {"url": "file://KEPT"}),
    ("logging.FileHandler", {"filename": "RUN"}),
    ("logging.config.fileConfig", {"fname": "KEPT"}),
    ("hydra.utils.instantiate", {"config": {"_target_": "os.mkdir", "path": "RUN"}}),
    ("hydra.utils.call", {"config": {"_target_": "os.mkdir", "path": "RUN"}}),
    ("hydra.utils.get_method", {"path": "os.mkdir"}),
    ("hydra._internal.utils._locate", {"path": "evil"}),
    ("hydra.experimental.callbacks.PickleJobInfoCallback", {}),
    ("lora_lab.launch.config.os.system", {"command": "mkdir RUN"}),
    ("lora_lab.runs.subprocess.run", {"args": ["mkdir", "RUN"]}),
    ("lora_lab.runs.write_text", {"path": "RUN", "text": ""}),
    ("lora_lab.__main__.main", {"argv": []}),
    ("pydoc.locate", {"path": "evil"}),
    ("timeit.timeit", {"stmt": "CODE"}),
    ("evil.Evil", {}),
    ("evil", {}),
]
CALLED = ["captioner", "refiner", "adapter", "optimizer", "sampler.scheduler", "model"]  # by this program
NESTED = ["optimizer.betas", "adapter.rank_pattern.a", "captioner.prompt", "lora", "dataset.root", "tracker.tags"]
OF_HYDRA = [
    "hydra.callbacks.x", "hydra.launcher", "hydra.launcher.n_jobs", "hydra.sweeper", "hydra.sweeper.sampler",
    "hydra.job_logging.handlers.file", "hydra.hydra_logging.formatters.simple", "hydra.job", "hydra",
]  # fmt: skip
# Words of a command line, and what they would do.
WORDS = [
    "hydra.searchpath=[file://options]",
    "hydra/job_logging=colorlog",
    "hydra/hydra_logging=none",
    "hydra/callbacks=x",
    "hydra/launcher=mine",
    "hydra/env=x",
    "hydra.job_logging.handlers.file.filename=RUN",
    "+hydra.job_logging.handlers.x={(): os.mkdir, path: RUN}",
    "hydra.job.env_set={LD_PRELOAD: evil.so}",
    "hydra.job.env_copy=[HF_TOKEN]",
    "hydra.job.name=../../RUN",
    "hydra.job.chdir=true",
    "hydra.output_subdir=../RUN",
    "hydra.verbose=true",
    "hydra.launcher.setup=[mkdir RUN]",
    "hydra.launcher.python=evil",
    "hydra.launcher.submitit_folder=KEPT",
    "hydra.launcher.pre_dispatch=CODE",
    "hydra.launcher.partition='a\nmkdir RUN'",
    "hydra.launcher.n_jobs='${oc.create:{_target_:os.mkdir,path:RUN}}'",
    "hydra.sweeper.storage=redis://evil",
    "hydra.sweeper.custom_search_space=evil.space",
    "hydra.sweep.subdir=../../RUN",
    "hydra.sweep.subdir=/RUN",
    "hydra={callbacks: {x: {_target_: os.mkdir, path: RUN}}}",
    "model=../../options/evil",
    "optimizer=/evil",
    "experiment=../options/evil",
    "optimizer@hydra.callbacks.x=adamw",
]


def written(value, here):
    text = json.dumps(value)
    for name in ("RUN", "KEPT", "TRAP", "HUB"):
        text = text.replace(name, str(here / name.lower()))
    return json.loads(text.replace("CODE", f"__import__('os').mkdir('{here / 'run'}')"))


def nested(place, value):
    for key in reversed(place.split(".")):
        value = {key: value}
    return value


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with what an attacker may have put there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trap").write_bytes(pickle.dumps(Trap(tmp_path / "run")))
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir('{tmp_path / 'run'}')\nclass Evil: pass\n")
    for name in ("hub", "options", "kept", "experiments"):
        (tmp_path / name).mkdir()
    (tmp_path / "hub" / "hubconf.py").write_text("from evil import Evil as run")
    (tmp_path / "options" / "evil.yaml").write_text("# @package hydra.callbacks.x\n_target_: os.mkdir\npath: run\n")
    return tmp_path


def record(here, kind, words):
    """A folder to resume whose command line has `words`."""
    folder = here / "theirs"
    task = ["stage=check", "rank=2,4" if kind == "sweep" else "rank=2"]
    (folder / ".hydra").mkdir(parents=True)
    if kind == "sweep":
        hydra = {"overrides": {"hydra": words, "task": task}}
        (folder / "multirun.yaml").write_text(json.dumps({"hydra": hydra}))
    else:
        (folder / ".hydra" / "overrides.yaml").write_text(json.dumps([*task, *words]))
    return "resume=theirs"


def refused(here, type_in, *words):
    code, _, err = type_in(*words)
    assert code == 2 and err.startswith("lora_lab: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    assert not (here / "run").exists() and (here / "kept").is_dir() and not (here / "outputs").exists()
    return err


@pytest.mark.parametrize(("number", "target", "arguments"), [(i, *call) for i, call in enumerate(CALLS)])
@pytest.mark.slow
def test_nothing_that_a_stranger_names_is_called(here, type_in, number, target, arguments):
    way = ("run", "sweep", "recipe")[number % 3]
    call = written({"_target_": target, **arguments}, here)
    group = CALLED[number % 5]
    recipe = here / "experiments" / "theirs.yaml"
    recipe.write_text(json.dumps(nested(group, call)))
    word = "experiment=theirs" if way == "recipe" else record(here, way, [f"{group}._target_={target}"])
    assert f"{group}." in refused(here, type_in, "stage=check", word)
    for place in (*CALLED, *NESTED):
        with pytest.raises(InputError, match="_target_"):
            refuse_targets(nested(place, call))
    for place in OF_HYDRA:
        recipe.write_text(json.dumps(nested(place, call)))
        with pytest.raises(InputError, match=r"in experiment/theirs.yaml: hydra\S* of Hydra's keys"):
            recipes.read_recipe(recipe)
        with pytest.raises(InputError, match=r"^theirs: hydra\S* of Hydra's keys"):
            recipes.refuse_foreign([f"+{place}._target_={target}"], "theirs")
    assert not (here / "run").exists() and (here / "kept").is_dir()


@pytest.mark.parametrize("word", WORDS)
def test_a_record_brings_back_only_what_is_harmless(here, word):
    for kind in ("run", "sweep"):
        with pytest.raises(InputError, match="theirs"):
            expand_resume([record(here / kind, kind, [word]).replace("theirs", f"{kind}/theirs")], False)


@pytest.mark.parametrize(
    "recipe",
    [
        "defaults: [override /model: ../../options/evil]",
        "defaults: [override /hydra/job_logging: colorlog]",
        "defaults: [override /hydra/launcher: mine]",
        "defaults: [/optimizer@hydra.callbacks.x: adamw]",
        "defaults: [../options/evil]",
        "hydra: {searchpath: [file://options]}",
        "hydra: {sweeper: {params: {hydra.callbacks.x: '{_target_: os.mkdir}'}}}",
        "hydra: {sweeper: {params: {+hydra.job_logging.x: a}}}",
        "hydra: {launcher: {n_jobs: '${optimizer}'}}",
        "hydra: [1]",
        "allow_targets: [os]",
    ],
)
def test_a_recipe_may_set_only_what_is_harmless(here, recipe):
    (here / "theirs.yaml").write_text(recipe)
    with pytest.raises(InputError, match=r"in experiment/theirs\.yaml: "):
        recipes.read_recipe(here / "theirs.yaml")


def test_what_is_harmless_is_brought_back_word_for_word(here):
    config.register()
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.subdir=${hydra.job.override_dirname}"]
    assert expand_resume([record(here, "sweep", [*words, "allow_targets=[os]"])], False)[0][:3] == words
    typed = "hydra.callbacks.x._target_=mine.Callback"
    (here / "theirs" / "multirun.yaml").unlink()
    (here / "theirs" / ".hydra" / "overrides.yaml").write_text(json.dumps([f"+{typed}"]))
    assert expand_resume(["resume=theirs", f"+{typed}"], False)[0][0] == f"+{typed}", "it was typed again"


def test_a_target_is_allowed_where_it_is_defined(here, composed):
    with pytest.raises(InputError, match=r"allow_targets=\[torch\], also when you resume"):
        composed("optimizer._target_=torch.optim.RMSprop")
    for allowed in ("torch.optim.RMSprop", "torch.optim", "torch"):
        assert composed("optimizer._target_=torch.optim.RMSprop", f"allow_targets=[{allowed}]").optimizer
    (here / "mine.py").write_text("import os\nfrom shutil import rmtree\nclass Mine: pass\n")
    assert is_allowed("mine.Mine", ["mine"]) and not is_allowed("mine.rmtree", ["mine"])
    assert not is_allowed("mines.Mine", ["mine"]) and not is_allowed("os.system", ["mine"])
    with pytest.raises(ImportError, match="a module that mine uses"):
        locate("mine.os.system")


BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['1'] * 9)}]\n" for i in range(12))


BOMBS = {
    "doubling": BOMB,
    "merging": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{f'*a{i - 1},' * 9}]}}\n" for i in range(1, 12)),
    "of itself": "a: &a [*a]",
    "deep": "a: " + "[" * 500_000,
    "deep by dashes": "- " * 100_000 + "x",
    "deep by aliases": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60)),
    "long": f"a: {'x' * 2**21}",
    "long by aliases": f"a: &a {'x' * 2**18}\nb: [*a, *a, *a, *a, *a]",
    "many": f"a: [{'1,' * 60_000}]",
    "of nothing": "a: *nothing",
}
FAIR = (
    "a: &a [1, 2]\nb: [*a, *a]",
    "a: &a {x: 1}\nb: {<<: *a, y: 2}",
    "a: " + "[" * 40 + "]" * 40,
    f"a: {'x' * 2**18}",
)


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_yaml_bomb_is_refused_where_it_is_named_and_hangs_nothing_else(here, type_in, bomb):
    (here / "experiments" / "bomb.yaml").write_text(bomb)
    for words in (["--version"], ["--help"], ["--cfg", "job"]):
        assert type_in(*words)[0] == 0
    assert "bomb.yaml cannot be read" in refused(here, type_in, "experiment=bomb")
    resume = record(here, "run", [])
    (here / "theirs" / ".hydra" / "overrides.yaml").write_text(bomb)
    assert "overrides.yaml cannot be read" in refused(here, type_in, resume)
    for name in ("config", "hydra"):
        (here / "theirs" / ".hydra" / f"{name}.yaml").write_text(bomb)
    with pytest.raises(InputError, match=r"config\.yaml cannot be read"):
        recorded_settings(here / "theirs")


@pytest.mark.parametrize("text", FAIR, ids=range(len(FAIR)))
def test_yaml_with_a_few_aliases_levels_and_letters_is_read(tmp_path, text):
    (tmp_path / "fair.yaml").write_text(text)
    assert read_yaml(tmp_path / "fair.yaml") == yaml.safe_load(text)


@pytest.mark.parametrize("damage", ["", "a", "- 1", "{}", "[[a]]", "\x00"])
def test_a_damaged_record_is_refused(here, type_in, damage):
    resume = record(here, "run", [])
    (here / "theirs" / ".hydra" / "overrides.yaml").write_text(damage)
    assert "overrides.yaml" in refused(here, type_in, resume)
