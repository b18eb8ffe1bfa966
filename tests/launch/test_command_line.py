"""The command line, run in this process because starting Python takes longer than most of these tests."""

import json
import os
import subprocess
import sys

import pytest

import lora_lab
from lora_lab.errors import InputError, RunError
from lora_lab.launch import command_line
from lora_lab.launch.recipes import CONF
from lora_lab.launch.run_job import prepare_process


def refused(answer, *parts):
    code, out, err = answer
    assert code == 2
    assert err.startswith("lora_lab: ") and err.count("\n") == 1, "one sentence and no traceback"
    assert out == ""
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        # keys
        ("lrr=1", ["lrr: no such key, did you mean lr?"]),
        ("+lrr=1", ["+lrr=1", "did you mean lr?"]),
        ("++lrr=1", ["++lrr=1", "did you mean lr?"]),
        ("+lr=1", ["lr is part of every run, leave out the +"]),
        ("~lr", ["lr is part of every run, leave out the ~"]),
        ("~model", ["model is part of every run"]),
        ("+model=sdxl", ["leave out the +"]),
        ("dataset.rot=x", ["did you mean dataset.root?"]),
        ("stage.phto=x", ["did you mean stage.photo of stage=img2img?"]),
        ("stage=train stage.validat_every=1", ["did you mean stage.validate_every?"]),
        ("stage=train stage.snr_gamma=1", ["did you mean loss.snr_gamma?"]),
        ("stage=check stage.strength=0.5", ["did you mean stage.strength of stage=img2img?"]),
        ("prompt=x", ["did you mean stage.img2img.prompt?"]),
        ("learning_rate=1", ["learning_rate: no such key"]),
        ("stage=train optimizer.lrr=1", ["did you mean optimizer.lr?"]),
        ("adapter.rnk=3", ["did you mean rank?"]),
        ("adapter.lora_alhpa=3", ["did you mean adapter.lora_alpha?"]),
        ("sampler.scheduler.x=1", ["sampler.scheduler has _target_"]),
        ("+optimizer.foo=1", ["+optimizer.foo=1: no such key; optimizer has", "betas"]),
        ("++optimizer.foo=1", ["no such key; optimizer has"]),
        ("~optimizer.eps", ["optimizer.eps is part of every run"]),
        ("adapter={rnk:3}", ["adapter={rnk:3}", "lokr"]),
        ("sampler.scheduler={x:3}", ["sampler.scheduler.x: no such key"]),
        ("hydra.foo=1", ["hydra.foo: no such key"]),
        # options
        ("stage=trian", ["no such stage, did you mean train?", "caption, check"]),
        ("model=sdlx", ["did you mean sdxl?"]),
        ("experiment=sdlx", ["did you mean sdxl?"]),
        ("tracker=wandbb", ["did you mean wandb?"]),
        ("optimizer=Adam", ["did you mean adamw?"]),
        ("schedule=constant_with_warmup", ["it is schedule=constant schedule.warmup=100 here"]),
        ("tracker=none", ["it is tracker=off here"]),
        ("model=null", ["model=null", "sdxl, tiny"]),
        ("tracker=null", ["off, tensorboard, trackio, wandb"]),
        ("model=3", ["sdxl, tiny"]),
        # values
        ("rank=0", ["rank=0: rank must be at least 1"]),
        ("rank=1.5", ["rank=1.5: not a whole number"]),
        ("rank=null", ["rank must have a value"]),
        ("lr=fast", ["lr=fast: not a number"]),
        ("lr=", ["lr=: not a number"]),
        ("lr", ["lr: cannot be read as KEY=VALUE"]),
        ("lr=0", ["above 0"]),
        ("lr=nan", ["above 0"]),
        ("lr=inf", ["above 0"]),
        ("lr=${rnk}", ["'rnk' not found"]),
        ("seed=-1", ["seed must be at least 0"]),
        ("sampler.guidance=nan", ["sampler.guidance=nan"]),
        ("sampler.batch_size=0", ["sampler.batch_size=0", "at least 1"]),
        ("dataset.flip=maybe", ["dataset.flip=maybe: not true or false"]),
        ("stage=train stage.seeds=3", ["stage.seeds: not a list, write stage.seeds=[...]"]),
        ("stage=train stage.seeds=[a]", ["stage.seeds[0]=a: not a whole number"]),
        ("stage=train stage.seeds=[1", ["cannot be read as KEY=VALUE"]),
        ("stage=train stage.caption_dropout=2", ["between 0 and 1"]),
        ("stage=train stage.validation_loss_every=-1", ["stage.validation_loss_every=-1"]),
        ("stage=train stage.validation_timesteps=[]", ["stage.validation_timesteps=[]", "between 0 and 999"]),
        ("stage=train stage.validation_timesteps=[1000]", ["stage.validation_timesteps=[1000]"]),
        ("stage=train stage.validation_timesteps=[5,5]", ["stage.validation_timesteps=[5, 5]", "different"]),
        ("stage=train stage.validation_root=me", ["stage.validation_root=me", "stage.validation_loss_every steps"]),
        (
            "stage=train stage.validation_root=me stage.validation_loss_every=1",
            ["stage.validation_root=me: there is no"],
        ),
        ("stage=train stage.ema_decay=1", ["stage.ema_decay=1.0", "below 1"]),
        ("stage=train stage.save_dtype=int8", ["fp32, fp16, bf16"]),
        ("stage=img2img stage.photo=x stage.strength=2", ["stage.strength=2.0", "at most 1"]),
        ("stage=img2img", ["stage.photo is missing: set stage.photo=..."]),
        ("loss.snr_gamma=0", ["loss.snr_gamma=0.0: snr_gamma must be above 0"]),
        ("loss.snr_gamma=null", ["loss.snr_gamma=null: loss.snr_gamma must have a value"]),
        ("loss.type=l3", ["loss.type=l3", "l2, l1, huber, smooth_l1"]),
        ("loss.huber_schedule=cosine", ["loss.huber_schedule=cosine", "constant, exponential, snr"]),
        ("loss.huber_c=0", ["loss.huber_c=0.0: huber_c must be above 0"]),
        ("loss.huber_c=nan", ["loss.huber_c=nan"]),
        ("loss.noise_offset=-0.1", ["loss.noise_offset=-0.1", "at least 0"]),
        ("loss.pyramid_iterations=-1", ["loss.pyramid_iterations=-1", "at least 0"]),
        ("loss.pyramid_discount=1.5", ["loss.pyramid_discount=1.5: pyramid_discount must be between 0 and 1"]),
        ("loss.timestep_sampling=sigmoid", ["loss.timestep_sampling=sigmoid", "uniform, logit_normal"]),
        ("loss.logit_std=0", ["loss.logit_std=0.0", "above 0"]),
        ("loss.logit_mean=inf", ["loss.logit_mean=inf"]),
        ("loss.min_timestep=500 loss.max_timestep=500", ["loss.min_timestep=500 loss.max_timestep=500"]),
        ("loss.max_timestep=1001", ["loss.max_timestep=1001", "between 0 and 1000"]),
        ("loss.min_timestep=-1", ["loss.min_timestep=-1"]),
        ("loss.unmasked_weight=-0.1", ["loss.unmasked_weight=-0.1: unmasked_weight must be between 0 and 1"]),
        ("loss.mask=null", ["loss.mask=null: loss.mask must have a value"]),
        ("loss.prediction=x0", ["loss.prediction=x0", "auto, epsilon, v_prediction"]),
        ("loss.prediction=epsilon loss.zero_terminal_snr=true", ["loss.zero_terminal_snr", "predicts epsilon"]),
        ("loss.weighting=max_snr", ["loss.weighting=max_snr", "none, min_snr, debiased"]),
        ("trigger=", ["trigger=''"]),
        ("name=a/b", ["name=a/b", "slash"]),
        ("name=con", ["name=con", "Windows"]),
        ("name=LPT1.v2", ["Windows"]),
        ("name=a.", ["name=a.: ", "dot"]),
        ("name='a:b'", ["':'"]),
        (f"name={'a' * 250}", ["200 bytes, not 250"]),
        (f"trigger={'두' * 70}", ["name=두", "200 bytes, not 210"]),
        ("trigger=\udcff", ["UTF-8"]),
        # what a library would find out only after the base is loaded
        ("adapter.lora_alpha=0", ["adapter.lora_alpha=0: lora_alpha must be above 0", "alpha = rank"]),
        ("adapter.lora_alpha=-1", ["above 0"]),
        ("adapter=loha adapter.alpha=0", ["adapter.alpha=0"]),
        ("adapter.alpha_pattern={a:0}", ["adapter.alpha_pattern.a=0"]),
        ("adapter.rank_pattern={a:0}", ["adapter.rank_pattern.a=0"]),
        ("adapter.lora_dropout=1", ["adapter.lora_dropout=1: ", "below 1"]),
        ("optimizer.betas=[0.9,1]", ["optimizer.betas[1]=1", "below 1"]),
        ("optimizer.eps=0", ["optimizer.eps=0: eps must be above 0"]),
        ("optimizer.weight_decay=-1", ["optimizer.weight_decay=-1"]),
        ("optimizer.weight_decay=nan", ["optimizer.weight_decay=nan"]),
        ("optimizer.lr=1e300", ["optimizer.lr=1e+300: the largest number is 3.4e+38"]),
        ("lr=1e300", ["lr=1e+300: the largest number is 3.4e+38"]),
        ("sampler.steps=0", ["sampler.steps=0"]),
        ("captioner.beams=0", ["captioner.beams=0"]),
        ("seed=12345678901234567890123", ["64 bits"]),
        ("seed=18446744073709551615 rank=0", ["rank=0"]),
        ("stage=train stage.seeds=[0,-1]", ["stage.seeds[1]=-1: seeds must be at least 0 and below 2^64"]),
        ("stage=train stage.seeds=[18446744073709551616]", ["64 bits"]),
        ("score.seeds=[-1]", ["score.seeds[0]=-1"]),
        ("model.precision=fp8", ["model.precision=fp8", "bf16"]),
        ("=3", ["=3: cannot be read"]),
        # files that are not there
        ("stage=train dataset.root=nowhere", ["dataset.root=nowhere: there is no such file or folder"]),
        ("stage=caption dataset.root=[demo:tofu,x]", ["dataset.root: several folders are for stage=train, name one"]),
        ("stage=train dataset.root=[demo:tofu,x]", ["dataset.root=x: there is no such file or folder"]),
        ("stage=train dataset=folder", ["dataset.root is missing: set dataset.root=FOLDER"]),
        ("stage=img2img stage.photo=me.jpg", ["stage.photo=me.jpg: there is no such file or folder"]),
        ("stage=img2img stage.photo=[me.jpg,you.jpg]", ["stage.photo=me.jpg"]),
        ("stage=img2img stage.photo=두부.jpg", ["stage.photo=두부.jpg: there is no such"]),
        ("stage=img2img stage.photo=a=b.jpg", ["stage.photo=a=b.jpg: there is no such"]),
        ("stage=train model.base=demo:tiny-sdlx", ["tiny-sdxl"]),
        ("stage=caption captioner.base=nowhere", ["captioner.base=nowhere"]),
        ("resume=nowhere", ["resume=nowhere: name a run folder, one with .hydra/overrides.yaml in it"]),
        ("resume=", ["resume=: name a run folder"]),
        ("resume=latest", ["no run under outputs/ or multirun/ has a checkpoint"]),
        (
            "hydra.run.dir=/dev/null/x stage=convert",
            ["/dev/null/x: Not a directory; set hydra.run.dir="],
        ),
        ("stage=train loss.mask=nowhere", ["loss.mask=nowhere: there is no such file or folder"]),
        ("stage=check loss.mask=nowhere", ["loss.mask=nowhere"]),
        # sweeps
        ("-m rank=4,x", ["rank=x: not a whole number"]),
        ("-m lr=1e-3,fast", ["lr=fast: not a number"]),
        ("rank=4,8 -m lr=1e-3,fast", ["lr=fast: not a number"]),
        ("-m optimizer=adamw,adam8bit", ["optimizer=adam8bit: no such optimizer, did you mean adamw8bit?"]),
        ("-m rank=range(0,4)", ["rank=0: rank must be at least 1"]),
        ("hydra.mode=MULTIRUN rank=4,x", ["rank=x: not a whole number"]),
        ("-m hydra.sweeper.params.rank='4,8'", ["here write rank=..."]),
        ("-m +hydra.sweeper.params.rank='4,8'", ["here write rank=..."]),
        ("-m resume=x", ["resume=x: not the folder of a sweep", "leave out the -m"]),
        ("-m hydra/launcher=jobli", ["hydra/launcher=jobli: no such hydra/launcher, did you mean joblib?"]),
        ("-m hydra/launcher=ray", ['hydra/launcher=ray is not installed: pip install "lora_lab[ray]"', "--no-deps"]),
        ("-m hydra/launcher=joblib hydra.launcher.n_job=2", ["did you mean hydra.launcher.n_jobs?"]),
        ("-m hydra/launcher=joblib,basic", ["hydra/launcher has one value for the whole sweep"]),
        ("-m hydra/launcher=joblib rank=4,x", ["rank=x: not a whole number"]),
        ("-m lr=interval(1e-4,1e-3)", ["lr=interval(1e-4,1e-3): an interval needs", "hydra/sweeper=optuna"]),
        ("-m hydra/sweeper=optuna stage=train lr=1e-4,1e-3", ["set hydra.sweeper.direction=maximize"]),
        ("-m stage=train experiment=optuna model=tiny dataset=tofu lr=interval(0,1)", ["lr=0.0: lr must be above 0"]),
        ("-m stage=train experiment=optuna model=tiny dataset=tofu model.judge=null", ["model.judge=null", "a score"]),
        ("-m stage=check experiment=optuna model=tiny dataset=tofu", ["which only training computes"]),
        (
            "-m hydra.sweep.dir=/dev/null/x stage=convert",
            ["/dev/null/x: Not a directory; set hydra.sweep.dir="],
        ),
        ("rank=4,8", ["rank=4,8: several values are a sweep and need -m"]),
        # flags
        ("--foo", ["unrecognized arguments: --foo"]),
        ("--lr 0.02", ["unrecognized arguments: --lr", "a setting is KEY=VALUE"]),
        ("--lrr=1", ["lrr: no such key, did you mean lr?"]),
        ("hydra.job.chdir=true", ["hydra.job.chdir=true", "leave it false"]),
        ("hydra.output_subdir=null", ["hydra.output_subdir=null", ".hydra"]),
        ("-m rank=2,4 hydra.output_subdir=x", ["hydra.output_subdir=x"]),
        ("--cfg", ["--cfg"]),
        ("--config-name foo", ["./experiments"]),
        ("--cfg job --info", ["Only one of"]),
        ("--resolve", ["--resolve"]),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence_and_writes_nothing(type_in, tmp_path, arguments, parts):
    refused(type_in(*arguments.split(" ")), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("lrr: 1", ["in experiment/mine.yaml: lrr: no such key, did you mean lr?"]),
        ("optimizer: {lrr: 1}", ["in experiment/mine.yaml: optimizer.lrr", "did you mean optimizer.lr?"]),
        ("sampler: {scheduler: {karras: true}}", ["in experiment/mine.yaml: sampler.scheduler.karras: no such key"]),
        ("stage: {validat_every: 1}", ["did you mean stage.validate_every?"]),
        ("rank: fast", ["in experiment/mine.yaml: rank=fast: not a whole number"]),
        ("rank: 0", ["rank must be at least 1"]),
        ("defaults: [override /model: sdlx]", ["in experiment/mine.yaml: model=sdlx", "did you mean sdxl?"]),
        ("defaults: [override /modle: sdxl]", ["mine"]),
        ("rank: [", ["mine.yaml cannot be read", "line 1"]),
        ("- rank", ["mine.yaml cannot be read"]),
    ],
)
def test_an_error_in_a_recipe_names_the_recipe(type_in, tmp_path, recipe, parts):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(recipe)
    refused(type_in("stage=train", "experiment=mine"), *parts)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("experiment=a_whole,b_wrong", "in experiment/b_wrong.yaml: rank=0: rank must be at least 1"),
        ("experiment=choice(a_whole,b_wrong)", "in experiment/b_wrong.yaml: rank=0: rank must be at least 1"),
        ("experiment=glob(?_*)", "in experiment/b_wrong.yaml: rank=0: rank must be at least 1"),
        ("schedule=glob(zz*) rank=4,8", "schedule=glob(zz*): there is no such option"),
        ("optimizer=glob(*) optimizer.rho=0.1", "optimizer.rho: no such key"),
        ("lr=glob(1*)", "lr=glob(1*): there is no such option or value"),
        ("rank=range(-1,3)", "rank=-1: rank must be at least 1"),
        ("rank=range(5,1)", "rank=range(5,1): there is no such option or value"),
    ],
)
def test_every_value_of_a_sweep_is_checked_before_its_first_job(type_in, tmp_path, words, sentence):
    (tmp_path / "experiments").mkdir()
    for name, rank in (("a_whole", 2), ("b_wrong", 0)):
        (tmp_path / "experiments" / f"{name}.yaml").write_text(f"rank: {rank}")
    refused(type_in("-m", "stage=train", *words.split()), sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["experiments"]


def test_a_broken_recipe_affects_no_other_command(type_in, tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "broken.yaml").write_text("rank: [")
    code, out, _ = type_in("--cfg", "job", "rank=7")
    assert code == 0 and "rank: 7" in out


def test_help_fits_on_a_screen_and_its_examples_compose(type_in):
    code, out, err = type_in("--help")
    lines = out.splitlines()
    assert (code, err) == (0, "") and len(lines) <= 48 and max(map(len, lines)) <= 120
    recipes = sorted(file.stem for file in (CONF.parent / "experiments").glob("*.yaml"))
    assert "model        sdxl  tiny*" in out and f"experiment   {'  '.join(recipes)}" in out
    assert "prior        generated  off*  pictures  prediction" in out
    for knob in ("lr=1e-3 ", "rank=16 ", "steps=300 ", "seed=0 ", "stage.strength=null ", "trigger=HANA_TOFU "):
        assert knob in out
    examples = [line.split("python -m lora_lab")[1].split("   ")[0].split() for line in lines if "python -m" in line]
    assert len(examples) == 5
    for example in examples:
        overrides = [part for part in example if part != "-m"]
        assert command_line.check(overrides, "-m" in example)


def test_cfg_job_shows_the_overrides_and_writes_nothing(type_in, tmp_path):
    code, out, _ = type_in("--cfg", "job", "stage=train", "experiment=sdxl", "lr=3e-4")
    assert code == 0 and "lr: 0.0003" in out and "snr_gamma: 5.0" in out and "hydra:" not in out
    assert list(tmp_path.iterdir()) == []


def test_a_setting_may_be_written_as_a_flag(type_in):
    code, out, _ = type_in("--lr=0.02", "--cfg", "job", "--stage.mode=replace", "stage=caption")  # as wandb agent does
    assert code == 0 and "lr: 0.02\n" in out and "mode: replace" in out


def test_version_is_that_of_lora_lab(type_in):
    assert type_in("--version") == (0, f"lora_lab {lora_lab.__version__}\n", "")


def captions_in(folder, **texts):
    folder.mkdir()
    rows = (json.dumps({"file_name": f"{name}.png", "text": text}) for name, text in texts.items())
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def test_a_finished_run_exits_with_0_and_writes_its_result(type_in, tmp_path):
    captions_in(tmp_path / "두부 (1), 흰", a="A HANA_TOFU")
    code, _, err = type_in("stage=convert", "dataset=folder", "dataset.root=두부 (1), 흰", "stage.form=csv")
    assert (code, err) == (0, "")
    assert (tmp_path / "두부 (1), 흰" / "metadata.csv").is_file(), "brackets, commas and Hangul need no quotes"
    (result,) = tmp_path.glob("outputs/*/*/result.json")
    assert json.loads(result.read_text())["captions"] == 1


@pytest.mark.parametrize("run_dir", [[], ["hydra.run.dir=mine"], ["hydra.run.dir=new/mine"]])
def test_a_run_that_its_stage_refuses_changes_nothing(type_in, tmp_path, run_dir):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "lora_lab.log").write_text("of another run\n")
    before = contents(tmp_path)
    refused(type_in("stage=convert", "dataset=folder", "dataset.root=empty", *run_dir), "no captions in empty")
    assert contents(tmp_path) == before


