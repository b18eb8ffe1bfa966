"""The rules refiner: a captioner's words become a training caption with the trigger once."""

import doctest
import itertools
import random
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.tiny_base.vocabulary import meanings
from lora_lab.captions import blip, rules
from lora_lab.captions.refiner import foreign_hints, load_refiner, read_hints, run_refiner
from lora_lab.captions.rules import Rule, compile_rules, refine_caption
from lora_lab.errors import InputError

CONF = Path(__file__).parents[2] / "conf" / "refiner"
TRIGGERS = [
    "HANA_TOFU",
    "sks",
    "김치_두부",
    "c++",
    "(tofu)",
    "a.b|c*",
    "$x^",
    "back\\slash",
    "hana tofu",
    "[ohwx]?",
    "Cat",
]


def shipped(option):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load_refiner(OmegaConf.to_container(compose(option)))


@pytest.fixture(scope="module")
def general():
    return shipped("rules")


@pytest.fixture(scope="module")
def avatars():
    return shipped("avatars")


@pytest.fixture(scope="module")
def off():
    return shipped("off")


def generated(seed, count):
    """Captions as BLIP large, the bundled BLIP and people write them, and nonsense made of the same words."""
    draw = random.Random(seed)
    subjects = [
        "a cartoon white ghost",
        "a flat cartoon person",
        "there is a man",
        "arafed image of a cat",
        "a bear",
        "a close up of a drawing of a square",
        "waving",
        "A HANA_TOFU",
        "hana _ tofu",
        "a SKS and a sks",
        "two people",
        "a black and white cat that is smiling",
        "",
        "a c + + and a cat",
        "(TOFU)",
        "a 김치 _ 두부",
    ]
    settings = ["with a purple background", "on a table", "with a star background", "in front of a white wall", ""]
    phrases = [
        "with curly gray hair",
        "with a bald head",
        "winking",
        "winking",
        "with tan skin",
        "smiling",
        "Smiling",
        "wearing a checkered red turtleneck",
        "with a moustache and a goatee",
        "with spiky pink hair and long hair",
        "a hat and hat",
        "with a hat and a hat",
        "with a smile on his face",
        "in the snow",
        "looking angry",
        "and",
        "with a",
        "there is a hat.",
        "a cat",
        "orange hat",
        "with a cat and HANA_TOFU",
        "wearing sks",
    ]
    words = " ".join([*subjects, *settings, *phrases]).split()
    for i in range(count):
        if i % 3 == 0:
            yield " ".join(draw.choices([*words, ",", ","], k=draw.randint(0, 20)))
        else:
            head = f"{draw.choice(subjects)} {draw.choice(settings)}"
            yield ", ".join([head, *draw.choices(phrases, k=draw.randint(0, 5))])


def mentions(caption, trigger):
    """How often the trigger occurs as a word of its own, in any case and with any spaces between its characters."""
    letters = r"\s*".join(map(re.escape, trigger.replace(" ", "")))
    return len(re.findall(rf"(?<!\w){letters}(?!\w)", caption, re.IGNORECASE))


