"""Run lora_lab under a profiler and write down which of its modules are entered, in order.

    python module_trace.py TRACE.json CHECKOUT FILES ARGUMENTS OF LORA_LAB...

A module is entered when a function of it is called for the first time, in any thread of this process. Not counted are
the code that an import executes (module level and class bodies), functions called while a module of the package is
imported (decorators, generated constants), and lambdas and comprehensions. Code of other files, as of a page's
template, belongs to no module.

The trace is {"entered": [paths], "milestones": {name: how many were entered before it}}. Milestones are the first
optimizer step and the appearance of files: FILES is JSON, {name: glob pattern within the working folder}."""

import json
import os
import runpy
import sys
import threading
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType

from torch.optim.optimizer import register_optimizer_step_pre_hook

ANONYMOUS = {"<lambda>", "<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}


class ModuleTrace:
    """The modules entered so far, and how many they were at each milestone."""

    def __init__(self, package: Path, files: dict[str, str]) -> None:
        self.entered: list[str] = []
        self.milestones: dict[str, int] = {}
        self._prefix = f"{package}{os.sep}"
        self._awaited = dict(files)
        self._known: set[str] = set()

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        """For sys.setprofile. Files are looked for only when a new module is about to be counted."""
        code = frame.f_code
        file = code.co_filename
        if event != "call" or file in self._known or not file.startswith(self._prefix) or not file.endswith(".py"):
            return
        is_function = code.co_flags & CO_OPTIMIZED and code.co_name not in ANONYMOUS
        if is_function and not self._is_importing(frame):
            self._known.add(file)
            self.check_files()
            self.entered.append(file.removeprefix(self._prefix))

    def reach(self, milestone: str) -> None:
        """Note a milestone, if it is the first time."""
        self.milestones.setdefault(milestone, len(self.entered))

    def check_files(self) -> None:
        """Reach the milestones whose files are there."""
        for milestone, pattern in list(self._awaited.items()):
            if any(Path().glob(pattern)):
                self.reach(milestone)
                del self._awaited[milestone]

    def _is_importing(self, frame: FrameType) -> bool:
        """Whether the call comes from the module level of the package; that of the program itself does not count."""
        caller = frame.f_back
        while caller:
            code = caller.f_code
            if code.co_name == "<module>" and code.co_filename.startswith(self._prefix):
                return not code.co_filename.endswith("__main__.py")
            caller = caller.f_back
        return False


def main(output: str, checkout: str, files: str, *argv: str) -> int:
    """Returns the exit code of lora_lab."""
    trace, target = ModuleTrace(Path(checkout).resolve() / "lora_lab", json.loads(files)), Path(output).resolve()
    register_optimizer_step_pre_hook(lambda *step: trace.reach("first optimizer step"))
    sys.argv[1:] = argv
    exit_code: object = 0
    threading.setprofile(trace.profile)
    sys.setprofile(trace.profile)
    try:
        runpy.run_module("lora_lab", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        exit_code = end.code or 0
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    trace.check_files()
    target.write_text(json.dumps({"entered": trace.entered, "milestones": trace.milestones}), encoding="utf-8")
    return exit_code if isinstance(exit_code, int) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
