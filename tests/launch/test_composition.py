"""How often Hydra composes, and what stays Hydra's although the program composes and runs the job itself."""

import json
from contextlib import suppress
from typing import ClassVar

import pytest
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from lora_lab.errors import InputError
from lora_lab.launch.config import compose

RECIPE = "experiment/counted"
PICKLE = "+hydra.callbacks.save._target_=hydra.experimental.callbacks.PickleJobInfoCallback"


class CountingSource(ConfigSource):
    """A searchpath with one recipe; Hydra reads it once for each composition that chooses the recipe."""

    reads: ClassVar[list[str]] = []
    lookups: ClassVar[list[str]] = []  # Hydra asks here before it takes the defaults from its store

    @staticmethod
    def scheme() -> str:
        return "counting"

    def load_config(self, config_path: str) -> ConfigResult:
        self.reads.append(config_path)
        recipe = OmegaConf.create({"rank": 5})
        return ConfigResult(self.provider, f"{self.scheme()}://{self.path}", recipe, {"package": "_global_"})

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path == "experiment"

    def is_config(self, config_path: str) -> bool:
        self.lookups.append(config_path)
        return config_path.removesuffix(".yaml") == RECIPE

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return ["counted"] if config_path == "experiment" else []


@pytest.fixture
def captions(tmp_path):
    """Two folders with captions, and one without."""
    for name in ("one", "two", "empty"):
        (tmp_path / name).mkdir()
    for name in ("one", "two"):
        row = {"file_name": "a.png", "text": "A HANA_TOFU"}
        (tmp_path / name / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


CONVERT = ("stage=convert", "dataset=folder", "stage.form=csv")


def test_hydra_composes_once_for_a_run(type_in, captions):
    Plugins.instance().register(CountingSource)
    CountingSource.reads.clear()
    counted = ("hydra.searchpath=[counting://here]", "experiment=counted")
    code, _, err = type_in(*CONVERT, "dataset.root=one", *counted, "hydra.run.dir=run")
    assert (code, err) == (0, "")
    assert OmegaConf.load(captions / "run" / ".hydra" / "config.yaml").rank == 5
    assert CountingSource.reads == [RECIPE]


def test_a_configuration_can_be_composed_within_another_one(type_in, captions, monkeypatch):
    ranks = []
    monkeypatch.setattr(
        "lora_lab.launch.run_job.run_stage", lambda config, folder, *_: ranks.append(compose("rank=7").rank)
    )
    assert type_in("stage=check")[0] == 0
    assert type_in("-m", "stage=check", "seed=0,1")[0] == 0
    assert ranks == [7, 7, 7]


def test_the_check_of_keys_composes_only_where_one_is_unknown(tmp_path, monkeypatch):
    Plugins.instance().register(CountingSource)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text("optimizer: {lrr: 1}")
    monkeypatch.chdir(tmp_path)
    counts = []
    for override in ("rank=3", "sampler.guidance=3", "targets=ff", "adapter=dora", "experiment=mine"):
        CountingSource.lookups.clear()
        with suppress(InputError):
            compose("hydra.searchpath=[counting://here]", override)
        counts.append(CountingSource.lookups.count("schema"))
    assert counts == [1, 1, 1, 1, 2]


def test_callbacks_of_the_user_are_called_for_a_run_and_for_the_jobs_of_a_sweep(type_in, captions):
    assert type_in(*CONVERT, "dataset.root=one", "hydra.run.dir=run", PICKLE)[0] == 0
    assert type_in("-m", *CONVERT, "dataset.root=one,two", "hydra.sweep.dir=sweep", PICKLE)[0] == 0
    for folder in ("run", "sweep/0", "sweep/1"):
        assert (captions / folder / ".hydra" / "config.pickle").is_file()
        assert (captions / folder / ".hydra" / "job_return.pickle").is_file()


def test_job_logging_of_the_user_is_used(type_in, captions):
    log = "hydra.job_logging.handlers.file.filename=mine.log"
    assert type_in(*CONVERT, "dataset.root=one", "hydra.run.dir=run", log)[0] == 0
    assert "1 captions written" in (captions / "mine.log").read_text()
    assert not (captions / "run" / "lora_lab.log").exists()


def test_a_recipe_may_make_every_command_a_sweep(type_in, captions):
    (captions / "experiments").mkdir()
    (captions / "experiments" / "both.yaml").write_text(
        'hydra: {mode: MULTIRUN, sweeper: {params: {dataset.root: "one,two"}}}\n'
    )
    assert type_in(*CONVERT, "experiment=both", "hydra.sweep.dir=sweep")[0] == 0
    for job in ("0", "1"):
        assert (captions / "sweep" / job / "result.json").is_file()


def test_a_sweep_writes_its_points_before_the_first_job_and_with_typed_values(type_in, captions):
    code, _, _ = type_in(
        "-m", *CONVERT, "dataset.root=empty,one", "lr=1e-3", "name='${trigger}'", "hydra.sweep.dir=sweep"
    )
    assert code == 2, "the folder without captions is refused"
    points = json.loads((captions / "sweep" / "points.json").read_text())
    assert [point["number"] for point in points] == [0, 1]
    assert [point["values"]["dataset.root"] for point in points] == ["empty", "one"]
    assert points[0]["values"]["lr"] == 1e-3 and points[0]["values"]["name"] == "${trigger}"
    for point in points:
        recorded = OmegaConf.load(captions / "sweep" / str(point["number"]) / ".hydra" / "overrides.yaml")
        assert OmegaConf.to_container(recorded, resolve=False) == point["overrides"]