@pytest.mark.parametrize("option", ["rules", "avatars", "off"])
def test_refining_twice_changes_nothing_and_the_trigger_occurs_once(option):
    chosen = shipped(option)
    hints = [
        "",
        "in the snow",
        "with tan skin",
        "a HANA_TOFU, at night",
        "Smiling",
        "there is a cat",
        "a hat and a hat",
    ]
    for i, caption in enumerate(generated(7, 600)):
        trigger, hint = TRIGGERS[i % len(TRIGGERS)], hints[i // len(TRIGGERS) % len(hints)]
        once = refine_caption(caption, trigger, chosen, hint)
        assert refine_caption(once, trigger, chosen, hint) == once, (caption, trigger, hint)
        assert trigger in once, (caption, trigger, hint, once)
        assert mentions(once, trigger) == 1, (caption, trigger, hint, once)


@pytest.mark.parametrize("module", [rules, blip])
def test_the_examples_in_the_docstrings_hold(module):
    tried = doctest.testmod(module)
    assert tried.attempted > 0
    assert tried.failed == 0


@pytest.mark.parametrize(
    ("caption", "refined"),
    [
        ("there is a cartoon character with a smile on his face", "A HANA_TOFU with a smile"),
        ("arafed image of a white square with a face and glasses", "A HANA_TOFU with a face and glasses"),
        ("a close up of a drawing of a piece of cheese with a mustache and mustache.", "A HANA_TOFU with a moustache"),
        ("a black and white photo of a man that is smiling", "A HANA_TOFU smiling"),
        ("a hana _ tofu waving", "a HANA_TOFU waving"),
        ("HANA_TOFU in the snow, a hana_tofu with a hat", "HANA_TOFU in the snow, with a hat"),
        ("waving in the snow", "HANA_TOFU, waving in the snow"),
        ("a man riding a horse", "A HANA_TOFU riding a horse"),
        ("with a star background, a cat smiling", "A HANA_TOFU smiling, with a star background"),
        ("a square background with a hat", "HANA_TOFU, a square background with a hat"),
        ("holding a cat", "HANA_TOFU, holding a cat"),
        ("a cartoon red bell with a red background, smiling", "A HANA_TOFU with a red background, smiling"),
        ("a close up of a cartoon striped rocket covered in snow", "A HANA_TOFU covered in snow"),
        ("an inked cartoon purple bell", "A HANA_TOFU"),
        ("a cat dressed as a king", "A HANA_TOFU dressed as a king"),
        *((f"a cat {noun} in a box", f"HANA_TOFU, a cat {noun} in a box") for noun in ("bed", "king", "ring", "seed")),
        ("", "HANA_TOFU"),
    ],
)
def test_general_rules_refine_captions_of_blip(general, caption, refined):
    assert refine_caption(caption, "HANA_TOFU", general) == refined


@pytest.mark.parametrize(
    ("caption", "refined"),
    [
        (
            "a flat cartoon light-skinned person with a teal background, with curly gray hair, wearing a green shirt",
            "A HANA_TOFU with a teal background, with curly gray hair, wearing a green shirt",
        ),
        (
            "a cartoon white polar bear with a sky blue background, smiling",
            "A HANA_TOFU with a sky blue background, smiling",
        ),
        ("a cartoon white slime", "A HANA_TOFU"),
        ("an inked cartoon person with a beard", "A HANA_TOFU"),
        (
            "a cartoon white blob with a red background, with pink cheeks, with a pink star",
            "A HANA_TOFU with a red background",
        ),
        (
            "a cartoon red emoji with a white background, with a blue star",
            "A HANA_TOFU with a white background, with a blue star",
        ),
    ],
)
def test_avatar_rules_replace_any_body_by_the_trigger_and_keep_clothes(avatars, caption, refined):
    assert refine_caption(caption, "HANA_TOFU", avatars) == refined


def test_avatar_rules_keep_every_attribute_except_those_of_every_tofu(avatars):
    lost = {
        phrase
        for phrase in meanings()
        if phrase not in refine_caption(f"a cartoon cat, {phrase}", "HANA_TOFU", avatars)
    }
    assert lost == {"with pink cheeks", "with a pink flower", "with a pink heart", "with a pink star"}


def test_off_changes_nothing_but_the_trigger(off):
    odd = "there is  a hat and a hat,smiling , smiling."
    assert refine_caption(odd, "HANA_TOFU", off) == f"HANA_TOFU, {odd}"
    assert refine_caption(f"hana_tofu, {odd}", "HANA_TOFU", off) == f"HANA_TOFU, {odd}"


def test_no_rule_changes_a_hint(avatars):
    for hint in ("with pink cheeks", "there is a man", "a hat and a hat", "winking, with a pink star"):
        refined = refine_caption("a cartoon ghost with a red background", "HANA_TOFU", avatars, hint)
        assert refined == f"A HANA_TOFU with a red background, {hint}"


def test_a_hint_is_added_once_and_may_name_the_character(general):
    assert refine_caption("a cat, in the Snow", "HANA_TOFU", general, "in the snow") == "A HANA_TOFU, in the snow"
    assert (
        refine_caption("a cat, at night, waving", "HANA_TOFU", general, "at night") == "A HANA_TOFU, at night, waving"
    )
    assert refine_caption("a cat", "HANA_TOFU", general, "a hana_tofu at night") == "A HANA_TOFU, at night"


def test_a_subject_with_an_ellipsis_is_any_noun_up_to_a_function_word():
    anything = compile_rules(subjects=["red ...", "mug"])
    assert refine_caption("a big red wooden lighthouse on a hill", "HANA_TOFU", anything) == "A HANA_TOFU on a hill"
    assert refine_caption("a red, a mug in the snow", "HANA_TOFU", anything) == "A HANA_TOFU in the snow, a red"


def test_rules_cannot_change_the_trigger():
    greedy = compile_rules(replace=[Rule("tofu", "cheese"), Rule("_")])
    assert refine_caption("a HANA_TOFU with tofu", "HANA_TOFU", greedy) == "a HANA_TOFU with cheese"


@pytest.mark.parametrize(
    "rule", [{"pattern": "a (b"}, {"pattern": "a", "replacement": r"\2"}, {"pattern": "(a)", "replacement": r"\g<no>"}]
)
def test_a_bad_rule_is_named(composed, rule):
    settings = composed("refiner=off").refiner | {"vocabulary": [{"pattern": "fine"}, rule]}
    with pytest.raises(InputError, match=r"refiner.vocabulary\[1\]: .* is not a regular expression"):
        load_refiner(settings)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("refiner.replace=[{patern: cat}]", r"refiner\.replace\[0\]\.patern: no such key"),
        ("refiner.replace=[{replacement: cat}]", r"refiner\.replace\[0\]\.pattern is missing"),
        ("refiner.subjects=cat", r"refiner\.subjects=cat: "),
        ("refiner.drop_repeats=maybe", r"refiner\.drop_repeats=maybe: should be a valid boolean"),
    ],
)
def test_a_wrong_setting_is_named(composed, override, sentence):
    with pytest.raises(InputError, match=sentence):
        load_refiner(composed(override).refiner)


