"""Training and sampling follow the prediction of the base or of the settings."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from hydra.utils import instantiate
from sdxl_structure import NARROW, pipeline

from lora_lab.base.load import load_base, resolve_prediction_type, validate_prediction
from lora_lab.base.sdxl import SDXL
from lora_lab.demo import BASE
from lora_lab.errors import InputError
from lora_lab.launch.config import CONF, compose

# As SDXL's own file has it: no word of rescale_betas_zero_snr.
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading"}


@pytest.fixture
def pipe():
    pipe = pipeline(NARROW)
    pipe.scheduler = EulerDiscreteScheduler.from_config(SCHEDULER)
    return pipe


def applied(pipe, loss):
    """The loss as the base resolves it, after the base has taken it."""
    SDXL(pipe).apply_loss(loss)
    return SDXL(pipe).resolve_loss(loss)


def test_default_settings_keep_the_scheduler_of_the_base(pipe):
    for scheduler in (pipe.scheduler, EulerDiscreteScheduler(prediction_type="v_prediction")):
        pipe.scheduler = scheduler
        loss = applied(pipe, compose().loss)
        assert pipe.scheduler is scheduler
        assert (loss.prediction, loss.zero_terminal_snr) == (scheduler.config.prediction_type, False)


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "sampler").glob("*.yaml")))
def test_every_sampler_follows_the_prediction_setting(pipe, name):
    applied(pipe, compose("loss=zero_snr").loss)
    sampler = instantiate(compose(f"sampler={name}").sampler.scheduler)(pipe.scheduler.config)
    assert sampler.config.prediction_type == "v_prediction"
    assert sampler.alphas_cumprod[-1] < 1e-6
    sampler.set_timesteps(8)
    assert sampler.timesteps[0] == 999, "noise alone is where drawing begins"


def test_a_base_with_zero_terminal_snr_keeps_its_timestep_spacing(pipe):
    base = EulerDiscreteScheduler.from_config(SCHEDULER, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for override in ("loss=min_snr", "loss.zero_terminal_snr=true"):
        pipe.scheduler = base
        assert applied(pipe, compose(override).loss).zero_terminal_snr
        assert pipe.scheduler is base
    applied(pipe, compose("loss.zero_terminal_snr=false").loss)
    assert pipe.scheduler.alphas_cumprod[-1] > 0.004


def test_a_prediction_that_cannot_be_trained_is_refused():
    loss = compose().loss
    with pytest.raises(InputError, match=r"predicts sample: use loss\.prediction="):
        resolve_prediction_type(loss, {"prediction_type": "sample"})
    assert (
        resolve_prediction_type(replace(loss, prediction="epsilon"), {"prediction_type": "sample"}).prediction
        == "epsilon"
    )
    for wish, said in (
        (replace(loss, zero_terminal_snr=True), SCHEDULER),
        (loss, {"rescale_betas_zero_snr": True}),
        (replace(loss, prediction="epsilon"), {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ):
        with pytest.raises(InputError, match="predicts epsilon learns nothing"):
            resolve_prediction_type(wish, said)


def test_the_scheduler_of_a_folder_is_checked_before_loading(tmp_path):
    said = json.loads((BASE / "scheduler" / "scheduler_config.json").read_text())
    (tmp_path / "scheduler").mkdir()
    loss = compose("loss.zero_terminal_snr=true").loss
    for prediction in ("v_prediction", "epsilon"):
        file = tmp_path / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(said | {"prediction_type": prediction}))
        if prediction == "epsilon":
            with pytest.raises(InputError, match="predicts epsilon"):
                validate_prediction(replace(compose().model, base=str(tmp_path)), loss)
        else:
            validate_prediction(replace(compose().model, base=str(tmp_path)), loss)
    single = tmp_path / "single.safetensors"
    single.touch()
    with pytest.raises(InputError, match=r"single\.safetensors: cannot be read .*copy it again"):
        validate_prediction(replace(compose().model, base=str(single)), loss)


def test_a_base_of_v_prediction_is_loaded_as_one(tmp_path):
    pipe = load_base(compose().model, torch.device("cpu")).pipe
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path / "v")
    loaded = load_base(replace(compose().model, base=str(tmp_path / "v")), torch.device("cpu")).pipe
    assert applied(loaded, compose().loss).prediction == "v_prediction"
