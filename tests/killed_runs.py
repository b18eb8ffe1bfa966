"""Run command lines that are killed at an exact file operation, and compare what runs leave.

One process imports the program and forks a child for each command line, because importing torch takes seconds."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from safetensors import safe_open
from safetensors.torch import load_file

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")  # audit events of Python
RANDOM_NAME = re.compile(r"\.[a-z0-9_]{8}\.")
RECORDS = (".hydra", ".lock", "lora_lab.log", "manifest.json", "job.json")  # of processes, not of what they do
VOLATILE = ("seconds", "images_per_second", "memory_mib")  # what no two runs have in common


@dataclass(frozen=True)
class Ended:
    """A command line that ended: its exit code (negative: the signal) and its file operations before that."""

    exit_code: int
    operations: list[str]
    output: str


class KillingShell:
    """Runs command lines of the program in `work`; see `killing_shell`."""

    def __init__(self, process: subprocess.Popen, work: Path) -> None:
        self.process, self.work = process, work

    def run(self, *argv: str, kill_at: int | None = None) -> Ended:
        """Run `argv`; with `kill_at` it is killed with SIGKILL before that file operation in a run folder."""
        self.process.stdin.write(json.dumps({"argv": argv, "kill_at": kill_at}) + "\n")
        self.process.stdin.flush()
        exit_code = json.loads(self.process.stdout.readline())
        operations = (self.work / "operations.txt").read_text().splitlines()
        return Ended(exit_code, operations, (self.work / "output.txt").read_text(errors="replace"))


@contextmanager
def killing_shell(work: Path) -> Iterator[KillingShell]:
    """Within the context a process that has imported the program waits for command lines."""
    argv = [sys.executable, __file__]
    with subprocess.Popen(argv, cwd=work, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield KillingShell(process, work)
        finally:
            process.kill()


def serve(commands: IO[str]) -> None:
    """Fork a child for each command line of `commands`, and print its exit code."""
    from lora_lab.__main__ import main
    from lora_lab.launch import grouping, run_job  # noqa: F401, so that no child has to import them
    from lora_lab.stages import train  # noqa: F401

    for line in commands:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            with Path("output.txt").open("w") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            sys.argv = ["lora_lab", *command["argv"]]
            _watch(command["kill_at"])
            code = main(command["argv"])
            sys.stdout.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _watch(kill_at: int | None) -> None:
    """Write every file operation in a run folder to operations.txt, and kill this process before that of `kill_at`."""
    root, record, count = Path.cwd(), Path("operations.txt").open("w", buffering=1), 0  # noqa: SIM115, to the end

    def happens(event: str, path: object) -> None:
        nonlocal count
        name = os.path.relpath(os.fsdecode(path), root) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if not name.startswith(("run/", "sweep/")) or "/.hydra" in name or name.endswith((".log", ".hydra")):
            return
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        record.write(f"{event} {RANDOM_NAME.sub('.*.', name)}\n")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                happens(event, arguments[0])
        elif event in EVENTS:
            happens(event, arguments[1] if event == "os.rename" else arguments[0])

    fsync = os.fsync  # it is no audit event
    os.fsync = lambda descriptor: (happens("fsync", os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor))[1]  # noqa: PTH115
    sys.addaudithook(hook)


def left_by(folder: Path) -> dict[str, object]:
    """What a run left: each file's content, without what no two runs have in common."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() or file.name.startswith(".")]
    names = {file: file.relative_to(folder).as_posix() for file in files}
    return {name: _content(file) for file, name in names.items() if not name.startswith(RECORDS)}


def _content(file: Path) -> object:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            return opened.metadata(), {key: value.tolist() for key, value in load_file(file).items()}
    if file.suffix == ".pt":
        return repr(torch.load(file, weights_only=True))
    if file.suffix in (".json", ".jsonl"):
        text = re.sub(rf'"({"|".join(VOLATILE)})": [\d.e+-]+', "", file.read_text())
        return re.sub(r'"sha256": {[^}]*}', "", text)
    return file.read_bytes() if file.is_file() else None


if __name__ == "__main__":
    serve(sys.stdin)
