"""What Hydra calls: one run, or one job of a sweep, in this process or in another one, on another machine even.

Imports nothing heavy. In another process all there is to tell the first one are files."""

import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lora_lab.board.hook import rewrite_page, sweep_of
from lora_lab.console import log, say, speak_as
from lora_lab.errors import InputError, RunError
from lora_lab.launch import command_line, config, stopping
from lora_lab.launch import sweep_folder as sweeps
from lora_lab.launch.grid import searches
from lora_lab.settings import schema

exit_codes: list[int] = []  # of what failed here and left no failed.json, as the jobs of a sweep do
told: list[Path] = []  # folders of jobs whose failure was told on this process's stderr
_home: int | None = None


def at_home() -> None:
    """This process is the one that was typed in; a job that runs in another has others beside it."""
    global _home
    _home = os.getpid()
    exit_codes.clear()
    told.clear()


def job(cfg: DictConfig) -> float | None:
    """Do what `cfg` says; returns what a sweeper may maximise, the score, or None for a run that has none or failed.

    Optuna marks a trial that returned None as failed and goes on; on nan it breaks off. Errors end here: Hydra would
    add lines of its own and tell only the first."""
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    prepare_process()
    if settings.mode == RunMode.MULTIRUN:
        return _of_sweep(cfg, settings, folder)
    try:
        score = _done(config.typed(cfg), folder)
        (folder / "failed.json").unlink(missing_ok=True)  # of a job of a sweep, taken up alone
        return score
    except Exception as error:
        exit_codes.append(report(error))
        if exit_codes == [2]:
            _remove_if_unused(folder)
        return None
    finally:
        if sweep := sweep_of(folder):
            rewrite_page(sweep)


def prepare_process() -> None:
    """What must be set before torch is imported, and before anything is printed."""
    # A GPU's memory in pieces that grow: what was freed in one size can be used in another.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Korean file name must not end a run on an ASCII terminal
            stream.reconfigure(errors="backslashreplace")


def _of_sweep(cfg: DictConfig, settings: DictConfig, folder: Path) -> float | None:
    sweep, overrides = Path(settings.sweep.dir), list(settings.overrides.task)
    elsewhere = _home != os.getpid()
    if elsewhere:
        os.chdir(settings.runtime.cwd)  # Ray's workers begin in a folder of their own
        speak_as(f"#{settings.job.num} ")
    stopping.stop_with(sweep / sweeps.STOP)
    ours = False
    try:
        if stopping.asked():
            raise KeyboardInterrupt
        begun = sweeps.begun(folder, settings.job.num)
        own = begun == sorted(overrides)
        if own and (result := sweeps.result_of(folder)):
            say(f"{folder} is done")
            return sweeps.score_of(result)
        if begun and searches(settings):
            if not own:
                raise InputError(f"{folder} has another trial: the search cannot be repeated, start anew")
            if (folder / "failed.json").is_file():  # what was proposed next took it for failed
                return None
        ours = True
        typed = settled(config.typed(cfg), sweep)
        with sweeps.held(folder):
            if begun:
                go_on(typed, folder)
            sweeps.begin(folder, settings.job.num, overrides)
            score = _done(typed, folder)
        if elsewhere:
            say(f"done{'' if score is None else f', score {score:.3f}'}: {folder}")
        return score
    except KeyboardInterrupt:
        if not elsewhere:
            raise
        return None  # an exception would make the launcher kill the others, which are saving their checkpoints
    except Exception as error:
        if ours:
            failed(folder, overrides, error)
        else:
            exit_codes.append(report(error, f"{' '.join(overrides)}: "))
        return None
    finally:  # Ctrl-C is no failure, but how far the job came is on the page
        stopping.stop_with(None)
        rewrite_page(sweep)


def failed(folder: Path, overrides: Sequence[str], error: Exception) -> None:
    """Tell and write down why the job of `folder` failed."""
    sweeps.write_failure(folder, sentence(error), report(error, f"{' '.join(overrides)}: "))
    told.append(folder)


def settled(typed: schema.Config, sweep: Path) -> schema.Config:
    """One group for the tracker, and nothing published unless that is asked for."""
    if typed.tracker.group is None:
        typed.tracker.group = "-".join(sweep.parts[-2:])  # date and time
    typed.publish = bool(typed.publish)
    return typed


def go_on(typed: schema.Config, folder: Path) -> None:
    """With what this job left in `folder` when it was stopped."""
    if isinstance(typed.stage, schema.Train) and not any(folder.glob("checkpoints/step-*/training.json")):
        (folder / "metrics.jsonl").unlink(missing_ok=True)  # training begins again and writes the very same lines
        typed.resume = None
    else:
        typed.resume = str(folder)


def _done(typed: schema.Config, folder: Path) -> float | None:
    from lora_lab.stages import run

    run(typed, folder)
    return sweeps.score_of(sweeps.result_of(folder) or {})


def report(error: Exception, whose: str = "", overrides: Sequence[str] = ()) -> int:
    """Say on stderr what went wrong; returns the exit code."""
    if isinstance(error, (InputError, RunError, HydraException, OmegaConfBaseException)):
        print(f"lora_lab: {whose}{sentence(error, overrides)}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        log.info("%s", sentence(error), exc_info=error)
    return 2 if isinstance(error, (InputError, HydraException, OmegaConfBaseException)) else 1


def sentence(error: Exception, overrides: Sequence[str] = ()) -> str:
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, (InputError, HydraException, OmegaConfBaseException)):
        return command_line.explain(error, overrides)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _remove_if_unused(folder: Path) -> None:
    """A run that was refused leaves nothing behind, if all there is are Hydra's notes and an empty log."""
    outputs = Path.cwd() / "outputs"
    if outputs not in folder.parents:  # hydra.run.dir= may name any folder, also one with a past
        return
    if all(f.name == ".hydra" or (f.suffix == ".log" and not f.stat().st_size) for f in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)
        for empty in (folder.parent, outputs):
            with suppress(OSError):
                empty.rmdir()
