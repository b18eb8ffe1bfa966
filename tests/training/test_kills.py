"""A run that is killed at any file operation and resumed leaves what an uninterrupted one leaves, file by file.

So do the jobs of a packed sweep. The operations are drawn at random, by a seed that is in the test's name."""

import random
import shutil
import signal

import pytest
from killed_runs import killing_shell, left_by
from sweep_runs import pictures

pytestmark = pytest.mark.slow

SETTINGS = (
    "stage=train", "dataset=folder", "dataset.root=tofu", "refiner=off", "device=cpu", "tracker=off", "rank=2",
    "batch_size=1", "steps=4", "model.resolution=64", "model.judge=null", "sampler.steps=1", "stage.seeds=[0,1]",
    "stage.prompts=['A {trigger}']", "stage.checkpoint_every=2", "stage.keep_checkpoints=1", "stage.validate_every=2",
    "stage.validation_loss_every=2", "stage.validation_timesteps=[500]",
)  # fmt: skip
PACKED = ("-m", *SETTINGS, "hydra/launcher=packed", "hydra.sweep.dir=sweep")
RECORDS = ("multirun.yaml", "points.json")
COMMANDS = {
    "run": ([*SETTINGS, "hydra.run.dir=run"], ["run"]),
    "sweep": ([*PACKED, "rank=2,4"], ["sweep/0", "sweep/1"]),
    "sweep of several steps": ([*PACKED, "rank=2,4", "steps=3,4"], [f"sweep/{job}" for job in range(4)]),
}


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    work = tmp_path_factory.mktemp("killed")
    pictures(work)
    with killing_shell(work) as opened:
        yield opened


def test_a_refused_command_that_is_killed_leaves_the_record_to_the_next_one(shell):
    folder, whole = shell.work / "sweep", shell.work / "sweep.whole"
    assert shell.run(*COMMANDS["sweep"][0], "steps=2", "stage.checkpoint_every=1").exit_code == 0
    shutil.copytree(folder, whole)
    before, argv = recorded(folder), ("resume=sweep", "lr=5e-5")
    refused, changed = shell.run(*argv), 0
    assert refused.exit_code == 2 and "not 5e-05" in refused.output and recorded(folder) == before
    kept, removed = (refused.operations.index(f"os.{what} sweep/.before.json") for what in ("rename", "remove"))
    for kill_at in [0, *random.Random(0).sample(range(kept, removed), 4), removed, len(refused.operations) - 1]:
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        assert shell.run(*argv, kill_at=kill_at).exit_code == -signal.SIGKILL
        changed += recorded(folder) != before
        assert shell.run("resume=sweep", "rank=x").exit_code == 2  # refused too, but the record is read
        assert recorded(folder) == before, f"before {kill_at}: {refused.operations[kill_at]}"
    assert changed, "some were killed after Hydra had written the new words"


def recorded(folder):
    """What Hydra and the sweep have recorded of command lines in `folder`."""
    files = [file for file in folder.rglob("*") if file.parent.name == ".hydra" or file.name in RECORDS]
    return {file.relative_to(folder): file.read_bytes() for file in files}


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("kind", COMMANDS)
def test_a_run_that_is_killed_and_resumed_leaves_what_an_uninterrupted_one_leaves(kind, seed, shell):
    argv, runs = COMMANDS[kind]
    folder = kind.split()[0]
    shutil.rmtree(shell.work / folder, ignore_errors=True)  # of another kind
    whole = shell.run(*argv)
    assert whole.exit_code == 0, whole.output
    expected = {run: left_by(shell.work / run) for run in runs}
    assert any("samples/step-000002/p0-s1.png" in files for files in expected.values())
    operations = range(len(whole.operations))
    chance = random.Random(seed)
    # While the images after a checkpoint are drawn, and those of one job's end while others are not there yet.
    delicate = [
        [i for i in operations if name in whole.operations[i]] for name in ("samples/step-000002", "0004/p0-s0")
    ]
    for kill_at in [*map(chance.choice, delicate), *chance.sample(operations, 2)]:
        shutil.rmtree(shell.work / folder)
        shutil.rmtree(shell.work / "models", ignore_errors=True)
        killed, where = shell.run(*argv, kill_at=kill_at), f"before {kill_at}: {whole.operations[kill_at]}"
        assert killed.exit_code == -signal.SIGKILL, where
        resumed = shell.run(f"resume={folder}")
        assert resumed.exit_code == 0, (where, resumed.output)
        for run in runs:
            left = left_by(shell.work / run)
            assert left.keys() == expected[run].keys(), where
            assert not [name for name in left if left[name] != expected[run][name]], where
