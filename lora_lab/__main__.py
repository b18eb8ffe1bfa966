"""python -m lora_lab stage=train lr=1e-4

Imports nothing heavy: a wrong command line is answered in half a second."""

import atexit
import gc
import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path

import hydra

from lora_lab import __version__
from lora_lab.board.hook import attach_page, rewrite_page
from lora_lab.errors import InputError
from lora_lab.launch import command_line, config, packed_launcher, stopping
from lora_lab.launch import sweep_folder as sweeps
from lora_lab.launch.grid import searches
from lora_lab.launch.help import help_text
from lora_lab.launch.inputs import check_inputs
from lora_lab.launch.job import at_home, exit_codes, job, prepare_process, report, sentence, settled, told
from lora_lab.launch.resume import quoted, resumed
from lora_lab.runs import as_typed
from lora_lab.settings import schema

main = hydra.main(config_path=str(config.CONF), config_name="config", version_base="1.3")(job)


def cli() -> None:
    """Exit codes: 0 done, 2 wrong input or configuration (one sentence on stderr), 1 anything else."""
    prepare_process()
    atexit.register(gc.freeze)  # to look through all networks for garbage once more takes a sweep's process two seconds
    sys.exit(_exit_code(sys.argv[1:]))


def _exit_code(argv: list[str]) -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that the sentence is ours
    at_home()
    overrides: list[str] = []
    try:
        config.register()
        packed_launcher.register()
        if "--version" in argv:
            print(f"lora_lab {__version__}")
            return 0
        given = command_line.arguments(argv)
        if given.help:
            print(help_text(), end="")
            return 0
        overrides, sweep = resumed(given.overrides, given.multirun)
        multirun = given.multirun or sweep is not None
        only_told = given.hydra_help or given.shell_completion
        if not only_told:
            runs = command_line.check(overrides, multirun)
            if not (given.cfg or given.info):
                for run in runs:
                    check_inputs(run)
        flags = [a for a in argv if a.startswith("-") or a in (given.cfg, given.package, given.info)]
        if given.cfg == "job" and not given.resolve:
            flags.append("--resolve")  # values, not where they come from
        if multirun and not (only_told or given.cfg or given.info):
            return _sweep(flags, overrides, sweep, runs)
        sys.argv[1:] = [*flags, *overrides]
        main()
    except (OSError, ValueError) as error:  # Hydra could not make the run folder, or its flags contradict each other
        return report(InputError(command_line.explain(error)))
    except KeyboardInterrupt as interrupt:
        return _stopped(str(interrupt) or "stopped")
    except Exception as error:
        return report(error, overrides=overrides)
    return _worst(exit_codes)


def _sweep(flags: list[str], overrides: list[str], before: Path | None, runs: list[schema.Config]) -> int:
    """All jobs of a sweep, `runs`, into its folder `before` if it goes on."""
    hydra_part = command_line.hydra_part(overrides)
    named = any(command_line.name_of(o) == "hydra.sweep.dir" for o in overrides)
    if before:
        sweeps.refuse_running(before)
    # An absolute path, for a job that runs elsewhere.
    sweep = (before or sweeps.claim(Path(hydra_part.sweep.dir), named)).absolute()
    hydra_own = [o for o in overrides if command_line.name_of(o).startswith("hydra")]
    sweeps.write_record(sweep, hydra_own, [o for o in overrides if o not in hydra_own])
    (sweep / sweeps.STOP).unlink(missing_ok=True)
    here = hydra_part.launcher["_target_"].endswith((".BasicLauncher", ".PackedLauncher"))
    kept = [o for o in overrides if command_line.name_of(o) != "hydra.sweep.dir"]
    sys.argv[1:] = [*dict.fromkeys([*flags, "--multirun"]), *kept, f"hydra.sweep.dir={quoted(sweep)}"]
    try:
        with nullcontext() if here else stopping.stopping_jobs(sweep / sweeps.STOP):
            main()
    except KeyboardInterrupt as interrupt:
        return _stopped(str(interrupt).partition(";")[0] or "stopped", sweep)
    except Exception as error:  # of a launcher or a sweeper: what goes wrong in a job ends there
        began, codes = sweeps.has_jobs(sweep), _tell(sweep)
        why = "no job has a score" if began and searches(hydra_part) and not sweeps.scored(sweep) else sentence(error)
        print(f"lora_lab: the sweep broke off: {why}{f'; {_goes_on(sweep)}' if began else ''}", file=sys.stderr)
        return _worst([*codes, 1])
    finally:
        (sweep / sweeps.STOP).unlink(missing_ok=True)
        sweeps.release(sweep, named or before is not None)
    codes = _tell(sweep)
    if page := rewrite_page(sweep):
        print(f"\ncompare the runs: {as_typed(page)}", flush=True)
        if tracked := [run for run in runs if run.tracker.kind == "wandb"]:
            attach_page(sweep, settled(tracked[0], sweep).tracker)
    return _worst([*codes, *exit_codes])


def _tell(sweep: Path) -> list[int]:
    """Say of the jobs that failed in other processes why; returns the exit codes of all that failed."""
    failed = sweeps.failures(sweep)
    for failure in failed:
        if failure.folder not in told:
            print(f"lora_lab: {as_typed(failure.folder)}: {failure.error}", file=sys.stderr)
    return [failure.exit_code for failure in failed]


def _worst(codes: list[int]) -> int:
    return 1 if 1 in codes else max(codes, default=0)


def _stopped(how: str, sweep: Path | None = None) -> int:
    print(f"\nlora_lab: {how}{f'; {_goes_on(sweep)}' if sweep else ''}", file=sys.stderr)
    return 1


def _goes_on(sweep: Path) -> str:
    return f"go on with: python -m lora_lab {shlex.quote(f'resume={as_typed(sweep)}')}"


if __name__ == "__main__":
    cli()
