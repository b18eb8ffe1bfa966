"""Whose words a caption is: the machine's may be replaced, a person's never."""

import json

from lora_lab.captions.files import HISTORY as NAME
from lora_lab.captions.history import machine_made, record


def change(root, by, name, was, text):
    return record(root, by, {name: was} if was else {}, {name: text})


def test_captions_of_a_captioner_are_machine_made_refined_or_not(tmp_path):
    assert machine_made(tmp_path) == {}
    change(tmp_path, "blip", "1.png", "", "a ghost")
    change(tmp_path, "refine", "1.png", "a ghost", "A HANA_TOFU")
    change(tmp_path, "refine:llm", "1.png", "A HANA_TOFU", "A HANA_TOFU, still")
    assert machine_made(tmp_path) == {"1.png": {"a ghost", "A HANA_TOFU", "A HANA_TOFU, still"}}


def test_a_refined_caption_of_a_person_is_not_machine_made(tmp_path):
    change(tmp_path, "blip", "1.png", "", "a ghost")
    change(tmp_path, "refine", "1.png", "a ghost I love", "A HANA_TOFU I love")
    change(tmp_path, "refine", "2.png", "my own words", "HANA_TOFU, my own words")
    assert machine_made(tmp_path) == {"1.png": {"a ghost"}}


def test_a_caption_that_replaced_a_persons_is_machine_made(tmp_path):
    change(tmp_path, "blip", "1.png", "my own words", "a ghost")
    assert machine_made(tmp_path) == {"1.png": {"a ghost"}}


def test_only_changes_are_recorded_and_the_raw_captions_are_kept(tmp_path):
    assert record(tmp_path, "blip", {"1.png": "a", "2.png": "b"}, {"1.png": "a", "2.png": "두부", "3.png": "d"}) == 2
    assert record(tmp_path, "blip", {"1.png": "a"}, {"1.png": "a"}) == 0
    rows = [json.loads(line) for line in (tmp_path / NAME).read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"file_name": "2.png", "text": "두부", "by": "blip", "was": "b"},
        {"file_name": "3.png", "text": "d", "by": "blip", "was": ""},
    ]


def test_nothing_is_written_where_nothing_changed(tmp_path):
    record(tmp_path, "blip", {}, {})
    assert not (tmp_path / NAME).exists()


def test_a_line_cut_off_at_any_byte_loses_only_that_line(tmp_path):
    change(tmp_path, "blip", "1.png", "", "첫째")
    whole = (tmp_path / NAME).read_bytes()
    change(tmp_path, "blip", "2.png", "", "둘째 🙂")
    both = (tmp_path / NAME).read_bytes()
    for cut in range(len(whole), len(both) - 1):
        (tmp_path / NAME).write_bytes(both[:cut])
        assert machine_made(tmp_path) == {"1.png": {"첫째"}}
        change(tmp_path, "blip", "3.png", "", "셋째")
        assert machine_made(tmp_path) == {"1.png": {"첫째"}, "3.png": {"셋째"}}, f"the next row was lost, cut at {cut}"
    (tmp_path / NAME).write_bytes(both[:-1])  # whole but for the line's end
    change(tmp_path, "blip", "3.png", "", "셋째")
    assert set(machine_made(tmp_path)) == {"1.png", "2.png", "3.png"}
