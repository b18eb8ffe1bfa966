"""python -m lora_lab stage=train lr=1e-4

Imports nothing heavy: a wrong command line is answered in half a second."""

import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lora_lab import __version__, command_line, config
from lora_lab.board.hook import note_failure, rewrite_page, sweep_of
from lora_lab.errors import InputError, RunError

_failures: list[int] = []  # exit codes of the jobs that failed; without a sweep there is one job


@hydra.main(config_path=str(config.CONF), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """One run, or one job of a sweep. Its errors end here: Hydra would add lines of its own and tell only the first."""
    from lora_lab.stages import run

    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    sweep = settings.mode == RunMode.MULTIRUN
    compared_in = Path(settings.sweep.dir) if sweep else sweep_of(folder)
    try:
        typed = config.typed(cfg)
        if sweep and typed.tracker.group is None:  # one group for all jobs: date and time of the sweep
            typed.tracker.group = "-".join(Path(settings.sweep.dir).parts[-2:])
        run(typed, folder)
        note_failure(folder, None)
    except Exception as error:
        _failures.append(_report(error, f"{' '.join(settings.overrides.task)}: " if sweep else ""))
        if _failures == [2] and not sweep:
            _remove_if_unused(folder)
        if compared_in:
            note_failure(folder, _sentence(error))
    finally:  # Ctrl-C is no failure, but how far the job came is on the page
        if compared_in:
            rewrite_page(compared_in)


def cli() -> None:
    """Exit codes: 0 done, 2 wrong input or configuration (one sentence on stderr), 1 anything else."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a Korean file name must not end a run on an ASCII terminal
    sys.exit(_exit_code(sys.argv[1:]))


def _exit_code(argv: list[str]) -> int:
    # A GPU's memory in pieces that grow: what was freed in one size can be used in another.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that the sentence is ours
    _failures.clear()
    overrides: list[str] = []
    try:
        config.register()
        if "--version" in argv:
            print(f"lora_lab {__version__}")
            return 0
        given = command_line.arguments(argv)
        if given.help:
            print(command_line.help_text(), end="")
            return 0
        overrides = command_line.resumed(given.overrides, given.multirun)
        if not (given.hydra_help or given.shell_completion):
            runs = command_line.check(overrides, given.multirun)
            if not (given.cfg or given.info):
                for run in runs:
                    command_line.refuse_missing(run)
        flags = [a for a in argv if a.startswith("-") or a in (given.cfg, given.package, given.info)]
        if given.cfg == "job" and not given.resolve:
            flags.append("--resolve")  # values, not where they come from
        sys.argv[1:] = [*flags, *overrides]
        main()
    except (OSError, ValueError) as error:  # Hydra could not make the run folder, or its flags contradict each other
        return _report(InputError(command_line.explain(error)))
    except KeyboardInterrupt as interrupt:
        print(f"\nlora_lab: {str(interrupt) or 'stopped'}", file=sys.stderr)
        return 1
    except Exception as error:
        return _report(error, overrides=overrides)
    return 1 if 1 in _failures else max(_failures, default=0)


def _report(error: Exception, job: str = "", overrides: Sequence[str] = ()) -> int:
    """Say on stderr what went wrong; returns the exit code."""
    if isinstance(error, (InputError, HydraException, OmegaConfBaseException)):
        print(f"lora_lab: {job}{command_line.explain(error, overrides)}", file=sys.stderr)
        return 2
    if isinstance(error, RunError):
        print(f"lora_lab: {job}{error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def _sentence(error: Exception) -> str:
    if isinstance(error, (InputError, HydraException, OmegaConfBaseException)):
        return command_line.explain(error)
    if isinstance(error, RunError):
        return str(error)
    return " ".join(traceback.format_exception_only(error)[-1].split())  # the traceback is in the terminal


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


if __name__ == "__main__":
    cli()
