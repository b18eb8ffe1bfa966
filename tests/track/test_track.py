"""Real W&B runs, each in a new interpreter with an empty home and no network."""

import json
import os
import pty
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from wandb_files import inspect, isolated

from lora_lab.errors import InputError
from lora_lab.track import tracking

ROOT = Path(__file__).parents[1]
NOWHERE = "http://127.0.0.1:9"

PRELUDE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from PIL import Image
from lora_lab import track
from lora_lab.errors import InputError
folder = Path("run")
def tracking(**more):
    return track.tracking("wandb", folder, "rank 4", {"lr": 1e-4, "adapter": {"r": 4}}, **more)
"""

STORY = """
with tracking(project="tofu", group="sweep", tags=["demo"]) as tracker:
    for step in range(1, 4):
        tracker.numbers(step, {"train/loss": 1 / step, "train/lr": 1e-4})
    tracker.images(3, {"validation/wink": (Image.new("RGB", (8, 8), "red"), "rank 4, step 3")})
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    tracker.table(3, [{"rank": 4, "picture": red, "subject": 0.5}, {"rank": 4, "picture": blue, "subject": None}])
try:
    with tracking(project="tofu", resume=True) as tracker:
        tracker.numbers(4, {"train/loss": 0.25})
        raise RuntimeError("the power went")
except RuntimeError:
    pass
with tracking(project="tofu") as tracker:
    tracker.numbers(1, {"train/loss": 7})
"""

USE = """
with tracking() as tracker:
    tracker.numbers(1, {"train/loss": 0.5})
"""


def run(root, script, **more):
    """Run the script in root/here, stdin closed; returns stdout, stderr, the seconds it took and the run folder."""
    env = isolated(root, **more)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        cwd=root / "here",
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    seconds = time.monotonic() - start
    return SimpleNamespace(out=done.stdout, err=done.stderr, seconds=seconds, folder=root / "here" / "run")


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    root = tmp_path_factory.mktemp("story")
    done = run(root, STORY)
    done.root = root
    done.synced = [str(root / "here" / line.rpartition("wandb sync ")[2]) for line in done.out.splitlines()]
    return done


def test_without_a_key_each_run_prints_once_that_it_is_offline_and_how_to_upload(story):
    assert story.err == ""
    lines = story.out.splitlines()
    assert len(lines) == 3
    start = "tracking offline (no W&B API key); to upload: wandb sync run/wandb/offline-run-"
    assert all(line.startswith(start) for line in lines), story.out


def test_an_offline_run_holds_the_names_the_config_and_the_last_numbers(story):
    first = inspect(story.synced[0], "--summary")
    assert (first["project"], first["name"], first["tags"]) == ("tofu", "rank 4", ["demo"])
    assert first["config"]["adapter"] == {"r": 4} and first["config"]["lr"] == 1e-4
    assert first["summary"]["train/loss"] == pytest.approx(1 / 3)
    assert first["exit_code"] == 0


def test_a_table_has_a_row_for_every_picture_with_its_numbers(story):
    (row,) = [r["history"]["item"] for r in inspect(story.synced[0]) if r["type"] == "history" and "pictures" in str(r)]
    files = Path(story.synced[0]) / "files"
    (file,) = files.glob("media/table/pictures*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["rank", "picture", "subject"] and row["global_step"] == 3
    assert table["data"] == [[4, "Image", 0.5], [4, "Image", None]]  # the pictures go with the table's artifact
    staged = [
        file.read_bytes() for file in (story.folder / "wandb" / "data" / "artifacts").rglob("*") if file.is_file()
    ]
    pixels = [Image.open(BytesIO(file)).convert("RGB").getpixel((0, 0)) for file in staged if file[1:4] == b"PNG"]
    assert sorted(pixels) == [(0, 0, 255), (255, 0, 0)]


def test_numbers_and_images_have_global_step_as_their_axis(story):
    records = inspect(story.synced[0])
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    losses = {row["global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3})
    (image,) = [row for row in rows if "validation/wink.path" in row]
    assert (image["global_step"], image["validation/wink.caption"]) == (3, "rank 4, step 3")
    picture = Image.open(Path(story.synced[0]) / "files" / image["validation/wink.path"])
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    rules = [record["metric"] for record in records if record["type"] == "metric"]
    axes = {rule["glob_name"]: rule["step_metric"] for rule in rules if "glob_name" in rule}
    assert axes == dict.fromkeys(("train/*", "validation/*", "score/*"), "global_step")


def test_a_resumed_run_keeps_its_id_and_a_new_one_does_not(story):
    first, resumed, other = (inspect(path, "--summary") for path in story.synced)
    assert first["run_id"] == resumed["run_id"] != other["run_id"]
    assert resumed["summary"]["train/loss"] == 0.25 and other["summary"]["train/loss"] == 7


def test_an_exception_marks_the_run_as_failed(story):
    assert inspect(story.synced[1], "--summary")["exit_code"] == 1


def test_wandb_writes_nothing_outside_the_run_folder(story):
    # A socket holds nothing; on a busy machine W&B's monitor may end before it has removed its own.
    files = [path for path in story.root.rglob("*") if not path.is_dir() and not path.is_socket()]
    assert [path for path in files if story.folder not in path.parents] == []


def test_there_is_no_prompt_for_a_key_at_a_terminal(tmp_path):
    parent, child = pty.openpty()
    env = isolated(tmp_path, TERM="xterm")
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + USE], cwd=tmp_path / "here", env=env, stdin=child, stdout=child, stderr=child
    )
    try:
        assert process.wait(timeout=40) == 0
    finally:
        process.kill()
        os.close(child)
    output = os.read(parent, 65536).decode()
    os.close(parent)
    assert output.startswith("tracking offline (no W&B API key)") and len(output.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("place", ["environment", pytest.param("netrc", marks=pytest.mark.slow)])
def test_an_unreachable_server_delays_the_run_but_does_not_stop_it(tmp_path, place):
    more = {"WANDB_BASE_URL": NOWHERE}
    if place == "environment":
        more["WANDB_API_KEY"] = "a" * 40
    else:
        isolated(tmp_path)
        netrc = tmp_path / "home" / ".netrc"
        netrc.write_text(f"machine 127.0.0.1:9\n  login user\n  password {'a' * 40}\n")
        netrc.chmod(0o600)
    done = run(tmp_path, "track.wandb.INIT_SECONDS = 1" + USE, **more)
    assert done.out.startswith("tracking offline (no connection: ") and len(done.out.splitlines()) == 1
    path = str(tmp_path / "here" / done.out.strip().rpartition("wandb sync ")[2])
    assert inspect(path, "--summary")["summary"]["train/loss"] == 0.5
    assert done.seconds < 20 and done.err == ""


@pytest.mark.slow
def test_a_server_that_answers_byte_by_byte_holds_neither_the_start_nor_the_end(tmp_path):
    def answer(connection):
        with connection, suppress(OSError):
            connection.recv(65536)
            for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 600:
                connection.sendall(bytes([byte]))
                time.sleep(0.2)

    def serve(server):
        with suppress(OSError):  # closed
            while True:
                threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        more = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": "a" * 40}
        done = run(tmp_path, "track.wandb.INIT_SECONDS = 1" + USE, **more)
    assert done.out.startswith("tracking offline (no connection: ") and done.seconds < 40


def test_online_mode_without_a_usable_key_is_refused_before_anything_is_written(tmp_path):
    script = """
