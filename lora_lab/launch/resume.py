"""`resume=`: a run or a sweep is taken up again by the command that began it."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from lora_lab.errors import InputError
from lora_lab.launch import grid
from lora_lab.launch.command_line import hydra_part, name_of
from lora_lab.launch.sweep_folder import RECORD


def resumed(overrides: list[str], multirun: bool) -> tuple[list[str], Path | None]:
    """With `resume=FOLDER` among them: the overrides that began that run or sweep, then the new ones, into that folder,
    which comes second if it is a sweep's.

    `latest` is the newest run or sweep under outputs/ and multirun/ that can go on. Raises InputError."""
    given = {name_of(o): o.partition("=")[2].strip("'\"") for o in overrides}
    if given.get("resume") in (None, "null"):
        return overrides, None
    folder = _latest() if given["resume"] == "latest" else Path(given["resume"])
    new = [o for o in overrides if name_of(o) not in ("resume", "hydra.run.dir", "hydra.sweep.dir")]
    if given["resume"] and (folder / RECORD).is_file():
        return _sweep(folder, new), folder
    if multirun:
        raise InputError(f"resume={given['resume']}: not the folder of a sweep (no {RECORD}), leave out the -m")
    record = folder / ".hydra" / "overrides.yaml"
    if not given["resume"] or not record.is_file():
        raise InputError(f"resume={given['resume']}: name a run folder, one with {Path(*record.parts[-2:])} in it")
    before = [str(o) for o in OmegaConf.load(record)]
    kept = [o for o in before if name_of(o) not in given and name_of(o) != "resume"]
    return [*kept, *new, f"resume={quoted(folder)}", f"hydra.run.dir={quoted(folder)}"], None


def quoted(folder: Path) -> str:
    """As Hydra's grammar wants a path that may have spaces, brackets or commas."""
    return QuotedString(str(folder), quote=Quote.single).with_quotes()


def _sweep(folder: Path, new: list[str]) -> list[str]:
    """The command line of the sweep in `folder`, with the new overrides, which must leave its points as they are."""
    record = OmegaConf.load(folder / RECORD).hydra.overrides
    before = [str(o) for o in [*record.hydra, *record.task]]
    names = {name_of(o) for o in new}
    hydra = hydra_part(before)
    swept = grid.with_params(grid.parse(before), hydra)
    _refuse_other_points(folder, swept, new)
    _refuse_unrepeatable(folder, hydra, new)
    dropped = names | {"resume", "hydra.sweep.dir", "hydra.mode"}
    kept = [o for o in before if name_of(o) not in dropped]
    if "hydra/launcher" in names:  # its settings are another's
        kept = [o for o in kept if not name_of(o).startswith("hydra.launcher.")]
    return [*kept, *new]


def _refuse_other_points(folder: Path, swept: Sequence, new: list[str]) -> None:
    tried = {o.key_or_group for o in swept if o.is_sweep_override()}
    for override in grid.parse(new):
        key = override.key_or_group
        other = key.startswith(("hydra.sweeper", "hydra/sweeper")) and key != "hydra.sweeper.n_trials"
        if key in tried or other or override.is_sweep_override():
            raise InputError(
                f"{override.input_line}: {folder} has a sweep over {', '.join(sorted(tried))}; "
                "other points are a sweep of their own"
            )


def _refuse_unrepeatable(folder: Path, hydra: DictConfig, new: list[str]) -> None:
    """A search goes on by asking its sampler again, which must propose again what was done and then what comes next."""
    if not grid.searches(hydra):
        return
    if hydra.sweeper.storage is not None:
        raise InputError(
            f"resume={folder}: its study is in {hydra.sweeper.storage}: the same command goes on with that"
        )
    if hydra.sweeper.sampler.get("seed", 0) is None:
        raise InputError(f"resume={folder}: a search without hydra.sweeper.sampler.seed cannot be repeated, start anew")
    for override in grid.parse(new):
        if not override.is_hydra_override():
            raise InputError(f"{override.input_line}: {folder} has a search, whose scores must stay comparable")


def _latest() -> Path:
    """A sweep is as new as the newest checkpoint in it."""
    found: dict[Path, float] = {record.parent: _age(record) for record in Path("multirun").glob(f"*/*/{RECORD}")}
    runs = [*Path("outputs").glob("*/*/checkpoints/step-*"), *Path("multirun").glob("*/*/*/checkpoints/step-*")]
    for checkpoint in runs:
        run = checkpoint.parents[1]
        folder = run.parent if run.parent in found else run
        found[folder] = max(found.get(folder, 0), _age(checkpoint))
    if not found:
        raise InputError("resume=latest: no run under outputs/ or multirun/ has a checkpoint, name the run folder")
    return max(found, key=found.get)


def _age(path: Path) -> float:
    return path.stat().st_mtime
