"""Sweeps of short trainings: killed, stopped and resumed; in several processes; as a search."""

import json
import signal

import pytest
from omegaconf import OmegaConf
from sweep_runs import NO_JUDGE, SHORT, assert_same_run, ended, interrupt, pictures, start

pytestmark = pytest.mark.slow

RATES = "lr=1e-3,1e-2"


@pytest.fixture
def work(tmp_path):
    pictures(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    pictures(folder)
    code, _, err = ended(start(folder, *SHORT, NO_JUDGE, RATES))
    assert code == 0, err
    return folder / "sweep"


def steps_done(run):
    return max(int(step.name.removeprefix("step-")) for step in (run / "checkpoints").glob("step-*"))


def test_the_jobs_of_a_sweep_install_no_lora(unbroken):
    assert sorted(f.name for f in unbroken.parent.iterdir()) == ["cache", "sweep", "tofu"]
    assert json.loads((unbroken / "0" / "result.json").read_text())["model"] is None


def test_a_killed_sweep_resumes_and_equals_an_uninterrupted_one(work, unbroken):
    sweep = work / "sweep"
    interrupt(start(work, *SHORT, NO_JUDGE, RATES), signal.SIGKILL, sweep / "1" / "checkpoints" / "step-000003")
    assert (sweep / "0" / "result.json").is_file() and not (sweep / "1" / "result.json").exists()
    done = (sweep / "0" / "result.json").stat()
    code, out, err = ended(start(work, "resume=sweep"))
    assert code == 0, err
    assert "resumes" in out, "the second job resumes from its checkpoint"
    assert (sweep / "0" / "result.json").stat().st_ino == done.st_ino, "the first job is not repeated"
    for job in ("0", "1"):
        assert_same_run(sweep / job, unbroken / job)


def test_a_sweep_killed_before_the_first_checkpoint_resumes(work, unbroken):
    rare = "stage.checkpoint_every=0"
    started = start(work, *SHORT, NO_JUDGE, RATES, rare)
    interrupt(started, signal.SIGKILL, work / "sweep" / "0" / "metrics.jsonl")
    assert ended(start(work, "resume=sweep"))[0] == 0
    assert_same_run(work / "sweep" / "1", unbroken / "1")


def test_ctrl_c_writes_a_checkpoint_starts_no_other_job_and_prints_how_to_resume(work):
    first = work / "sweep" / "0"
    code, _, err = interrupt(start(work, *SHORT, NO_JUDGE, RATES), signal.SIGINT, first / "checkpoints" / "step-000003")
    reached = steps_done(first)
    assert code == 1 and 3 <= reached < 30
    assert f"lora_lab: stopped after step {reached}; resume with: python -m lora_lab resume=sweep\n" in err
    assert not (work / "sweep" / "1").exists() and not (first / "failed.json").exists()


def test_more_steps_for_every_job_of_a_sweep(work, unbroken):
    assert ended(start(work, *SHORT, NO_JUDGE, RATES, "steps=10"))[0] == 0
    code, out, err = ended(start(work, "resume=sweep", "steps=30"))
    assert code == 0, err
    assert out.count("resumes") == 2
    for job in ("0", "1"):
        assert_same_run(work / "sweep" / job, unbroken / job)
        assert json.loads((work / "sweep" / job / "result.before.json").read_text())["steps"] == 10


def test_joblib_gives_the_same_runs_and_reports_failures(work, unbroken):
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    code, out, err = ended(start(work, *SHORT, NO_JUDGE, "lr=1e-3,1e30", *joblib))
    assert code == 1
    assert_same_run(work / "sweep" / "0", unbroken / "0")
    assert "step 2 is nan" in json.loads((work / "sweep" / "1" / "failed.json").read_text())["error"]
    assert "lora_lab: sweep/1: the loss of step 2 is nan" in err
    *spoken, _, page = [line for line in out.splitlines() if "HYDRA" not in line]
    assert page == "compare the runs: sweep/index.html"
    assert spoken and all(line.startswith(("#0 ", "#1 ")) for line in spoken), "every line has the label of its job"
    assert "step/s" not in err and "picture/s" not in err, "no bars of several jobs in one place"


def test_ctrl_c_lets_every_joblib_job_write_its_checkpoint(work, unbroken):
    sweep, long = work / "sweep", "steps=3000"
    both = [sweep / job / "checkpoints" / "step-000003" for job in "01"]
    started = start(work, *SHORT, NO_JUDGE, "lr=1e-3,1e-2,1e-4", long,
                    "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")  # fmt: skip
    code, _, err = interrupt(started, signal.SIGINT, *both)
    assert code == 1 and "resume with: python -m lora_lab resume=sweep\n" in err
    assert "Traceback" not in err
    for job in "01":
        lines = (sweep / job / "metrics.jsonl").read_text().splitlines()
        assert steps_done(sweep / job) == json.loads(lines[-1])["step"], "the last step is in a checkpoint"
    assert not (sweep / "2" / "job.json").exists(), "the third job is not started"
    assert not list(sweep.rglob("failed.json")) and not (sweep / "stop").exists()


def test_optuna_finds_the_run_with_the_highest_score_despite_a_failed_trial(work):
    search = ("experiment=optuna", "model=tiny", "lr=1e-3,1e-2,1e30", "steps=2,3", "stage.checkpoint_every=0")
    fixed = [o for o in SHORT if not o.startswith(("steps=", "stage.checkpoint_every"))]
    code, _, err = ended(start(work, *fixed, *search, "hydra.sweeper.n_trials=6"))
    assert code == 1, "a trial failed"
    jobs = [work / "sweep" / str(n) for n in range(6)]
    failed = [job for job in jobs if (job / "failed.json").is_file()]
    overrides = {job: json.loads((job / "job.json").read_text())["overrides"] for job in jobs}
    assert failed and failed == [job for job in jobs if "lr=1e+30" in overrides[job]]
    results = {job: json.loads((job / "result.json").read_text()) for job in jobs if job not in failed}
    scores = {job: r["scores"]["score"]["value"] for job, r in results.items()}
    best = max(scores, key=scores.get)
    search = OmegaConf.load(work / "sweep" / "optimization_results.yaml")
    assert search.best_value == scores[best]
    assert {f"lr={search.best_params.lr}", f"steps={search.best_params.steps}"} <= set(overrides[best])

    # Two more trials: the sampler is given the scores of the finished ones, which are not repeated.
    code, out, err = ended(start(work, "resume=sweep", "hydra.sweeper.n_trials=8"))
    assert out.count(" is done\n") == len(scores) and (work / "sweep" / "7").is_dir(), err
    assert {job: json.loads((job / "job.json").read_text())["overrides"] for job in jobs} == overrides
