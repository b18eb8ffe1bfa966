"""Folders of every kind of fault are refused in one sentence or read, and nothing in them is passed over in silence."""

import pytest
from hostile import main


@pytest.mark.slow
def test_sixty_hostile_folders_are_used_or_named_and_left_unchanged(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lora_lab"])
    assert main(["--count", "60", "--seed", "7"]) == 0, capsys.readouterr().out
