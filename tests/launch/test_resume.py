"""`resume=`: the command line that it stands for. How training resumes is in stages/test_train_resume.py."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from lora_lab.console import log
from lora_lab.errors import InputError
from lora_lab.launch import command_line, config
from lora_lab.launch.command_line import expand_resume
from lora_lab.launch.sweep_folder import write_record
from lora_lab.runs import write_json


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs, of which only the older has a checkpoint."""
    monkeypatch.chdir(tmp_path)
    config.register()
    older, newer = (tmp_path / "outputs" / "2026-01-01" / name for name in ("10-00-00", "it's mine"))
    for run in (older, newer):
        (run / ".hydra").mkdir(parents=True)
        (run / ".hydra" / "overrides.yaml").write_text("- stage=train\n- steps=100\n- resume=old\n- name=a\n")
    (older / "checkpoints" / "step-000100").mkdir(parents=True)
    return older.relative_to(tmp_path), newer


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.register()
    folder = tmp_path / "multirun" / "2026-01-01" / "11-00-00"
    folder.mkdir(parents=True)
    own = ["hydra/launcher=basic", f"hydra.sweep.dir={folder}"]
    write_record(folder, own, ["stage=train", "lr=1e-3,1e-4", "steps=100", "resume=null"])
    return folder.relative_to(tmp_path)


def test_a_run_is_resumed_with_its_overrides_and_new_ones_replace_them(runs):
    older, newer = runs
    expected = ["stage=train", "name=a", "steps=200", f"resume='{older}'", f"hydra.run.dir='{older}'"], None
    assert expand_resume([f"resume={older}", "steps=200"], False) == expected
    assert expand_resume(["resume=latest", "steps=200"], False) == expected
    assert expand_resume(["resume=null", "steps=200"], False) == (["resume=null", "steps=200"], None)
    (run,) = command_line.check(expand_resume([f"resume={newer}"], False)[0], False).runs
    assert run.resume == str(newer) and run.steps == 100


def test_a_sweep_is_resumed_with_its_command_line(sweep):
    expected = ["hydra/launcher=basic", "stage=train", "lr=1e-3,1e-4", "steps=100"], sweep
    assert expand_resume([f"resume={sweep}"], False) == expected
    assert expand_resume([f"resume={sweep}"], True) == expected, "-m is optional"
    more, _ = expand_resume([f"resume={sweep}", "steps=200"], False)
    assert more == ["hydra/launcher=basic", "stage=train", "lr=1e-3,1e-4", "steps=200"]


def test_another_launcher_drops_the_keys_of_the_first_one(sweep):
    write_record(sweep, ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["stage=train", "lr=1e-3,1e-4"])
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    assert expand_resume([f"resume={sweep}", "hydra/launcher=basic"], False)[0] == [
        "stage=train",
        "lr=1e-3,1e-4",
        "hydra/launcher=basic",
    ]


def test_interpolations_in_recorded_overrides_stay_as_they_were_typed(runs, sweep):
    older, _ = runs
    (older / ".hydra" / "overrides.yaml").write_text("- stage=train\n- name='${trigger}-r${rank}'\n")
    assert expand_resume([f"resume={older}"], False)[0][:2] == ["stage=train", "name='${trigger}-r${rank}'"]
    write_record(sweep, [], ["stage=train", "rank=2,4", "name='${trigger}-r${rank}'"])
    assert expand_resume([f"resume={sweep}"], False)[0] == ["stage=train", "rank=2,4", "name='${trigger}-r${rank}'"]


@pytest.mark.parametrize("new", ["lr=1e-5", "rank=4,8", "hydra/sweeper=basic"])
def test_a_resumed_sweep_refuses_other_points(sweep, new):
    with pytest.raises(InputError, match=r"a sweep over lr; other points need a sweep of their own"):
        expand_resume([f"resume={sweep}", new], False)


def test_latest_is_the_newest_run_or_sweep(runs, sweep):
    older, _ = runs
    os.utime(sweep / "multirun.yaml", (1, 1))
    assert expand_resume(["resume=latest"], False)[1] is None, "the run is newer"
    checkpoint = sweep / "1" / "checkpoints" / "step-000050"
    checkpoint.mkdir(parents=True)
    later = (older / "checkpoints" / "step-000100").stat().st_mtime + 10
    os.utime(checkpoint, (later, later))
    assert expand_resume(["resume=latest"], False)[1] == sweep, "one of its jobs is newer still"


WORDS = [
    ["rank=2,4", "name='${trigger}-r${rank}-lr${lr}'", "tracker.tags=[a,'b, c',1.10]", "lr=choice(1e-3,1e-4)"],
    ["seed=range(0,3)", "dataset.caption_suffix='\"A\"'", 'class_noun="s"', "model.vae=null", "cache='${oc.env:HOME}'"],
    ["schedule=glob(cos*)", "hydra.sweep.subdir=${hydra.job.override_dirname}", "dataset.root=[{root:a},1_0]"],
    ["name=1.10,2024_01,TRUE", "dataset.caption_prefix='{trigger}: '", "lora=[a,'b=c']", "optimizer.betas=[0.9,0.99]"],
    ["rank='4','8'", "name='${trigger}_${rank}'", "score.attributes=['a|b','c\\d']"],
]  # fmt: skip


def make_folders():
    for name in ("a", "1_0"):
        Path(name).mkdir()


