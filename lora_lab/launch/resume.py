"""`resume=`: continue a run or a sweep by the command line that started it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from lora_lab.errors import InputError
from lora_lab.launch import grid
from lora_lab.launch.command_line import hydra_part
from lora_lab.launch.grid import name_of
from lora_lab.runs import SWEEP_RECORD


def expand_resume(overrides: list[str], multirun: bool) -> tuple[list[str], Path | None]:
    """The command line that `resume=FOLDER` stands for, and the folder if it is that of a sweep.

    It has the overrides that started the run or the sweep, then the new ones. `latest` is the newest run or sweep below
    outputs/ and multirun/ that has a checkpoint. Raises InputError for a folder that cannot be resumed, and for new
    overrides that would change the points of a sweep."""
    values = {name_of(o): o.partition("=")[2].strip("'\"") for o in overrides}
    name = values.get("resume")
    if name in (None, "null"):
        return overrides, None
    folder = _latest() if name == "latest" else Path(name)
    new = [o for o in overrides if name_of(o) not in ("resume", "hydra.run.dir", "hydra.sweep.dir")]
    if name and (folder / SWEEP_RECORD).is_file():
        return _resumed_sweep(folder, new), folder
    if multirun:
        raise InputError(f"resume={name}: not the folder of a sweep (no {SWEEP_RECORD}), leave out the -m")
    record = folder / ".hydra" / "overrides.yaml"
    if not name or not record.is_file():
        raise InputError(f"resume={name}: name a run folder, one with {Path(*record.parts[-2:])} in it")
    recorded = [o for o in _read_yaml(record) if name_of(o) not in values and name_of(o) != "resume"]
    return [*recorded, *new, f"resume={quote_path(folder)}", f"hydra.run.dir={quote_path(folder)}"], None


def quote_path(folder: Path) -> str:
    """`folder` in the quotes that Hydra's grammar requires for spaces, brackets and commas."""
    return QuotedString(str(folder), quote=Quote.single).with_quotes()


def _resumed_sweep(folder: Path, new: list[str]) -> list[str]:
    """The command line of the sweep in `folder`, then the overrides `new`, which must not change its points."""
    record = _read_yaml(folder / SWEEP_RECORD)["hydra"]["overrides"]
    recorded = [*record["hydra"], *record["task"]]
    names = {name_of(o) for o in new}
    hydra = hydra_part(recorded)
    points = grid.with_params(grid.parse(recorded), hydra)
    _refuse_other_points(folder, points, new)
    _refuse_unrepeatable(folder, hydra, new)
    dropped = names | {"resume", "hydra.sweep.dir", "hydra.mode"}
    recorded = [o for o in recorded if name_of(o) not in dropped]
    if "hydra/launcher" in names:  # the keys of the earlier launcher do not apply to the new one
        recorded = [o for o in recorded if not name_of(o).startswith("hydra.launcher.")]
    return [*recorded, *new]


def _refuse_other_points(folder: Path, overrides: Sequence[Override], new: list[str]) -> None:
    swept_keys = {o.key_or_group for o in overrides if o.is_sweep_override()}
    for override in grid.parse(new):
        key = override.key_or_group
        sets_sweeper = key.startswith(("hydra.sweeper", "hydra/sweeper")) and key != "hydra.sweeper.n_trials"
        if key in swept_keys or sets_sweeper or override.is_sweep_override():
            raise InputError(
                f"{override.input_line}: {folder} has a sweep over {', '.join(sorted(swept_keys))}; "
                "other points need a sweep of their own"
            )


def _refuse_unrepeatable(folder: Path, hydra: DictConfig, new: list[str]) -> None:
    """Raise InputError for a search whose sampler would not propose the finished points again before new ones."""
    if not grid.searches(hydra):
        return
    if hydra.sweeper.storage is not None:
        raise InputError(f"resume={folder}: its study is in {hydra.sweeper.storage}: repeat the command to continue it")
    if hydra.sweeper.sampler.get("seed", 0) is None:
        raise InputError(
            f"resume={folder}: a search without hydra.sweeper.sampler.seed cannot be repeated, start a new one"
        )
    for override in grid.parse(new):
        if not override.is_hydra_override():
            raise InputError(f"{override.input_line}: {folder} has a search, whose scores must stay comparable")


def _latest() -> Path:
    """The newest folder that can be resumed; a sweep is as new as the newest checkpoint of its jobs.

    Raises InputError if there is none."""
    ages: dict[Path, float] = {file.parent: _modified(file) for file in Path("multirun").glob(f"*/*/{SWEEP_RECORD}")}
    runs = [*Path("outputs").glob("*/*/checkpoints/step-*"), *Path("multirun").glob("*/*/*/checkpoints/step-*")]
    for checkpoint in runs:
        run = checkpoint.parents[1]
        folder = run.parent if run.parent in ages else run
        ages[folder] = max(ages.get(folder, 0), _modified(checkpoint))
    if not ages:
        raise InputError("resume=latest: no run under outputs/ or multirun/ has a checkpoint, name the run folder")
    return max(ages, key=ages.get)


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _read_yaml(file: Path) -> Any:
    """The content of a record of Hydra's, with `${...}` in overrides as the user typed it."""
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)
