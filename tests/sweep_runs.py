"""Sweeps of short trainings on the bundled tiny base, each in a process of its own, for tests of the launchers."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file
from tiny_runs import assert_same

from lora_lab import demo

SHORT = (
    "-m", "stage=train", "dataset=folder", "dataset.root=tofu", "refiner=off", "device=cpu", "tracker=off",
    "rank=2", "batch_size=1", "steps=30", "sampler.steps=1", "model.resolution=64", "stage.checkpoint_every=1",
    "stage.keep_checkpoints=9999", "stage.validate_every=0", "stage.prompts=['A {trigger}']", "stage.seeds=[0]",
    "hydra.sweep.dir=sweep",
)  # fmt: skip
NO_JUDGE = "model.judge=null"
LIMIT = 240  # seconds


def pictures(work: Path) -> None:
    """Two pictures of the tofu with their captions as `work`/tofu."""
    (work / "tofu").mkdir(parents=True)
    home = Path(demo.__file__).parent / "tofu"
    rows = (home / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    (work / "tofu" / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for row in rows:
        name = json.loads(row)["file_name"]
        shutil.copy(home / name, work / "tofu")


def start(work: Path, *argv: str, python: str = sys.executable, **environment: str) -> subprocess.Popen:
    """The program in a session of its own, as from a terminal of its own: a signal to it reaches its children too."""
    return subprocess.Popen(
        [python, "-m", "lora_lab", *argv],
        cwd=work,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(started: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        out, err = started.communicate(timeout=LIMIT)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    return started.returncode, out, err


def interrupt(
    started: subprocess.Popen, number: signal.Signals, *when: Path, children: bool = True
) -> tuple[int, str, str]:
    """Send a signal as soon as all files of `when` are there; without `children` to the process that was typed in."""
    wait_for(started, *when)
    (os.killpg if children else os.kill)(started.pid, number)
    return ended(started)


def wait_for(started: subprocess.Popen, *when: Path) -> None:
    until = time.monotonic() + LIMIT
    while not all(path.exists() for path in when) and started.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


def assert_same_run(one: Path, other: Path) -> None:
    """The same LoRA, the same numbers of every step, the same pictures after 30 of them."""
    assert_same(*(load_file(run / "lora" / "HANA_TOFU.safetensors") for run in (one, other)))
    assert learnt(one) == learnt(other)
    shown = [
        {f.relative_to(run): f.read_bytes() for f in run.glob("samples/step-000030/*.png")} for run in (one, other)
    ]
    assert shown[0] and shown[0] == shown[1]


def learnt(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
