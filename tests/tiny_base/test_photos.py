"""What the demo's photos show, and what a picture keeps of one."""

from dataclasses import replace

import pytest

from experiments.tiny_base.blind import ranks
from experiments.tiny_base.bodies import BODIES
from experiments.tiny_base.held_out import HELD_OUT
from experiments.tiny_base.photos import drawing, likeness, photos


def test_a_picture_keeps_what_it_shows_of_the_photo(monkeypatch):
    monkeypatch.setattr("experiments.tiny_base.judge.reading.BODIES", {"apple": BODIES["apple"]})
    tofu, photo = HELD_OUT["tofu"], photos()[3]
    whole = likeness(drawing(photo, tofu), photo, tofu)
    assert whole.character == whole.share == 1, whole
    worn = replace(photo, background="teal", look=replace(photo.look, glasses=None, shirt=None, mouth="frown"))
    less = likeness(drawing(worn, tofu), photo, tofu)
    assert less.character == 1
    assert less.kept == {"background": False, "hair": True, "glasses": False, "shirt": False, "mouth": False}


def test_a_ranking_by_eye_has_a_line_for_each_rank():
    assert ranks("B\n\nA C\nD\n", ["A", "B", "C", "D"]) == [1, 0, 1, 2]
    with pytest.raises(KeyError, match="E"):
        ranks("B\nA\n", ["A", "B", "E"])