def contents(folder):
    return {file: file.read_bytes() if file.is_file() else None for file in folder.rglob("*")}


def test_a_refused_job_does_not_end_the_sweep_but_decides_its_exit_code(type_in, tmp_path):
    captions_in(tmp_path / "full", a="A HANA_TOFU")
    (tmp_path / "empty").mkdir()
    code, _, err = type_in("-m", "stage=convert", "dataset=folder", "dataset.root=empty,full", "stage.form=csv")
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("lora_lab: stage=convert dataset=folder dataset.root=empty stage.form=csv: no captions in")
    assert (tmp_path / "full" / "metadata.csv").is_file()


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (InputError("lora is missing"), 2, "lora_lab: lora is missing\n"),
        (RunError("the loss is nan"), 1, "lora_lab: the loss is nan\n"),
        (
            KeyboardInterrupt("stopped after step 3"),
            1,
            "lora_lab: stopped after step 3; resume with: python -m lora_lab resume=outputs/",
        ),
        (KeyboardInterrupt(), 1, "lora_lab: stopped; resume with: python -m lora_lab resume=outputs/"),
    ],
)
def test_an_error_in_a_run_is_one_sentence_and_decides_the_exit_code(type_in, monkeypatch, error, code, parts):
    def fail(config, folder):
        raise error from FileNotFoundError("the message of a library")

    monkeypatch.setattr("lora_lab.launch.run_job.run_stage", fail)
    got, _, err = type_in("stage=check")
    assert got == code and err.lstrip("\n").startswith(parts) and err.strip().count("\n") == 0


