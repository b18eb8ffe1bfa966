"""What the commands of all benchmarks have in common."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def parser_of(command: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=about.splitlines()[0])
    parser.add_argument("out", type=lambda text: Path(text).resolve(), help="folder for base, pictures, runs and table")
    parser.add_argument("--also", nargs="*", default=[], help="further overrides of every run")
    parser.add_argument("--dry", action="store_true", help="a few numbers wide, on a CPU")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    asked = parser.parse_args()
    if not asked.dry and not torch.cuda.is_available():
        parser.error("SDXL's size needs a CUDA GPU; --dry shows the way through on a CPU")
    return asked


def carry_out(main: Callable[[], None]) -> None:
    """Run `main`; where it is stopped or fails, so is what it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except subprocess.CalledProcessError as error:  # a run failed: its own words say why
        sys.exit(f"{error.output}\n{error}")
