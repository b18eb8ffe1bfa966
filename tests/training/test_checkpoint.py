"""Checkpoints that a disk, a kill or a power failure damaged: told in one sentence, and the next older one is taken."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import assert_same, inside, lora, metrics, train, without_checksums

from lora_lab.demo import TOFU
from lora_lab.errors import InputError
from lora_lab.training import lora_training as module
from lora_lab.training.lora_training import checkpoints, newest_checkpoint

PARTS = ("learnt.safetensors", "state.pt", "training.json")
SETTINGS = ("stage.checkpoint_every=1", "stage.keep_checkpoints=3", "stage.validate_every=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a run of three steps, whose checkpoints are all kept."""
    pictures = tmp_path_factory.mktemp("two")
    rows = [json.loads(row) for row in (TOFU / "metadata.jsonl").read_text().splitlines()[:2]]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        shutil.copy(TOFU / row["file_name"], pictures)
    with inside(tmp_path_factory.mktemp("checkpoints"), pictures) as folder:
        train("run", "steps=3", *SETTINGS)
        yield folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(position: float):
    def flip_byte(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(len(content) * position)] ^= 1
        file.write_bytes(content)

    return flip_byte


def put_folder_in_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


def record(change):
    def rewrite(file: Path) -> None:
        file = file.with_name("training.json")
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return rewrite


OF_ANY_PART = {
    "cut": cut,
    "empty": lambda file: file.write_bytes(b""),
    "missing": Path.unlink,
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),  # what a power failure leaves
    "folder": put_folder_in_place,
    **{f"byte {position:.0%}": flip(position) for position in (0, 0.1, 0.5, 0.99)},
}
OF_THE_RECORD = {
    "another step": record(lambda saved: saved | {"step": 1}),
    "another recipe": record(lambda saved: saved | {"recipe": saved["recipe"] | {"seed": 9}}),
    "no recipe": record(lambda saved: {"step": saved["step"]}),
    "recipe of another kind": record(lambda saved: {"step": saved["step"], "recipe": [1]}),
    "checksums of another kind": record(lambda saved: saved | {"sha256": [1]}),
    "list": record(lambda saved: [saved]),
    "brackets": lambda file: file.with_name("training.json").write_text("[" * 1_000_000),
}
FORMS = [(part, name, do) for part in PARTS for name, do in OF_ANY_PART.items()]
FORMS += [("training.json", name, do) for name, do in OF_THE_RECORD.items()]


@pytest.fixture
def copied(place, tmp_path):
    """A copy of the run, whose checkpoints a test may damage."""
    return Path(shutil.copytree(place / "run" / "checkpoints", tmp_path / "run" / "checkpoints")).parent


def test_whatever_is_damaged_of_the_newest_the_next_older_whole_one_is_taken(copied, capsys):
    newest, older = copied / "checkpoints" / "step-000003", copied / "checkpoints" / "step-000002"
    kept = shutil.copytree(newest, copied / "kept")
    assert newest_checkpoint(copied) == newest and not capsys.readouterr().out
    for part, form, damage in FORMS:
        damage(newest / part)
        assert newest_checkpoint(copied) == older, (part, form)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{newest} is damaged (") and part in line, (form, line)
        assert line.endswith("): step-000002 is taken in its place") and len(line) < 400, (form, line)
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)


def test_if_none_is_whole_one_sentence_names_them_all(copied):
    for checkpoint, (part, _, damage) in zip(checkpoints(copied), FORMS, strict=False):
        damage(checkpoint / part)
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole \(step-000003: learnt.*step-000001: .*new run"):
        newest_checkpoint(copied)
    assert newest_checkpoint(copied / "checkpoints") is None, "a folder without any"


def test_a_checkpoint_without_checksums_is_read_before_it_is_taken(copied, capsys):
    """One of an older version; a NaN in it would stay in the run for ever."""
    newest, older = copied / "checkpoints" / "step-000003", copied / "checkpoints" / "step-000002"
    without_checksums(newest)
    kept = shutil.copytree(newest, copied / "kept")
    assert newest_checkpoint(copied) == newest
    weights = {key: value.clone() for key, value in load_file(newest / "learnt.safetensors").items()}
    weights[next(iter(weights))][0] = torch.nan
    not_finite = ("learnt.safetensors", lambda file: save_file(weights, file))
    found = [(part, OF_ANY_PART[form]) for part in PARTS for form in ("cut", "empty", "missing", "zeros", "folder")]
    for part, damage in [*found, not_finite]:
        damage(newest / part)
        assert newest_checkpoint(copied) == older
        assert part in capsys.readouterr().out
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)


@pytest.mark.slow
def test_a_run_with_a_damaged_checkpoint_goes_on_to_the_same_end(place, monkeypatch):
    """The damaged one is replaced when its step comes, and none is removed in its favour before."""
    monkeypatch.chdir(place)
    train("more", "steps=2", *SETTINGS)
    OF_ANY_PART["cut"](Path("more/checkpoints/step-000002/state.pt"))
    train("more", "steps=3", *SETTINGS, "stage.keep_checkpoints=1", f"resume={Path('more').absolute()}")
    assert_same(lora("more"), lora("run"))
    assert [line["loss"] for line in metrics("more")] == [line["loss"] for line in metrics("run")]
    assert [c.name for c in checkpoints(Path("more"))] == ["step-000003"]


@pytest.mark.slow
def test_a_checkpoint_of_a_step_that_has_a_whole_one_is_not_written_again(place, monkeypatch):
    """While it was replaced there would be none."""
    monkeypatch.chdir(place)
    shutil.copytree("run", "again")
    before = {file: file.stat().st_mtime_ns for file in Path("again/checkpoints").rglob("*")}
    train("again", "steps=3", *SETTINGS, f"resume={Path('again').absolute()}")
    assert {file: file.stat().st_mtime_ns for file in Path("again/checkpoints").rglob("*")} == before


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_older_ones_go_after(place, monkeypatch):
    monkeypatch.chdir(place)
    events: list[tuple[str, str]] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def of(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").readlink().name

    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", of(fd))), fsync(fd)))
    monkeypatch.setattr(Path, "rename", lambda s, to: (events.append(("name", Path(to).name)), rename(s, to))[1])
    monkeypatch.setattr(module.shutil, "rmtree", lambda path, **_: rmtree(path, ignore_errors=True))
    train("synced", "steps=2", *SETTINGS, "stage.keep_checkpoints=1")
    named = events.index(("name", "step-000002"))
    before = {name for kind, name in events[events.index(("name", "step-000001")) : named] if kind == "sync"}
    assert {*PARTS, ".step-000002", "metrics.jsonl"} <= before
    assert events[named + 1] == ("sync", "checkpoints")
    assert events.index(("name", ".step-000001.old")) > named
    assert ("sync", "lora") in events[named:], "the name of the LoRA file too"
    assert not list(Path("synced/checkpoints").glob(".*"))
