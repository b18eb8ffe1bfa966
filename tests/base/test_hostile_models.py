"""Model folders of strangers and damaged ones: one sentence, no question, and no code of theirs runs."""

import builtins
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_lab.base.load import load_base
from lora_lab.captions.captioner import load_captioner
from lora_lab.demo import BASE, CAPTIONER, JUDGE
from lora_lab.errors import InputError
from lora_lab.evaluation.embedders import embed
from lora_lab.launch.config import compose

CPU = torch.device("cpu")
CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\npathlib.Path({ran!r}).touch()\n"


def load(kind: str, folder: Path) -> None:
    config = compose()
    if kind == "captioner":
        load_captioner(config.captioner | {"base": str(folder)}, CPU)
    elif kind in ("judge", "dino"):
        model = replace(config.model, **{kind: str(folder)})
        embed(model, [Image.new("RGB", (8, 8))], ["a cat"], CPU)
    else:
        load_base(replace(config.model, **{kind: str(folder)}), CPU)


def copy(kind: str, folder: Path) -> Path:
    source = {"captioner": CAPTIONER, "judge": JUDGE, "dino": JUDGE, "base": BASE, "vae": BASE / "vae"}[kind]
    return Path(shutil.copytree(source, folder / kind))


@pytest.mark.parametrize("kind", ["captioner", "judge", "dino", "base", "vae"])
@pytest.mark.parametrize("known", [True, False])
def test_code_that_comes_with_a_model_is_never_run_nor_asked_about(tmp_path, monkeypatch, kind, known):
    folder, ran, asked = copy(kind, tmp_path), tmp_path / "ran", []
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    auto_map = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor",
                                               "AutoTokenizer")}  # fmt: skip
    for path in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        (path / "evil.py").write_text(CODE.format(ran=str(ran)) + "class Evil: pass\n")
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_bytes())
        if "config" in path.name and isinstance(content, dict):
            content |= {"auto_map": auto_map | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
            content |= {} if known or "model_type" not in content else {"model_type": "evil"}
            path.write_text(json.dumps(content))
    if kind == "base" and not known:
        index = json.loads((folder / "model_index.json").read_bytes())
        index |= {"unet": ["evil", "Evil"], "_class_name": ["evil", "Evil"]}
        (folder / "model_index.json").write_text(json.dumps(index))
    try:
        load(kind, folder)
    except InputError as error:
        assert folder.name in str(error) and "\n" not in str(error)
        assert known or kind in ("base", "vae", "dino") or "code that comes with it, which is never run" in str(error)
    else:
        assert known or kind == "vae"
    assert not asked and not ran.exists() and not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize("kind", ["captioner", "judge", "dino", "base", "vae"])
def test_a_damaged_file_of_a_model_is_named_in_one_sentence(tmp_path, kind):
    folder = copy(kind, tmp_path)
    path = folder if kind != "base" else folder / "unet"
    if kind == "dino":  # of another kind otherwise
        config = json.loads((folder / "config.json").read_bytes()) | {"model_type": "dinov2"}
        (folder / "config.json").write_text(json.dumps(config))
    weights = next(path.glob("*.safetensors"))
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], b"\xff" * 100):
        weights.write_bytes(content)
        with pytest.raises(InputError, match=rf"{weights} is cut off or damaged, copy it again") as error:
            load(kind, folder)
        assert "\n" not in str(error.value)
    weights.write_bytes(whole)
    (path / "config.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"config\.json"):
        load(kind, folder)
