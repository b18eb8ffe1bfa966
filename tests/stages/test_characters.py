"""Several characters in one dataset: a folder and a trigger for each."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import train

from lora_lab.adapters.files import CHARACTERS, read_metadata, resolve_lora, save_lora, triggers_of
from lora_lab.captions.files import read_captions, write_captions
from lora_lab.demo import PHOTOS, TOFU
from lora_lab.errors import InputError
from lora_lab.evaluation.resemblance import references_of
from lora_lab.launch.config import compose
from lora_lab.launch.recipes import with_quotes
from lora_lab.launch.run_job import run_stage
from lora_lab.settings.schema import Triggers

BOTH = "trigger={tofu: HANA_TOFU, mug: NAMU_MUG}"
CAPTIONS = {
    "tofu/00.png": "A HANA_TOFU with a green leaf, smiling", "tofu/03.png": "A HANA_TOFU with a green leaf",
    "tofu/06.png": "A HANA_TOFU with a green leaf, winking", "mug/01.png": "A NAMU_MUG, smiling",
    "mug/04.png": "A NAMU_MUG with a red hat", "mug/07.png": "A HANA_TOFU, winking",
}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    for name in CAPTIONS:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOFU / Path(name).name, tmp_path / "data" / name)
    write_captions(tmp_path / "data", CAPTIONS)
    return tmp_path / "data"


def do(root, *overrides):
    return run_stage(compose("dataset=folder", f"dataset.root={root}", BOTH, *overrides), root.parent / "run")


def test_an_image_has_the_trigger_of_its_innermost_folder():
    triggers = Triggers({"tofu": "A", "tofu/mug": "B", "cup": "B"})
    names = ["tofu/1.png", "tofu/mug/2.png", "cup/3.png"]
    assert [triggers.of(name) for name in names] == ["A", "B", "B"]
    assert triggers.names_by_trigger(names) == {"A": names[:1], "B": names[1:]}
    assert triggers.own(names, "A") == names[:1] and triggers.own(["1.png"], "A") == ["1.png"]
    assert triggers.fill(["a {trigger}", "a ghost"]) == ["a A", "a B", "a ghost"]
    with pytest.raises(InputError, match=r"tofus/1\.png is in no folder of trigger=\{tofu: A, tofu/mug: B, cup: B\}"):
        triggers.of("tofus/1.png")
    with pytest.raises(InputError, match=r"trigger=\{tofu: A, .*\}: there are no pictures in a folder tofu"):
        triggers.names_by_trigger(names[1:])
    assert Triggers({"": "A"}).names_by_trigger(names) == {"A": names}


@pytest.mark.parametrize("typed", [BOTH, "trigger={두부: A, mug: 2024}", "trigger={mug/big: A, mug: B}"])
def test_a_mapping_is_typed_as_one_word(typed):
    config = compose("stage=train", with_quotes(typed, False))
    assert config.name == "-".join(config.triggers.all) and f"trigger={config.triggers}" == typed


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("trigger={}", r"trigger=\{\}: name at least one folder"),
        ("trigger={a: TOFU, b: TOFU_2}", r"TOFU is a part of TOFU_2, choose words that are not"),
        ("trigger={a: {b: c}}", r"not a text, or folders with a text each"),
        ("trigger={a: null}", r"not a text, or folders"),
        ("trigger={a: ' x'}", r"trigger=' x': the trigger is one or more words"),
        ("trigger={a: one, b: kind} class_noun=kinder", r"class_noun='kinder': name what others of the kind of kind"),
        (f"{BOTH} text=pivotal", r"text\.tokens=2: new tokens stand for one trigger, not for HANA_TOFU, NAMU_MUG"),
        (f"{BOTH} stage=img2img stage.photo=x", r"stage=img2img draws one character, set trigger=HANA_TOFU or trigg"),
        (f"{BOTH} stage=pipeline stage.img2img.photo=x", r"stage=pipeline draws one character"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(typed, sentence):
    words = typed.replace(": ", ":").replace(", ", ",").split(" ") if "' x'" not in typed else [typed]
    with pytest.raises(InputError, match=sentence):
        compose(*(["stage=train"] if "stage=" not in typed else []), *words)


def test_check_looks_at_each_character(root):
    result = do(root, "stage=check")
    assert result.findings.without_trigger == ["mug/07.png"]
    shared = {trigger: words.shared for trigger, words in result.findings.common_words.items()}
    assert shared == {"HANA_TOFU": {"green leaf": 3}, "NAMU_MUG": {}}
    assert [line for line in result.warnings if '"green leaf" is in 3 of 3 captions of HANA_TOFU: HANA_TOFU' in line]
    assert [
        line for line in result.warnings if "1 captions do not have the trigger of their folder (mug/07.png)" in line
    ]
    write_captions(root, {name: text.replace("NAMU_MUG", "mug") for name, text in CAPTIONS.items()})
    assert [
        line for line in do(root, "stage=check").warnings if "no caption of the 3 pictures has the trigger NAMU" in line
    ]
    shutil.copy(TOFU / "09.png", root)
    with pytest.raises(InputError, match=r"^09\.png is in no folder of trigger="):
        do(root, "stage=check")


def test_refine_puts_each_folder_s_trigger_in(root):
    write_captions(root, {name: "a character with a red hat" for name in CAPTIONS})
    result = do(root, "stage=refine", "refiner=avatars")
    assert len(result.after) == 6 and read_captions(root).keys() == CAPTIONS.keys()
    for name, text in read_captions(root).items():
        assert text == f"A {'HANA_TOFU' if name.startswith('tofu/') else 'NAMU_MUG'} with a red hat"
    assert do(root, "stage=refine", "refiner=avatars").after == {}


def test_a_file_of_several_characters_asks_for_one_and_knows_its_images(tmp_path, root):
    notes = {CHARACTERS: json.dumps({"tofu": "HANA_TOFU", "mug": "NAMU_MUG"})}
    matrices = {"x.lora_down.weight": torch.ones(2, 2), "x.lora_up.weight": torch.ones(2, 2)}
    file = save_lora(tmp_path / "both.safetensors", matrices, torch.float32, notes)
    assert triggers_of(file).all == ["HANA_TOFU", "NAMU_MUG"]
    assert resolve_lora(str(file), ["NAMU_MUG"]) == file == resolve_lora(str(file), ["NAMU_MUG", "HANA_TOFU"])
    with pytest.raises(InputError, match=r"on 2 triggers, not MINT: set trigger=HANA_TOFU or trigger=NAMU_MUG$"):
        resolve_lora(str(file), ["MINT"])
    dataset = compose("dataset=folder", f"dataset.root={root}").dataset
    assert [image.parent.name for image in references_of(file, dataset, "NAMU_MUG")] == ["mug"] * 3
    dataset = compose("dataset=folder", f"dataset.root={root / 'mug'}").dataset
    assert len(references_of(file, dataset, "NAMU_MUG")) == 3


@pytest.mark.slow
def test_a_lora_of_two_characters_is_drawn_and_scored_by_character(elsewhere, root, capsys):
    write_captions(root, CAPTIONS | {"mug/07.png": "A NAMU_MUG, winking"})
    data = ("dataset=folder", f"dataset.root={root}")
    trained = train("run", *data, BOTH, "steps=2", "stage.prompts=['A {trigger}','A HANA_TOFU and a NAMU_MUG']")
    assert trained.trigger == "HANA_TOFU, NAMU_MUG" and trained.name == "HANA_TOFU-NAMU_MUG"
    assert [Path(file).name for file in trained.samples["2"]] == ["p0-s0.png", "p1-s0.png", "p2-s0.png"]
    notes = read_metadata(Path(trained.lora))
    assert notes["modelspec.trigger_phrase"] == trained.trigger
    assert json.loads(notes["ss_tag_frequency"])["NAMU_MUG"]["winking"] == 1
    with pytest.raises(
        InputError, match=r"trigger=\{tofu: HANA_TOFU, mug: NAMU_MUG\}, not \{tofu: HANA_TOFU, mug: HANA_TOFU\}"
    ):
        train("run", *data, "trigger={tofu: HANA_TOFU, mug: HANA_TOFU}", "resume=run", "steps=3")

    draw = ("stage=img2img", *data, "lora=run", "device=cpu", "sampler.steps=2", "stage.budget=1")
    photo = f"stage.photo={sorted(PHOTOS.glob('*.png'))[0]}"
    image = run_stage(compose(*draw, photo, "trigger=NAMU_MUG"), Path("drawn").absolute()).pictures[0]
    assert "NAMU_MUG" in image.prompt and image.scores
    assert "has the characters HANA_TOFU, NAMU_MUG: NAMU_MUG is drawn" in capsys.readouterr().out

    few = ("score.prompts=['A {trigger}']", "score.other_prompts=['A cat']", "score.seeds=[0]", "score.photos=null")
    score = ("stage=evaluate", *data, "lora=run", "device=cpu", "sampler.steps=2", *few)
    both = run_stage(compose(*score, BOTH), Path("both").absolute())
    one = run_stage(compose(*score, "trigger=NAMU_MUG"), Path("one").absolute())
    scores = both.loras[0].scores
    assert scores["score/NAMU_MUG"] == one.loras[0].scores["score"]
    assert scores["score"].value == pytest.approx(
        (scores["score/HANA_TOFU"].value + scores["score/NAMU_MUG"].value) / 2, abs=1e-4
    )


def test_auto_strips_of_each_character_what_its_own_captions_share(root):
    own = {name: "a green leaf" if name.startswith("tofu/") else "a blue handle" for name in CAPTIONS}
    write_captions(
        root,
        {name: f"{'HANA_TOFU' if 'leaf' in own[name] else 'NAMU_MUG'} with {own[name]}, {name[-6:-4]}" for name in own},
    )
    result = do(root, "stage=refine", "refiner=off", "refiner.strip=auto")
    assert result.stripped == {"green leaf": 3, "blue handle": 3}
    assert all("," in text and " with " not in text for text in read_captions(root).values())
