"""Real runs of trackio, each test in a new process, because the database is chosen when trackio is imported."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lora_lab.errors import InputError
from lora_lab.track import tracking

ROOT = Path(__file__).parents[1]
PRELUDE = """
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from PIL import Image
from lora_lab.track import tracking

def refuse(*where, **more):
    os.write(2, f"asked the network for {where}".encode())
    raise OSError("no network")

socket.socket.connect = socket.getaddrinfo = refuse
red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))

def track(job, name="tofu rank 4", **more):
    Path(job).mkdir(parents=True, exist_ok=True)
    config = {"lr": 1e-4, "adapter": {"r": 4}}
    return tracking("trackio", Path(job), name, config, project="tofu", group="sweep", **more)
"""


@pytest.fixture
def installed():
    pytest.importorskip("trackio", reason='pip install "lora_lab[trackio]"')


def run(root: Path, script: str, **more: str) -> subprocess.CompletedProcess:
    """Run the script in `root`, as somebody who is logged in at Hugging Face and uses trackio elsewhere."""
    away = {"HF_TOKEN": "hf_" + "a" * 34, "TRACKIO_SPACE_ID": "somebody/space", "HF_HUB_OFFLINE": "0"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRACKIO", "HF_"))}
    command = [sys.executable, "-c", PRELUDE + script]
    environment |= away | {"PYTHONPATH": str(ROOT), "HOME": str(root)} | more
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def logged(root: Path) -> dict[str, list[tuple[int, dict]]]:
    """Of every run in the database, by its id, what was logged: step and values."""
    with sqlite3.connect(root / "trackio" / "tofu.db") as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
    runs: dict[str, list[tuple[int, dict]]] = {}
    for number, name, step, values in rows:
        runs.setdefault(f"{name} {number}", []).append((step, json.loads(values)))
    return runs


def test_runs_side_by_side_keep_numbers_pictures_table_and_config_on_this_computer(installed, tmp_path):
    done = run(tmp_path, """
with ExitStack() as stack:
    jobs = [stack.enter_context(track(f"time/{number}")) for number in (0, 1)]
    for step in (1, 2):
        for job in jobs:
            job.numbers(step, {"train/loss": 1 / step})
    jobs[0].images(2, {"validation/wink": (red, "rank 4, step 2")})
    jobs[0].table(2, [{"rank": 4, "picture": red, "subject": 0.5}, {"rank": 4, "picture": blue, "subject": None}])
""")  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == 2 * "tracking; to show it: TRACKIO_DIR=trackio trackio show --project tofu\n"
    one, other = (value for _, value in sorted(logged(tmp_path).items()))
    assert other == [(1, {"train/loss": 1}), (2, {"train/loss": 0.5})] == one[:2]
    (_, image), (_, table) = one[2:]
    picture = image["validation/wink"]
    assert picture["caption"] == "rank 4, step 2" and colour(tmp_path, picture) == (255, 0, 0)
    cells = table["pictures"]["_value"]
    assert [(row["rank"], row["subject"], colour(tmp_path, row["picture"])) for row in cells] == [
        (4, 0.5, (255, 0, 0)), (4, None, (0, 0, 255))
    ]  # fmt: skip
    with sqlite3.connect(tmp_path / "trackio" / "tofu.db") as database:
        configs = [json.loads(config) for (config,) in database.execute("select config from configs")]
    assert [(c["lr"], c["adapter"], c["_Group"], c["_Username"]) for c in configs] == 2 * [
        (1e-4, {"r": 4}, "sweep", None)
    ]


def colour(root: Path, image: dict) -> tuple:
    return Image.open(root / "trackio" / "media" / image["file_path"]).convert("RGB").getpixel((0, 0))


def test_a_resumed_run_is_continued_even_if_its_name_has_changed(installed, tmp_path):
    run(tmp_path, """
for job in ("one/0", "other/0"):
    with track(job) as tracker:
        tracker.numbers(1, {"train/loss": 1})
""")  # fmt: skip
    run(tmp_path, """
with track("one/0", "tofu rank 4 steps 900", resume=True) as tracker:
    tracker.numbers(2, {"train/loss": 0.5})
""")  # fmt: skip
    assert sorted([step for step, _ in values] for values in logged(tmp_path).values()) == [[1], [1, 2]]


def test_a_database_that_cannot_be_written_is_one_warning(installed, tmp_path):
    (tmp_path / "file").write_text("no folder")
    script = """
with track("0") as tracker:
    tracker.numbers(1, {"train/loss": 1})
    tracker.images(1, {"validation/wink": (red, "")})
print("trained")
"""
    done = run(tmp_path, script, TRACKIO_DIR=str(tmp_path / "file"))
    assert done.stdout == "trained\n"
    assert done.stderr.count("\n") == 1 and "set TRACKIO_DIR to another folder" in done.stderr


def test_a_missing_trackio_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match=r"pip install .*trackio"), tracking("trackio", tmp_path, "tofu", {}):
        pass