try:
    with tracking(mode="online"): print("went on")
except InputError as error:
    print(error)
"""
    done = run(tmp_path, script)
    assert done.out.startswith("tracker.mode=online: no W&B API key; run `wandb login`")
    assert not list(done.folder.glob("wandb/*run*"))
    assert "40" in run(tmp_path, script, WANDB_API_KEY="short").out


@pytest.mark.slow
def test_a_dead_service_is_one_warning_and_ends_neither_this_run_nor_the_next(tmp_path):
    script = """
with tracking() as tracker:
    children = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True).stdout
    for child in children.split():
        os.kill(int(child), signal.SIGKILL)
    time.sleep(0.5)
    for step in (1, 2, 3):
        tracker.numbers(step, {"train/loss": 0.5})
print("trained")
with tracking() as tracker:
    tracker.numbers(1, {"train/loss": 0.75})
"""
    done = run(tmp_path, script)
    assert "trained" in done.out
    assert done.err.count("tracking failed") == 1 and "Traceback" not in done.err
    path = str(tmp_path / "here" / done.out.splitlines()[-1].rpartition("wandb sync ")[2])
    assert inspect(path, "--summary")["summary"]["train/loss"] == 0.75


def test_disabled_wandb_stays_disabled(tmp_path):
    done = run(tmp_path, USE, WANDB_MODE="disabled")
    assert done.out == done.err == "" and not list(done.folder.glob("wandb/*run*"))


def test_importing_the_module_imports_no_tracker():
    script = "import sys, lora_lab.track; print({'wandb', 'torch', 'tensorboard', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_tensorboard_shows_numbers_pictures_captions_and_the_config(tmp_path):
    with tracking("tensorboard", tmp_path, "rank 4", {"lr": 1e-4}) as tracker:
        tracker.numbers(1, {"train/loss": 0.5})
        tracker.images(2, {"validation/wink": (Image.new("RGBA", (8, 4), "red"), "rank 4, step 2")})
    events = accumulated(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5)]
    (image,) = events.Images("validation/wink")
    assert (image.step, image.width, image.height) == (2, 8, 4)
    assert events.Tensors("validation/wink/caption/text_summary")[0].tensor_proto.string_val == [b"rank 4, step 2"]
    assert b'"lr": 0.0001' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.slow
def test_a_resumed_tensorboard_run_shows_the_repeated_steps_once(tmp_path):
    for resume, first in ((False, 1), (True, 3)):  # killed after 5, resumed from the checkpoint at 2
        with tracking("tensorboard", tmp_path, "tofu", {}, resume=resume) as tracker:
            for step in range(first, 6):
                tracker.numbers(step, {"train/loss": float(step)})
        time.sleep(1.1)  # event files are read in the order of the second in their names
    assert [event.step for event in accumulated(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_a_missing_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match=r"pip install .*tensorboard"), tracking("tensorboard", tmp_path, "tofu", {}):
        pass


def test_tensorboard_on_a_full_disk_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with tracking("tensorboard", tmp_path, "tofu", {}) as tracker:
        tracker.numbers(1, {"train/loss": 1.0})
        tracker.numbers(2, {"train/loss": 1.0})
    assert caplog.text.count("tracking failed at step 1") == 1 and "step 2" not in caplog.text


def test_off_writes_nothing(tmp_path):
    with tracking("off", tmp_path, "tofu", {}) as tracker:
        tracker.numbers(1, {"train/loss": 0.5})
        tracker.images(1, {"validation/wink": (Image.new("RGB", (8, 8)), "caption")})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_refused_with_the_choices(tmp_path):
    with pytest.raises(InputError, match="wandb, trackio, tensorboard, off"), tracking("mlflow", tmp_path, "tofu", {}):
        pass


def accumulated(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events
