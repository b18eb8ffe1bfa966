"""A run folder belongs to one process at a time, with real processes that start at once."""

import json
import os
import signal
import subprocess
import sys

import pytest
from sweep_runs import NO_JUDGE, SHORT, assert_same_run, ended, pictures, start, wait_for

from lora_lab.runs import claimed

CONVERT = ("stage=convert", "dataset=folder", "dataset.root=full", "stage.form=csv")
TRAIN = tuple(word for word in SHORT if word not in ("-m", "hydra.sweep.dir=sweep"))


@pytest.fixture
def captions(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "A HANA_TOFU"}\n')
    return tmp_path


@pytest.mark.slow
def test_runs_that_start_in_the_same_second_get_different_folders(captions):
    folder = "hydra.run.dir=out/${now:%Y}"  # the second lasts a year
    runs = [start(captions, *CONVERT, folder) for _ in range(3)]
    assert [ended(run)[0] for run in runs] == [0, 0, 0]
    found = sorted(path.parent.name.partition("-")[2] for path in captions.glob("out/*/result.json"))
    assert found == ["", "1", "2"]


@pytest.mark.parametrize("words", [("hydra.run.dir=out",), ("resume=out", "hydra.run.dir=out")])
def test_a_folder_in_use_is_refused_by_the_name_of_its_process(captions, type_in, words):
    assert type_in(*CONVERT, "hydra.run.dir=out")[0] == 0
    before = {path: path.read_bytes() for path in (captions / "out").rglob("*") if path.is_file()}
    with claimed(captions / "out"):
        code, out, err = type_in(*CONVERT, *words)
    assert (code, out) == (2, "") and f"out is in use by process {os.getpid()} on " in err and err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in (captions / "out").rglob("*") if path.is_file()}
    assert type_in(*CONVERT, *words)[0] == 0


@pytest.mark.slow
def test_the_system_ends_the_claim_of_a_process_that_was_killed(tmp_path):
    code = "import sys, time; from pathlib import Path; from lora_lab.runs import claimed\n" \
           "with claimed(Path(sys.argv[1])): print('claimed', flush=True); time.sleep(60)"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"claimed\n"
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == other.pid
        other.send_signal(signal.SIGKILL)
    with claimed(tmp_path):
        pass
    assert not (tmp_path / ".lock.json").exists()


@pytest.mark.slow
def test_two_trainings_in_one_folder_are_one_training(tmp_path):
    pictures(tmp_path)
    command = (*TRAIN, NO_JUDGE, "steps=30", "hydra.run.dir=run")
    first = start(tmp_path, *command)
    wait_for(first, tmp_path / "run" / "checkpoints" / "step-000002")
    for words in (command, ("resume=run",)):
        code, _, err = ended(start(tmp_path, *words))
        assert code == 2 and f"run is in use by process {first.pid} on " in err
    first.send_signal(signal.SIGKILL)
    ended(first)
    assert ended(start(tmp_path, "resume=run"))[0] == 0
    assert ended(start(tmp_path, *command, "hydra.run.dir=unbroken"))[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
