"""The entrypoint: python -m lora_lab stage=train lr=1e-4

Imports nothing heavy: a wrong command line is answered in half a second."""

import atexit
import gc
import sys

from lora_lab import __version__
from lora_lab.errors import InputError
from lora_lab.launch import command_line, config
from lora_lab.launch.command_line import expand_resume
from lora_lab.launch.config import check_inputs
from lora_lab.launch.explain import explain
from lora_lab.launch.help import help_text
from lora_lab.launch.run_job import prepare_process, report, run_once
from lora_lab.launch.sweep import run_sweep
from lora_lab.runs import interrupt_on_signals


def cli() -> None:
    """Run the command line of this process, and exit with the code of `main`."""
    interrupt_on_signals()
    atexit.register(gc.freeze)  # else the last garbage collection, over all models, takes a sweep two seconds
    sys.exit(main(sys.argv[1:]))


def main(argv: list[str]) -> int:
    """Run a command line. Returns the exit code: 0 done, 2 wrong input or configuration, 1 anything else.

    An error of the input is one sentence on stderr."""
    overrides: list[str] = []
    try:
        prepare_process()
        config.register()
        if "--version" in argv:
            print(f"lora_lab {__version__}")
            return 0
        arguments = command_line.read_arguments(argv)
        if arguments.help:
            print(help_text(), end="")
            return 0
        overrides, sweep = expand_resume(arguments.overrides, arguments.multirun)
        arguments.overrides = overrides
        if arguments.hydra_help or arguments.shell_completion:
            command_line.show(arguments)
            return 0
        command = command_line.check(overrides, arguments.multirun or sweep is not None)
        if arguments.cfg or arguments.info or arguments.resolve:
            command_line.show(arguments)
            return 0
        for run in command.runs:
            check_inputs(run)
        if command.is_sweep:
            return run_sweep(command.composition, command.runs, sweep)
        return run_once(command.composition, command.runs[0])
    except (OSError, ValueError) as error:  # a run folder that cannot be created, or flags that contradict each other
        return report(InputError(explain(error)))
    except KeyboardInterrupt as interrupt:
        print(f"\nlora_lab: {str(interrupt) or 'stopped'}", file=sys.stderr)
        return 1
    except Exception as error:
        return report(error, overrides=overrides)


if __name__ == "__main__":
    cli()