@pytest.mark.parametrize("rule", [Rule("cat", "catty"), Rule("$", "x")])
def test_rules_without_a_stable_result_are_refused(rule):
    with pytest.raises(InputError, match="without end"):
        refine_caption("a cat", "HANA_TOFU", compile_rules(replace=[rule]))


def test_rules_that_undo_each_other_are_refused():
    swap = compile_rules(replace=[Rule("^(cat|dog) (cat|dog)$", r"\2 \1")])
    with pytest.raises(InputError, match="without end"):
        refine_caption("HANA_TOFU, cat dog", "HANA_TOFU", swap)


def test_captions_are_refined_in_order_each_with_its_hint(avatars):
    captions = ["a cartoon white ghost, smiling", "a cartoon cat"]
    assert run_refiner(avatars, captions, "X") == ["A X, smiling", "A X"]
    assert run_refiner(avatars, captions, "X", ["", "at night"]) == ["A X, smiling", "A X, at night"]
    assert run_refiner(avatars, [], "X") == []


def test_hints_are_read_from_either_file(tmp_path):
    assert read_hints(tmp_path) == {}
    (tmp_path / "hints.csv").write_text("file_name,text\n1.png,in the snow\n")
    assert read_hints(tmp_path) == {"1.png": "in the snow"}
    (tmp_path / "hints.jsonl").write_text('{"file_name": "1.png", "text": "at night"}\n')
    with pytest.raises(InputError, match=r"hints.jsonl and hints.csv are both in"):
        read_hints(tmp_path)


