"""The command line that all benchmarks share."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def make_parser(command: str, docstring: str) -> argparse.ArgumentParser:
    """The parser of `python -m command` with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=docstring.splitlines()[0])
    parser.add_argument("out", type=lambda text: Path(text).resolve(), help="folder for base, pictures, runs and table")
    parser.add_argument("--also", nargs="*", default=[], help="further overrides of every run")
    parser.add_argument("--dry", action="store_true", help="narrow weights, on a CPU")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the command line; exits without a GPU, except for --dry."""
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("SDXL's size needs a CUDA GPU; --dry tries the benchmark on a CPU")
    return options


def run_main(main: Callable[[], None]) -> None:
    """Run `main`; if it is stopped or fails, the processes that it started are stopped too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except subprocess.CalledProcessError as error:  # a run failed: its output says why
        sys.exit(f"{error.output}\n{error}")
