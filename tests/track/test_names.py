"""Tracker settings are refused before a model loads where the tracker would refuse them later; no key is written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lab.errors import InputError
from lora_lab.launch.config import check_inputs, compose
from lora_lab.runs import LONGEST_NAME, fitting
from lora_lab.settings.schema import Tracker
from lora_lab.track import KINDS, validate
from lora_lab.track.wandb import artifact_name

ROOT = Path(__file__).parents[2]
NAMES = ["", " ", "tofu", "두부 2", "a" * 128, "a" * 129, "두" * 128, "a\nb", "\x1b[31m", "\u202eb", "registry-a",
         "a_system", "a_run_artifact_links", "a" * 64, "a" * 65, *(f"a{mark}b" for mark in "/\\#?%:.-_")]  # fmt: skip


def refused(kind: str, **settings: object) -> str | None:
    """The sentence for settings of the group tracker, None if they are accepted."""
    try:
        validate(Tracker(kind=kind, **settings))
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
@pytest.mark.parametrize("key", ["project", "group", "tags"])
def test_a_name_is_refused_in_one_sentence_wherever_the_library_refuses_it(kind, key):
    if kind == "trackio":
        pytest.importorskip("trackio", reason='pip install "lora_lab[trackio]"')
    sentences = {name: refused(kind, **{key: [name] if key == "tags" else name}) for name in NAMES}
    assert sentences["tofu"] is None
    for name, sentence in sentences.items():
        assert sentence is not None or accepts(kind, key, name), f"{name!r} would leave the run untracked"
        assert sentence is None or (sentence.startswith(f"tracker.{key}=") and len(sentence) < 250)
        assert sentence is None or sentence.isprintable(), sentence
    if (kind, key) == ("wandb", "tags"):
        assert [name for name in NAMES if sentences[name] is None and len(name) >= 64] == ["a" * 64]


def accepts(kind: str, key: str, name: str) -> bool:
    """Whether the library itself takes the name, as it is."""
    try:
        if kind == "wandb":
            from wandb.sdk.wandb_settings import Settings

            Settings(**{"project": name} if key == "project" else {"run_tags": [name]} if key == "tags" else {})
        elif key == "project":
            from trackio.sqlite_storage import SQLiteStorage
            from trackio.utils import canonical_project_name

            SQLiteStorage.validate_project_name(name)
            return canonical_project_name(name) == name and len(f"{name}_system.parquet".encode()) < 256
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    ("variable", "value"),
    [("WANDB_PROJECT", "a/b"), ("WANDB_MODE", "of"), ("WANDB_TAGS", "good," + "a" * 65), ("WANDB_TAGS", "a,,b")],
)
def test_variables_that_wandb_would_refuse_are_named(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert refused("wandb").startswith(f"{variable}=")
    assert refused("off") is None


def test_the_command_line_checks_them_for_the_chosen_tracker():
    tags = f"tracker.tags=[{'a' * 65}]"
    with pytest.raises(InputError, match=r"tracker\.tags='a+'\.\.\.: has 65 characters, use at most 64"):
        check_inputs(compose("stage=train", "tracker=wandb", tags))
    for kind in set(KINDS) - {"wandb"}:
        if kind == "off" or not KINDS[kind].optional:
            check_inputs(compose("stage=train", f"tracker={kind}", tags))


@pytest.mark.parametrize("name", NAMES)
def test_names_that_the_program_makes_are_always_accepted(name):
    made = fitting(f"{name} rank 4 lr 0.001")
    assert refused("wandb", group=made) is None and refused("trackio", group=made) is None
    assert len(made) <= LONGEST_NAME and made.endswith(" rank 4 lr 0.001")
    artifact = artifact_name(name)
    assert len(artifact) <= 128 and artifact.isprintable() and not set(artifact) & set("/\\#?%:")


KEYS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "HF_TOKEN": "hf_" + "Zq7" * 11 + "x",
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "Yw6" * 11 + "x", "OPENAI_API_KEY": "sk-" + "Vr5" * 15,
}  # fmt: skip
TRACK = """
from pathlib import Path
from lora_lab.runs import write_manifest
from lora_lab.track import tracking
folder = Path("run")
folder.mkdir()
write_manifest(folder, "cpu", {})
with tracking(KIND, folder, "tofu", {"lr": 1e-4}, project="tofu", mode="offline") as tracker:
    tracker.numbers(1, {"train/loss": 0.5})
"""


@pytest.mark.parametrize("kind", ["wandb", "trackio", pytest.param("tensorboard", marks=pytest.mark.slow), "off"])
def test_no_key_of_the_environment_is_in_a_file_of_a_run(kind, tmp_path):
    if KINDS[kind].optional:
        pytest.importorskip(kind, reason=f'pip install "lora_lab[{kind}]"')
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "TRACKIO"))}
    environment |= KEYS | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    script = TRACK.replace("KIND", repr(kind))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()
    files = [file for file in tmp_path.rglob("*") if file.is_file() and not file.is_symlink()]
    assert len(files) > (kind != "off")
    for name, key in KEYS.items():
        texts = {str(file): file.read_bytes() for file in files} | {"output": done.stdout + done.stderr}
        assert [file for file, text in texts.items() if key.encode() in text] == [], name
