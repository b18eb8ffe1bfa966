"""The page that shows the captions of several captioners side by side."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from lora_lab.board.captions import marked
from lora_lab.board.page import rewrite_page
from lora_lab.demo import TOFU
from lora_lab.errors import InputError
from lora_lab.launch import config
from lora_lab.launch.command_line import check

HOSTILE = '<script>alert(1)</script> & "a hat"'


def write_run(folder: Path, captioner: str, captions: dict[str, str], root: str, done: bool = True) -> Path:
    record = {
        "config": {"dataset": {"root": root}, "captioner": {"name": captioner}},
        "hydra": {"hydra": {"runtime": {"choices": {"stage": "caption", "captioner": captioner}}}},
        "overrides": ["stage=caption", f"captioner={captioner}"],
    }
    (folder / ".hydra").mkdir(parents=True)
    for name, content in record.items():
        (folder / ".hydra" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (folder / "metadata.proposed.jsonl").write_text("".join(f"{row}\n" for row in rows))
    if done:
        result = {"stage": "caption", "captions": captions, "pictures_per_second": 2.5}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def cells(page: Path) -> dict[str, list[str]]:
    """The captions of each image as the page has them."""
    rows = re.findall(r"<tr>\n(  <th scope=.row.*?)</tr>", page.read_text(encoding="utf-8"), re.S)
    return {re.search(r"([^>]*)</th>", row)[1]: re.findall(r"<td>(.*?)</td>", row, re.S) for row in rows}


@pytest.mark.parametrize(
    ("captions", "found"),
    [
        (["A red hat, smiling", "a hat"], [["red", "smiling"], []]),
        (["a cat's hat", "a cat", "a dog"], [["cat's", "hat"], ["cat"], ["dog"]]),
        (["a cat, a cat", "A CAT", ""], [[], [], []]),
        (["only this one has a caption", "", ""], [[], [], []]),
        (["두부 하나", "tofu"], [["두부 하나"], ["tofu"]]),
    ],
)
def test_a_word_is_marked_that_no_other_caption_has(captions, found):
    parts = marked(captions)
    assert ["".join(text for text, _ in own) for own in parts] == captions
    words = [[word for text, alone in own if alone for word in text.split(" ") if word] for own in parts]
    assert words == [[word for phrase in own for word in phrase.split(" ")] for own in found]


def test_the_page_has_a_row_for_each_image_and_a_column_for_each_captioner(tmp_path):
    sweep = tmp_path / "sweep"
    write_run(sweep / "0", "blip", {"00.png": "a tofu in a hat", "03.png": HOSTILE}, "demo:tofu")
    write_run(sweep / "1", "tags", {"00.png": "tofu, hat"}, "demo:tofu", done=False)
    page = rewrite_page(sweep)
    text = page.read_text(encoding="utf-8")
    assert len(cells(page)) == 24 and [*cells(page)][:2] == ["00.png", "01.png"]
    assert cells(page)["00.png"] == ["<mark>a</mark> tofu <mark>in</mark> <mark>a</mark> hat", "tofu, hat"]
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;a hat&#34;" in text
    assert all(words in text for words in ("captioner blip", "2.50 images a second", "not finished", "초당 2.50장"))
    use = "python -m lora_lab stage=convert dataset=folder dataset.root=demo:tofu stage.source="
    assert text.count(use) == 2 and f"{sweep}/1/metadata.proposed.jsonl" in text
    shown = re.findall(r'src="(page/captioned/\d+\.webp)"', text)
    assert len(shown) == 24 and all((sweep / file).is_file() for file in shown)


def test_two_folders_have_rows_of_their_own_and_a_strangers_pictures_are_not_shown(type_in, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(TOFU / "00.png", tmp_path / "data" / name)
        write_run(tmp_path / "runs" / name, "blip", {"00.png": f"a tofu of {name}"}, f"data/{name}")
    code, out, err = type_in("stage=compare", "stage.folder=runs", "hydra.run.dir=page", "dataset.root=data/one")
    assert (code, err) == (0, "") and "images of the dataset are not shown: add dataset.root=data/two" in out
    page = tmp_path / "page" / "index.html"
    assert cells(page) == {"data/one/00.png": ["a tofu of one", ""], "data/two/00.png": ["", "a tofu of two"]}
    assert page.read_text().count("<img") == 1


@pytest.mark.slow
def test_several_captioners_of_one_folder_propose(capsys):
    config.register()
    sweep = ("stage=caption", "captioner=blip,blip_tiny")
    assert {run.stage.mode for run in check([*sweep, "dataset.root=data"], True).runs} == {"propose"}
    assert "several jobs caption data: each proposes captions (stage.mode=propose)" in capsys.readouterr().err
    assert {run.stage.mode for run in check([*sweep, "stage.mode=propose"], True).runs} == {"propose"}
    one_each = check(["stage=caption", "dataset.root=one,two"], True)
    assert [run.stage.mode for run in one_each.runs] == ["missing", "missing"] and capsys.readouterr().err == ""
    for mode in ("missing", "replace"):
        with pytest.raises(InputError, match=rf"stage\.mode={mode}: several jobs would caption data, leave it out"):
            check([*sweep, "dataset.root=data", f"stage.mode={mode}"], True)
