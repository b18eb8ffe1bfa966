"""Locations of `model.base=` and `dataset.root=`, and errors for missing ones."""

import os

import pytest

from lora_lab import demo
from lora_lab.base.locate import locate_folder, locate_model, writable_folder
from lora_lab.errors import InputError


def test_demo_names_folders_of_the_package():
    assert locate_folder("dataset.root", "demo:tofu") == demo.HERE / "tofu"
    assert locate_model("model.base", "demo:tiny-sdxl") == str(demo.BASE)


def test_existing_paths_come_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine.safetensors").write_bytes(b"")
    assert locate_model("model.base", "models/mine") == "models/mine"
    assert locate_model("model.base", "models/mine.safetensors") == "models/mine.safetensors"
    assert locate_model("model.base", str(tmp_path / "models")) == str(tmp_path / "models")


def test_a_hub_id_is_passed_to_the_libraries():
    for name in ("stabilityai/stable-diffusion-xl-base-1.0", "madebyollin/sdxl-vae-fp16-fix"):
        assert locate_model("model.base", name) == name


@pytest.mark.parametrize(
    "name", ["mine.safetensors", "models/mine.safetensors", "./models/mine", "/models/mine", "a/b/c", "mine"]
)
def test_a_missing_path_is_never_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^model\.base="):
        locate_model("model.base", name)


def test_a_typo_gets_the_most_similar_name(tmp_path):
    (tmp_path / "TOFU").mkdir()
    (tmp_path / "juggernaut.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"dataset\.root=.*did you mean .*TOFU\?"):
        locate_folder("dataset.root", str(tmp_path / "TOFO"))
    with pytest.raises(InputError, match=r"did you mean .*juggernaut\.safetensors\?"):
        locate_model("model.base", str(tmp_path / "jugernaut.safetensors"))
    with pytest.raises(InputError, match=r"demo:tofuu: there is no such file or folder, did you mean .*tofu\?"):
        locate_folder("dataset.root", "demo:tofuu")
    with pytest.raises(InputError, match=r"demo:tiny-sdx: there is no such file or folder, did you mean .*tiny-sdxl\?"):
        locate_model("model.base", "demo:tiny-sdx")


def test_a_missing_value_is_reported_with_its_key():
    with pytest.raises(InputError, match=r"dataset\.root is missing: set dataset\.root=FOLDER"):
        locate_folder("dataset.root", None)


def test_bundled_files_are_not_writable(tmp_path):
    for folder in ("demo:tofu", str(demo.HERE / "tofu"), os.path.relpath(demo.HERE / "tofu")):
        with pytest.raises(InputError, match="bundled files are not written to"):
            writable_folder("dataset.root", folder)
    link = tmp_path / "link"
    link.symlink_to(demo.HERE / "tofu")
    with pytest.raises(InputError, match="bundled files are not written to"):
        writable_folder("dataset.root", str(link))
    assert writable_folder("dataset.root", str(tmp_path)) == tmp_path
