"""models/lora: nothing that was there is lost, whoever else publishes at the same moment."""

import threading

import torch
from safetensors.torch import load_file, save_file

from lora_lab.training.observers import install_lora


def test_runs_that_finish_at_once_lose_no_file_of_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / f"{number}.safetensors" for number in range(12)]
    for number, file in enumerate(files):
        save_file({"x": torch.full((1000,), float(number))}, file)
    publishing = [threading.Thread(target=install_lora, args=(file, "TOFU")) for file in files]
    for thread in publishing:
        thread.start()
    for thread in publishing:
        thread.join()
    found = [load_file(file)["x"][0].item() for file in (tmp_path / "models" / "lora").glob("*.safetensors")]
    assert sorted(found) == list(range(12))