@pytest.mark.parametrize("words", WORDS, ids=range(len(WORDS)))
@pytest.mark.slow
def test_a_resumed_sweep_is_the_unbroken_one(type_in, monkeypatch, words):
    make_folders()
    trained, stop_after = {}, None

    def train(config, folder, *_):
        if len(trained) == stop_after:
            raise KeyboardInterrupt
        trained[folder.name] = replace(config, tracker=replace(config.tracker, group=None))
        write_json(folder / "result.json", {"scores": None})

    monkeypatch.setattr("lora_lab.launch.run_job.run_stage", train)
    results = []
    for sweep, stop_after in (("unbroken", None), ("broken", 1)):
        answer = type_in("-m", "stage=check", *words, f"hydra.sweep.dir={sweep}")
        assert answer[0] == (0 if stop_after is None else 1), answer[2]
        if stop_after:
            stop_after = None
            assert type_in("resume=broken")[0] == 0
        assert len(trained) > 1
        results.append(dict(trained))
        trained.clear()
    assert results[0] == {name: replace(config, resume=None) for name, config in results[1].items()}
    assert type_in("resume=broken")[0] == 0 and not trained, "all are done"


@pytest.mark.parametrize("words", WORDS, ids=range(len(WORDS)))
@pytest.mark.slow
def test_a_resumed_run_is_the_first_one(type_in, monkeypatch, words):
    make_folders()
    swept = ("range", "glob", "2,4", "'4',", "choice", "TRUE", "hydra")
    words = [word for word in words if not any(mark in word for mark in swept)]
    configs = []
    monkeypatch.setattr("lora_lab.launch.run_job.run_stage", lambda config, folder, *_: configs.append(config))
    assert type_in("stage=check", *words, "hydra.run.dir=run")[0] == 0
    assert type_in("resume=run")[0] == 0 and type_in("resume=run")[0] == 0
    assert configs[0] == replace(configs[1], resume=None) == replace(configs[2], resume=None)


def contents(folder):
    return {file.relative_to(folder): file.is_file() and file.read_bytes() for file in folder.rglob("*")}


def test_a_refused_resume_changes_nothing(type_in, monkeypatch, tmp_path):
    def train(config, folder, *_):
        log.info("a line of the log")
        if config.lr == 5e-5:
            raise InputError("was trained with lr=0.001, not 5e-05")
        write_json(folder / "result.json", {"scores": None})

    monkeypatch.setattr("lora_lab.launch.run_job.run_stage", train)
    assert type_in("stage=check", "hydra.run.dir=run")[0] == 0
    assert type_in("-m", "stage=check", "rank=2,4", "hydra.sweep.dir=sweep")[0] == 0
    before = contents(tmp_path)
    for folder in ("run", "sweep", "sweep/0"):
        code, _, err = type_in(f"resume={folder}", "lr=5e-5")
        assert code == 2 and "lr=0.001, not 5e-05" in err
        changed = [name for name, content in contents(tmp_path).items() if before.get(name) != content]
        assert changed == [] and contents(tmp_path).keys() == before.keys(), folder
        assert type_in(f"resume={folder}")[0] == 0, "the plain command is as it was"
        before = contents(tmp_path)


def words(folder):
    """What the runs and sweeps in `folder` have recorded of their command lines."""
    names = ("overrides.yaml", "config.yaml", "multirun.yaml", "points.json", "result.json")
    return {file: file.read_bytes() for file in folder.rglob("*") if file.name in names}


def kill_in_stage(exit_code_of, *argv):
    child = os.fork()
    if child == 0:
        exit_code_of(*argv)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("folder", ["run", "sweep", "sweep/0"])
@pytest.mark.parametrize("does_something", [False, True])
def test_the_words_of_a_killed_command_count_only_if_it_did_something(
    exit_code_of, monkeypatch, tmp_path, folder, does_something
):
    rates = []

    def train(config, folder, *_):
        log.info("a line of the log")
        rates.append(config.lr)
        if config.lr == 5e-5:
            if does_something:
                write_json(folder / "manifest.json", {})
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(folder / "result.json", {"scores": None})

    monkeypatch.setattr("lora_lab.launch.run_job.run_stage", train)
    assert exit_code_of("stage=check", "hydra.run.dir=run") == 0
    assert exit_code_of("-m", "stage=check", "rank=2,4", "hydra.sweep.dir=sweep") == 0
    before = words(tmp_path)
    kill_in_stage(exit_code_of, f"resume={folder}", "lr=5e-5")
    assert words(tmp_path) != before, "they are written before the stage begins"
    expand_resume([f"resume={folder}"], False)
    assert (words(tmp_path) == before) != does_something
    assert not [*tmp_path.rglob(".before.json")]
    rates.clear()
    if not does_something:
        assert exit_code_of(f"resume={folder}") == 0 and {*rates} <= {1e-3}, "the plain command is as it was"


def test_a_note_of_a_killed_command_changes_nothing_outside_its_folder(exit_code_of, tmp_path, capsys):
    record = tmp_path / "run" / ".hydra"
    record.mkdir(parents=True)
    (record / "overrides.yaml").write_text("[stage=check]")
    (tmp_path / "keys").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".hydra").symlink_to(tmp_path / "keys")
    state = {"others": {}, "result": None}
    for folder in ("run", "linked"):
        names = ("../evil", "/evil", "manifest.json", ".hydra/evil.yaml", ".hydra/config.yaml")
        (tmp_path / folder / ".before.json").write_text(json.dumps(state | {"words": dict.fromkeys(names, "evil")}))
        exit_code_of("--cfg", "job", f"resume={folder}")
    evil = [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if "evil" in (file.name, _text(file))]
    assert evil == ["run/.hydra/config.yaml"]
    for note in ("{", "[]", "{}", '{"words": 3, "others": {}, "result": 3}', '{"words": {}, "jobs": []}'):
        (tmp_path / "run" / ".before.json").write_text(note)
        capsys.readouterr()
        exit_code_of("--cfg", "job", "resume=run")
        assert "Traceback" not in capsys.readouterr().err


def _text(file):
    return file.read_text() if file.is_file() else ""
