"""A sweep of stage=img2img: the jobs of a process load the base once, and each draws what it draws alone."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from sdxl_structure import save_ip_adapters

from lora_lab.base.load import load_base, pick_device
from lora_lab.board.read import read_sweep
from lora_lab.demo import PHOTOS
from lora_lab.launch.config import compose
from lora_lab.launch.run_job import run_stage
from lora_lab.sampling import generate
from lora_lab.shared import Shared
from lora_lab.stages import img2img

DRAW = ("stage=img2img", "tracker=off", "device=cpu", "sampler.steps=2", "publish=false",
        f"stage.photo=['{PHOTOS / '1.png'}','{PHOTOS / '2.png'}']")  # fmt: skip


@pytest.fixture
def run(exit_code_of, made_lora):
    """Run a command line in a folder with own.safetensors, and with foreign.safetensors, which has no metadata."""
    Path("own.safetensors").write_bytes(made_lora.read_bytes())
    save_file(load_file(made_lora), "foreign.safetensors")
    return exit_code_of


@pytest.fixture
def loads(monkeypatch):
    """How often bases and captioners were loaded."""
    counts = Counter()

    def counted(module, name):
        real = getattr(module, name)

        def load(*arguments, **options):
            counts[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, load)

    counted(generate, "load_base")
    counted(img2img, "load_captioner")
    return counts


def files(job: Path) -> dict[str, bytes | str]:
    """What a job drew and wrote; paths in its lines are those inside it."""
    own = {
        file.relative_to(job).as_posix(): file.read_bytes() for file in job.rglob("*.png") if file.name != "sheet.png"
    }
    texts = {file.name: file.read_text() for file in job.glob("*s.jsonl")}
    return own | {
        name: text.replace(str(job.absolute()), "JOB").replace(str(job), "JOB") for name, text in texts.items()
    }


@pytest.mark.slow
def test_jobs_of_a_sweep_load_once_and_draw_what_they_draw_alone(run, loads):
    points = ("lora=own.safetensors,foreign.safetensors", "sampler.fuse=false,true")
    assert run("-m", *DRAW, *points, "hydra.sweep.dir=sweep") == 0
    assert loads == {"load_base": 1, "load_captioner": 1}
    assert run(*DRAW, "lora=foreign.safetensors", "sampler.fuse=true", "hydra.run.dir=alone") == 0
    alone = files(Path("alone"))
    assert files(Path("sweep/3")) == alone and {"photos/1.png", "1-s0.png"} < alone.keys()
    sweep = read_sweep([Path("sweep")])
    assert sweep.drawn and len(sweep.runs) == 4 and Path("sweep/index.html").is_file()


@pytest.mark.slow
def test_what_decides_the_base_is_loaded_again_and_nothing_else(monkeypatch):
    monkeypatch.setattr(generate, "load_base_for_sampling", lambda *settings: SimpleNamespace(base=SimpleNamespace()))

    def base(shared, config):
        device = pick_device(config.device)
        model, memory, loss, text = config.model, config.memory, config.loss, config.text
        with generate.base_for_sampling(shared, model, memory, loss, text, device) as encoder:
            return encoder

    draw = ("stage=img2img", "stage.photo=x", "device=cpu")
    first = compose(*draw)

    same = ["sampler.steps=3", "model.judge=null", "model.strength=.5", "lora=A stage.lora_weight=2 lr=1"]
    other = ["model.precision=bf16", "memory.vae_tiling=true", "memory.linear_weights=int8",
             "loss.prediction=v_prediction", "device='cpu:0'"]  # fmt: skip
    for override in (*same, *other):
        shared, second = Shared(), compose(*draw, *override.split())
        before, after = base(shared, first), base(shared, second)
        assert (before is after) == (override in same), override
        assert after is base(shared, second), override


def test_a_base_is_freed_by_an_error_and_for_a_stage_that_does_not_draw(tmp_path, monkeypatch):
    shared = Shared()
    with pytest.raises(RuntimeError), shared.base("key", object):
        raise RuntimeError
    with shared.base("key", lambda: "again") as base:
        assert base == "again"
    monkeypatch.setattr("lora_lab.stages.check.check", lambda config, folder: Shared())
    run_stage(compose("stage=check"), tmp_path, shared)
    with shared.base("key", lambda: "third") as base:
        assert base == "third"


@pytest.mark.slow
def test_a_job_that_fails_leaves_the_others_as_they_are(run, loads, capsys):
    state = load_file("own.safetensors")
    save_file({key: value * 1e30 for key, value in state.items()}, "huge.safetensors")
    save_file(
        {key: value[..., :3].contiguous() if value.dim() else value for key, value in state.items()},
        "small.safetensors",
    )
    names = "lora=own.safetensors,huge.safetensors,small.safetensors,foreign.safetensors"
    assert run("-m", *DRAW, "stage.prompt='A {trigger}'", names, "hydra.sweep.dir=sweep") == 1
    assert loads == {"load_base": 2}, "what a failed job leaves of the base is not used"
    runs = read_sweep([Path("sweep")]).runs
    assert [r.status for r in runs] == ["done", "failed", "failed", "done"]
    assert "not finite" in runs[1].error and "small.safetensors" in runs[2].error
    own, foreign = files(Path("sweep/0")), files(Path("sweep/3"))
    assert own["photos/1.png"] == foreign["photos/1.png"]
    assert run(*DRAW, "stage.prompt='A {trigger}'", "lora=foreign.safetensors", "hydra.run.dir=alone") == 0
    assert files(Path("alone")) == foreign


@pytest.mark.slow
def test_a_stopped_sweep_resumes_and_equals_an_unbroken_one(run, loads, monkeypatch, capsys):
    how = ("lora=own.safetensors", "stage.lora_weight=.5,1,.7")
    assert run("-m", *DRAW, *how, "hydra.sweep.dir=whole") == 0
    with monkeypatch.context() as once:
        real = img2img.save_picture

        def interrupted(file, *arguments):
            if file == Path("cut/1/2-s0.png").absolute():
                raise KeyboardInterrupt
            real(file, *arguments)

        once.setattr(img2img, "save_picture", interrupted)
        assert run("-m", *DRAW, *how, "hydra.sweep.dir=cut") == 1
    assert "resume with: python -m lora_lab resume=cut" in capsys.readouterr().err
    assert [r.status for r in read_sweep([Path("cut")]).runs] == ["done", "unfinished", "missing"]
    before = {name: Path("cut", name).stat().st_mtime_ns for name in ("0/1-s0.png", "1/1-s0.png")}
    loads.clear()
    assert run("resume=cut") == 0
    assert before == {name: Path("cut", name).stat().st_mtime_ns for name in before}, "nothing is drawn twice"
    assert loads["load_base"] == 1
    for job in ("0", "1", "2"):
        assert files(Path("cut", job)) == files(Path("whole", job))
    assert [r.status for r in read_sweep([Path("cut")]).runs] == ["done"] * 3


@pytest.mark.slow
def test_every_launcher_draws_the_same(run, loads):
    how = ("lora=own.safetensors", "stage.strength=.5,1")
    for launcher, options in (("basic", ()), ("packed", ()), ("joblib", ("hydra.launcher.n_jobs=2",))):
        loads.clear()
        assert run("-m", *DRAW, *how, f"hydra/launcher={launcher}", *options, f"hydra.sweep.dir={launcher}") == 0
        assert loads["load_base"] == (launcher != "joblib"), "joblib's jobs are in other processes"
        assert Path(launcher, "index.html").is_file()
        for job in "01":
            assert files(Path(launcher, job)) == files(Path("basic", job))


@pytest.mark.slow
def test_a_sweep_of_evaluate_loads_the_base_once(run, loads):
    small = ("stage=evaluate", "device=cpu", "sampler.steps=2", "score.prompts=['A {trigger}']", "score.seeds=[0]")
    points = ("lora=own.safetensors,foreign.safetensors", "hydra.sweep.dir=sweep")
    assert run("-m", *small, *points) == 0
    assert loads["load_base"] == 1
    assert run(*small, "lora=foreign.safetensors", "hydra.run.dir=alone") == 0
    one, other = (json.loads(Path(job, "result.json").read_text()) for job in ("sweep/1", "alone"))
    assert one["loras"][0]["scores"] == other["loras"][0]["scores"]


@pytest.mark.slow
def test_a_job_without_structure_and_likeness_has_the_base_without_them(run, loads):
    place = save_ip_adapters(load_base(compose().model, pick_device("cpu")).network, Path("ip").absolute())
    keeping = ("structure=canny", "likeness=ip_adapter", f"likeness.adapter={place}", "likeness.encoder=encoder",
               "likeness.weights=plain.safetensors")  # fmt: skip
    small = ("stage=evaluate", "device=cpu", "sampler.steps=2", "score.prompts=['A {trigger}']", "score.seeds=[0]")
    lora, shared = "lora=own.safetensors", Shared()
    loads.clear()

    def results(name: str, *overrides: str, shared: Shared | None = None) -> dict[str, bytes | str]:
        run_stage(compose(*overrides, lora), Path(name).absolute(), shared)
        return files(Path(name))

    with_both = results("first", *DRAW, *keeping, shared=shared)
    scored = results("second", *small, "cache=null", shared=shared)
    plain = results("third", *DRAW, shared=shared)
    assert results("fourth", *DRAW, *keeping, shared=shared) == with_both != plain
    assert loads["load_base"] == 1
    assert scored == results("scored", *small, "cache=null") and plain == results("plain", *DRAW)