def test_any_order_of_phrases_gives_the_same_phrases(avatars):
    phrases = ["with a goatee", "with its eyes closed", "with short red hair", "with pink cheeks"]
    orders = itertools.permutations(phrases)
    results = {frozenset(refine_caption(", ".join(order), "X", avatars).split(", ")) for order in orders}
    assert results == {frozenset(["X", *phrases[:3]])}


@pytest.mark.parametrize(
    ("trigger", "caption", "refined"),
    [
        ("AKA_ROBO", "a cartoon white ghost waving", "An AKA_ROBO waving"),
        ("AKA_ROBO", "a AKA_ROBO waving", "an AKA_ROBO waving"),
        ("AKA_ROBO", "smiling, with a hat and an aka _ robo", "smiling, with a hat and an AKA_ROBO"),
        ("HANA_TOFU", "an orange ghost waving", "A HANA_TOFU waving"),
        ("HANA_TOFU", "An HANA_TOFU waving", "A HANA_TOFU waving"),
        ("UNI_CAT", "a ghost waving", "A UNI_CAT waving"),
        ("ohwx", "an ohwxa, the ohwx waving", "an ohwxa, the ohwx waving"),
        ("이모티콘", "a ghost waving", "A 이모티콘 waving"),
    ],
)
def test_the_article_is_that_of_the_trigger(general, trigger, caption, refined):
    assert refine_caption(caption, trigger, general) == refined


@pytest.mark.slow
@pytest.mark.parametrize("option", ["rules", "avatars"])
def test_words_that_no_rule_changes_stay_whatever_they_are(option):
    tags = [
        "HANA_TOFU",
        r"hana tofu \(series\)",
        "1girl",
        "a",
        "of",
        r"with \(object\)",
        "the",
        ":d",
        "with",
        "and",
        "or",
    ]
    draw = random.Random(0)
    for _ in range(30):
        caption = ", ".join(["HANA_TOFU", *draw.sample(tags[1:], len(tags) - 1)])
        assert refine_caption(caption, "HANA_TOFU", shipped(option)) == caption
        assert refine_caption(f"{caption}, arafed", "HANA_TOFU", shipped(option)) == caption


def test_a_hint_in_another_language_than_its_caption_is_named():
    hints = {"1.png": "눈 속에서", "2.png": "눈 속", "3.png": "눈 속", "4.png": "赤い帽子", "5.png": "im Schnee, süß"}
    hints["6.png"] = "눈 속"
    own = {"1.png": "a cat", "2.png": "a cat", "3.png": "고양이", "4.png": "a cat", "5.png": "a café", "6.png": "a cat"}
    captions = {name: f"{text}, {hints[name]}" for name, text in own.items()} | {"6.png": "a cat in the snow"}
    advice = "stays in the caption: CLIP reads English, so translate it; refiner=[rules,llm] has it translated"
    assert foreign_hints(captions, hints) == [
        f"1.png, 2.png: the hint is Korean and {advice}",
        f"4.png: the hint is Japanese and {advice}",
    ]


def test_hints_behind_a_link_out_of_the_folder_are_not_read(tmp_path):
    (tmp_path / "secret.csv").write_text("file_name,text\n1.png,a secret\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/hints.csv").symlink_to("../secret.csv")
    with pytest.raises(InputError, match=r"hints\.csv is a link .*follow_links=true"):
        read_hints(tmp_path / "data")
    assert read_hints(tmp_path / "data", follow_links=True) == {"1.png": "a secret"}


@pytest.mark.parametrize("option", ["rules", "avatars", "off"])
def test_a_caption_of_ten_thousand_words_is_refined_like_any_other(option):
    for text in ("cat " * 10_000, "a" * 50_000, ", ".join(f"hat {i}" for i in range(5_000)), "with a " * 7_000):
        refined = refine_caption(text, "HANA_TOFU", shipped(option))  # a quadratic rule takes minutes
        assert refined.count("HANA_TOFU") == 1
