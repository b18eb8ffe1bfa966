"""A full disk: one sentence with the file, the space that is needed and how to go on; the run stays whole."""

import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from sweep_runs import NO_JUDGE, SHORT, ended, pictures, start
from tiny_runs import assert_same, lora, metrics, train

from lora_lab.errors import DiskFullError, InputError, RunError
from lora_lab.runs import write_atomically
from lora_lab.training import run as run_module
from lora_lab.training.observers import RunArtifacts, ValidationImages
from lora_lab.training.run import TrainingRun

STEPS = (
    "steps=3", "dataset.root=tofu", "stage.checkpoint_every=1", "stage.keep_checkpoints=9", "stage.validate_every=2",
    "cache=null",
)  # fmt: skip


@pytest.fixture
def work(tmp_path, monkeypatch):
    pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def largest_file(size: int):
    """Within the context no file can grow beyond `size` bytes: for a program this is a full disk, with another name."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limited(owner: type, name: str, size: int, step: int, monkeypatch) -> None:
    """The method `name` of `owner` cannot write files of more than `size` bytes once `step` steps are done."""
    method = getattr(owner, name)

    def with_limit(self, *arguments):
        with largest_file(size if step in arguments else resource.RLIM_INFINITY):
            return method(self, *arguments)

    monkeypatch.setattr(owner, name, with_limit)


def fill_metrics(monkeypatch) -> None:
    update = TrainingRun.end_step

    def end_step(self, *arguments):
        if self.step == 2:
            self.metrics.file.stream = Path("/dev/full").open("a", buffering=1)  # noqa: SIM115, the run closes it
        return update(self, *arguments)

    monkeypatch.setattr(TrainingRun, "end_step", end_step)


PLACES = {
    "checkpoints/step-000002": lambda patch: limited(RunArtifacts, "save_checkpoint", 500_000, 2, patch),
    "checkpoints/step-000003": lambda patch: limited(RunArtifacts, "save_checkpoint", 300_000, 3, patch),
    "lora/HANA_TOFU-000002.safetensors": lambda patch: limited(RunArtifacts, "save_lora", 100_000, 2, patch),
    "samples/step-000002/p0-s0.png": lambda patch: limited(ValidationImages, "_render", 2_000, 2, patch),
    "metrics.jsonl": fill_metrics,
}


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory):
    """The run of STEPS with all the space that it wants."""
    folder = tmp_path_factory.mktemp("unlimited")
    pictures(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train("run", *STEPS)
    return folder / "run"


@pytest.mark.parametrize(
    "place", [next(iter(PLACES)), *(pytest.param(p, marks=pytest.mark.slow) for p in [*PLACES][1:])]
)
@pytest.mark.slow
def test_wherever_the_space_ends_one_sentence_names_the_file_and_the_resumed_run_is_the_same(
    place, work, unlimited, monkeypatch
):
    with monkeypatch.context() as patch:
        PLACES[place](patch)
        with pytest.raises(RunError) as caught:
            train("run", *STEPS)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"run/{place}: ") and " MiB are free): free some space, the rest of this " in line
    assert line.endswith("resume with: python -m lora_lab resume=run") and "None" not in line
    assert not [file for file in Path("run").rglob(".*") if file.name != ".hydra"], "nothing incomplete takes space"
    train("run", *STEPS, f"resume={work / 'run'}")
    assert_same(lora("run"), lora(unlimited))
    assert [line["loss"] for line in metrics("run")] == [line["loss"] for line in metrics(unlimited)]
    names = [sorted(f.relative_to(run) for f in run.rglob("*")) for run in (work / "run", unlimited)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_what_surely_does_not_fit_is_refused_before_the_first_step_and_what_may_not_fit_is_told(
    work, monkeypatch, capsys
):
    free = shutil.disk_usage(work)
    for space, refused in ((1_000_000, True), (3_000_000, False)):
        monkeypatch.setattr(run_module.shutil, "disk_usage", lambda _, space=space: free._replace(free=space))
        if refused:
            with pytest.raises(InputError, match=r"refused: needs at least 1\.\d MiB .* where 1\.0 MiB are free: free"):
                train("refused", *STEPS)
            assert not Path("refused/metrics.jsonl").read_text() and not Path("refused/checkpoints").exists()
        else:
            train("told", *STEPS)
            assert "told: takes about 5 MiB, and 2.9 MiB are free: free some space" in capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError(28, "No space left"), OSError(122, "Disk quota exceeded")])
def test_any_file_of_the_program_names_itself(error, tmp_path):
    def write(_: Path) -> None:
        raise error

    with pytest.raises(DiskFullError, match=rf"{tmp_path}/x\.json: .* MiB are free\): free some space"):
        write_atomically(tmp_path / "x.json", write)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_that_is_really_full_leaves_one_line_and_a_run_that_goes_on(work):
    disk = work / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can make a small disk")
    try:
        argv = [o for o in SHORT if not o.startswith(("-m", "steps", "hydra.sweep", "rank"))]
        argv += [NO_JUDGE, "steps=4", "rank=4", "optimizer=adamw", "hydra.run.dir=disk/run"]
        code, out, err = ended(start(work, *argv))
        assert code == 1 and "disk/run: takes about " in out and "Traceback" not in err + out
        (line,) = [line for line in err.splitlines() if line.startswith("lora_lab: ")]
        assert "step-000004: No space left on device (" in line or "step-000003: No space left on device (" in line
        code, out, err = ended(start(work, "resume=disk/run"))
        assert code == 2 and "disk/run: needs at least 1." in err and "Traceback" not in err + out
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        code, _, err = ended(start(work, "resume=disk/run"))
        assert code == 0, err
        assert [line["step"] for line in metrics("disk/run")] == [1, 2, 3, 4]
    finally:
        subprocess.run(["umount", disk], check=True)