def test_an_unexpected_error_shows_its_traceback_and_exits_with_1(type_in, monkeypatch):
    monkeypatch.setattr("lora_lab.launch.run_job.run_stage", lambda config, folder, *_: {}["gone"])
    code, _, err = type_in("stage=check")
    assert code == 1 and "Traceback" in err and "KeyError: 'gone'" in err and "Error executing job" not in err


def test_a_wrong_command_line_is_refused_without_importing_torch():
    code = (
        "import sys; from lora_lab.__main__ import main; "
        "codes = [main(['lrr=1']), main(['stage=train', 'dataset.root=nowhere']), main(['--cfg', 'job'])]; "
        "heavy = {'torch', 'diffusers', 'transformers', 'wandb', 'matplotlib', 'scipy'} & set(sys.modules); "
        "sys.exit(f'{codes} {heavy}' if heavy or codes != [2, 2, 0] else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("chosen", "spin_count"), [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)]
)
def test_threads_spin_a_short_time_unless_the_user_says_otherwise(monkeypatch, chosen, spin_count):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the test does
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    prepare_process()
    assert os.environ.get("GOMP_SPINCOUNT") == spin_count


def test_the_module_runs_as_a_command(tmp_path):
    def run(*argv):
        return subprocess.run(
            [sys.executable, "-m", "lora_lab", *argv], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8"
        )

    wrong = run("stage=trian", "lr=1e-4")
    assert wrong.returncode == 2 and wrong.stderr.startswith("lora_lab: stage=trian") and wrong.stdout == ""
    right = run("--cfg", "job", "stage=train", "lr=1e-4")
    assert right.returncode == 0 and "lr: 0.0001" in right.stdout


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(type_in, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    answer = type_in("stage=train", "tracker=trackio")
    refused(answer, 'tracker=trackio needs a package: pip install "lora_lab[trackio]"')
    assert list(tmp_path.iterdir()) == []


def test_the_jobs_of_a_sweep_are_one_group_for_the_tracker(type_in, monkeypatch):
    groups = []
    monkeypatch.setattr(
        "lora_lab.launch.run_job.run_stage", lambda config, folder, *_: groups.append(config.tracker.group)
    )
    assert type_in("-m", "stage=check", "seed=0,1")[0] == 0
    assert groups[0] is not None and groups == [groups[0]] * 2
    assert type_in("stage=check")[0] == 0
    assert groups[-1] is None


def test_cfg_job_shows_values_instead_of_interpolations(type_in):
    code, out, _ = type_in("--cfg", "job", "lr=3e-4", "rank=7")
    assert code == 0 and "lr: 0.0003" in out and "r: 7" in out
    assert "${" not in out.replace("{trigger}", "")
