"""The bare command, shortened: every part is there and fits the next."""

import json
from pathlib import Path

from PIL import Image

from lora_lab.captions.files import read_captions
from lora_lab.config import compose
from lora_lab.stages import run


def test_the_pipeline_goes_from_pictures_to_an_overview(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = (
        "steps=2",
        "rank=2",
        "batch_size=1",
        "sampler.steps=2",
        "device=cpu",
        "tracker=off",
        "stage.train.prompts=['A {trigger}']",
    )
    run(compose(*short, "stage.img2img.strength=0.6"), tmp_path / "run")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["stage"] == "pipeline" and result["steps"] == 2
    assert Path(result["lora"]).is_file() and -1 <= result["identity_before"] <= result["identity"] + 0.2
    captions = read_captions(Path(result["dataset"]))
    assert len(captions) == 24 and all(text.count("HANA_TOFU") == 1 for text in captions.values())
    overview = Image.open(result["overview"])
    assert overview.width > 4 * 256 and overview.height > 8 * 256
    assert len(list((tmp_path / "run/img2img/after").glob("*-s0.png"))) == 8
    last = capsys.readouterr().out.strip().splitlines()[-3:]
    assert "HANA_TOFU was learnt in 2 steps" in last[0]
    assert "overview.png" in last[1] and "python -m lora_lab stage=img2img lora=HANA_TOFU" in last[2]
