"""The points of a sweep, composed once for each choice of options, equal what Hydra composes of each."""

import json
import pickle
from dataclasses import dataclass

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from lora_lab.launch import config
from lora_lab.launch.command_line import write_missing_points
from lora_lab.launch.config import Original

SAME_OPTIONS = (  # as a sweep composes them: the second of each line after the first, on its composition
    (["stage=train", "rank=2"], ["stage=train", "rank=4", "rank=8", "lr=1e-5"]),
    (["stage=train", "name=one"], ["stage=train", "name='${trigger}-r${rank}, \"x\"'", "trigger=A"]),
    (["stage=train", "experiment=smoke", "lr=1"], ["lr=${oc.decode:'1e-3'}", "stage=train", "experiment=smoke"]),
    (["optimizer=lion"], ["optimizer=lion", "optimizer.lr=null", "+optimizer.x={a: [1, {b: c}]}", "rank=${steps}"]),
    (
        ["stage=train", "lr=1"],
        ["stage=train", "stage.prompts=[a,'b, c',null]", "stage.seeds=[1,2]"],
    ),
    (["schedule=cosine", "seed=1"], ["~seed", "schedule=cosine", "++new.key=${oc.env:HOME}"]),
    (["hydra.job.name=one", "lr=1"], ["hydra.job.name=one", "lr=2", "name=${hydra:job.num}"]),
    (["lr=1"], ["hydra.sweep.subdir=${hydra.job.override_dirname}", "lr=2", "tracker.tags=[x,y]"]),
    (["model=tiny"], ["model={base: x}", "model.base=y"]),  # a group by its keys
)
REFUSED = (["ranks=3"], ["stage.photo=x", "stage=train"], ["rank=1,2"], ["~nothing"], ["+rank=3"], ["lr@x=3"])


@pytest.fixture(scope="module")
def loaders():
    """The program's loader, and Hydra's."""
    config.register()
    with config.hydra_loader() as loader:
        yield loader, ConfigLoaderImpl(loader.get_search_path())


def composition(loader, overrides):
    """What `loader` composes, or the error, to compare."""
    try:
        composed = loader.load_configuration("config", overrides, RunMode.RUN)
    except HydraException as error:
        return type(error), str(error), repr(error.__cause__)
    flags = [OmegaConf.is_struct(composed), OmegaConf.is_struct(composed.hydra), OmegaConf.is_readonly(composed.hydra)]
    return flags, OmegaConf.to_container(composed, resolve=False, enum_to_str=True)


@pytest.mark.parametrize(("first", "second"), SAME_OPTIONS)
def test_a_point_equals_hydras_own_composition(loaders, first, second):
    loader, hydra = loaders
    composition(loader, first)
    for _ in range(2):  # what an earlier point sets stays in that point
        assert composition(loader, second) == composition(hydra, second)
    assert composition(loader, first) == composition(hydra, first)


@pytest.mark.parametrize("overrides", REFUSED)
def test_a_point_is_refused_as_hydra_refuses_it(loaders, overrides):
    loader, hydra = loaders
    refusal, original = composition(loader, overrides), composition(hydra, overrides)
    assert refusal == original and issubclass(refusal[0], HydraException)


def test_a_job_in_another_process_composes_what_hydra_composes(loaders):
    loader, hydra = loaders
    sent = pickle.loads(pickle.dumps(loader))
    assert composition(sent, ["stage=train", "rank=3"]) == composition(hydra, ["stage=train", "rank=3"])


def test_a_copy_has_the_classes_of_plugins_that_hydra_imports_twice():
    @dataclass
    class Launcher:
        n_jobs: int = 2

    original = Original(OmegaConf.create({"launcher": OmegaConf.structured(Launcher), "list": [1, 2]}))
    one, other = original.copy(), original.copy()
    one.launcher.n_jobs = 3
    assert OmegaConf.get_type(other.launcher) is Launcher and other == {"launcher": {"n_jobs": 2}, "list": [1, 2]}


def test_the_jobs_of_a_glob_are_known_without_points_json(tmp_path):
    hydra = {"sweeper": {"_target_": "x.BasicSweeper", "params": None}, "overrides": {"task": ["schedule=glob(c*)"]}}
    (tmp_path / "multirun.yaml").write_text(json.dumps({"hydra": hydra}))
    write_missing_points(tmp_path)
    points = json.loads((tmp_path / "points.json").read_text())
    assert [point["values"] for point in points] == [
        {"schedule": n} for n in ("constant", "cosine", "cosine_with_restarts")
    ]
