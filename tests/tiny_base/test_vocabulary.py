"""Captions say what a look is, no more and no less, and what they say wrongly on purpose is one thing."""

from collections import Counter
from random import Random

from experiments.tiny_base.characters import random_look
from experiments.tiny_base.vocabulary import Look, altered, free_caption, full_caption, parsed, phrases


def looks(count):
    rng = Random(0)
    return [random_look(rng.choice(("apple", "ghost")), rng.choice(("red", "white")), rng) for _ in range(count)]


def test_the_full_caption_says_everything_in_one_order():
    look = Look(
        "orange apple",
        hair=("bun", "red"),
        glasses="round",
        facial_hair="moustache",
        eyes="wink_left",
        cheeks=True,
        shirt="blue",
        mark=("flower", "pink"),
        hands="both",
    )
    assert full_caption(look, "sky blue") == (
        "a cartoon orange apple with a sky blue background, with a red bun, wearing round glasses, with a moustache, "
        "winking with its left eye, smiling, with pink cheeks, wearing a blue shirt, with a pink flower, "
        "raising both hands"
    )


def test_an_avatar_is_named_by_its_style_and_skin():
    look = Look("person", style="inked", skin="tan", hat=("cap", "orange"))
    assert full_caption(look, "orange") == (
        "an inked cartoon tan-skinned person with an orange background, wearing an orange cap, smiling"
    )


def test_eyes_behind_sunglasses_are_not_told():
    assert phrases(Look("red apple", glasses="sun", eyes="closed", mouth=None)) == ["wearing sunglasses"]


def test_a_lie_is_about_one_thing_and_always_changes_the_caption():
    rng = Random(1)
    kinds = Counter()
    for look in looks(400):
        other, ground = altered(look, "teal", rng)
        assert full_caption(other, ground) != full_caption(look, "teal")
        changed = [field for field in vars(look) if getattr(look, field) != getattr(other, field)]
        assert len(changed) + (ground != "teal") == 1
        kinds[changed[0] if changed else "background"] += 1
    assert set(kinds) >= {"background", "glasses", "eyes", "mouth", "hair", "hat", "shirt", "mark", "hands", "subject"}


def test_names_are_for_characters_and_never_for_people():
    rng = Random(2)
    of_apple = [free_caption(Look("red apple"), "teal", rng) for _ in range(400)]
    of_person = [free_caption(Look("person", style="flat", skin="dark"), "teal", rng) for _ in range(400)]
    assert all("person" in caption for caption in of_person)
    named = sum("apple" not in caption and "character" not in caption for caption in of_apple)
    assert 50 < named < 120, "about one in five apples goes by a name alone"


def test_a_full_caption_is_understood_back():
    for look in looks(200):
        assert parsed(full_caption(look, "sky blue")) == (look, "sky blue")
    look, ground = parsed("A HANA_TOFU with an orange background, made of gold, wearing round glasses")
    assert (look, ground) == (Look("HANA_TOFU", glasses="round", mouth=None), "orange"), "what is unknown is left out"
