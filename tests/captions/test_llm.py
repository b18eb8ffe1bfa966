"""A language model as the refiner: which of its answers are taken."""

import json

import pytest

from lora_lab.captions.chat import Question, Reply, ReplyCache, Usage
from lora_lab.captions.checks import objections
from lora_lab.captions.llm import LanguageRefiner, Limits
from lora_lab.captions.refiner import foreign_hints, load_refiner
from lora_lab.captions.rules import Rules, compile_rules
from lora_lab.errors import InputError
from lora_lab.launch.config import compose
from lora_lab.launch.recipes import refuse_foreign

SOURCE = "A HANA_TOFU with a purple background, winking with its left eye"
KOREAN = "image_6은 왼쪽 눈을 찡긋하면서 오른손을 들고 있는 두부야"


class ScriptedChat:
    """Answers from a list; remembers what it was asked."""

    model, max_tokens = "scripted", 100

    def __init__(self, *answers):
        self.answers, self.asked, self.usage = list(answers), [], Usage()

    def replies(self, questions):
        for number, question in enumerate(questions):
            self.asked.append(question)
            answer = self.answers.pop(0)
            yield number, answer if isinstance(answer, Reply) else Reply(answer)


def captions(*texts):
    return json.dumps({"captions": texts}, ensure_ascii=False)


def refiner(chat, cache=None, group=1, rules=None):
    limits = Limits("character", max_words=40, new_words=0, min_kept=0.5)
    return LanguageRefiner(chat, ReplyCache(cache), rules or compile_rules(), "Rewrite.", ("a", "b"), group, limits)


@pytest.mark.parametrize(
    ("caption", "hint", "reason"),
    [
        (SOURCE, "", None),
        ("A HANA_TOFU winks with its left eye against a purple background", "", None),
        ("HANA_TOFU, purple background, left eye winking", "", None),
        ("A HANA_TOFU character with a purple background, winking with its left eye", "", None),
        ("", "", "it is empty"),
        ("A tofu with a purple background, winking with its left eye", "", "HANA_TOFU 0 times"),
        (f"{SOURCE}, HANA_TOFU", "", "HANA_TOFU 2 times"),
        (f"{SOURCE}, hana_tofu", "", "in another way"),
        (f"{SOURCE} and a vase", "", "from nowhere: vase"),
        ("A HANA_TOFU with a red background, winking with its left eye", "", "from nowhere: red"),
        ("A HANA_TOFU, winking with its left eye", "", "words are missing: purple"),
        ("A HANA_TOFU with a purple background", "", "words are missing: winking, left, eye"),
        ("A HANA_TOFU with a purple background, winking", "", "words are missing: left, eye"),
        (f"{SOURCE}, with its left eye", "", "repeats left eye"),
        (f"**{SOURCE}**", "", "markup"),
        (f"- {SOURCE}", "", "markup"),
        ("I'm sorry, I cannot describe HANA_TOFU", "", "it refuses"),
        (SOURCE + " with" * 40, "", "more than 40"),
        (f"{SOURCE}, 두부", "", "Korean letters"),
        (f"{SOURCE}, in the snow", "in the snow", None),
        (SOURCE, "in the snow", "the hint's words are missing: snow"),
        (f"{SOURCE}, raising its right hand", KOREAN, None),
        (SOURCE, KOREAN, "the hint is not in it"),
        (f"{SOURCE}, {KOREAN}", KOREAN, "Korean letters"),
        (f"{SOURCE} {' '.join(f'word{i}' for i in range(30))}", KOREAN, "from nowhere"),
    ],
)  # fmt: skip
def test_what_a_person_would_reject_is_rejected(caption, hint, reason):
    found = objections(caption, SOURCE, hint, "HANA_TOFU", class_noun="character", max_words=40)
    assert bool(found) == bool(reason) and (not reason or reason in "; ".join(found))


def test_a_korean_hint_ends_up_in_the_english_caption():
    english = f"{SOURCE}, raising its right hand"
    chat = ScriptedChat(captions(english))
    assert refiner(chat).refine([SOURCE], [KOREAN], "HANA_TOFU") == [english]
    assert KOREAN in chat.asked[0].turns[-1] and "Korean, translate it" in chat.asked[0].turns[-1]
    assert foreign_hints({"a.png": english}, {"a.png": KOREAN}) == []
    assert "a.png: the hint is Korean" in foreign_hints({"a.png": f"{SOURCE}, {KOREAN}"}, {"a.png": KOREAN})[0]


def test_a_rejected_answer_is_asked_for_once_more_with_the_reason():
    right = "A HANA_TOFU winking with its left eye, with a purple background"
    chat = ScriptedChat(captions(f"{SOURCE} and a red vase"), captions(right))
    model = refiner(chat)
    assert model.refine([SOURCE], [""], "HANA_TOFU") == [right]
    first, second = chat.asked
    assert second.turns[: len(first.turns)] == first.turns
    assert "red vase" in second.turns[-2] and "words from nowhere: red, vase" in second.turns[-1]
    assert "red, vase" in model.remarks[SOURCE, ""]


@pytest.mark.parametrize(
    "answer",
    [
        "no JSON", '{"captions": ["A HANA', '{"captions": "A HANA_TOFU"}', '{"caption": ["A HANA_TOFU"]}', captions(),
        captions("a", "b"), captions(""), captions("I'm sorry."), captions(f"{SOURCE} and a red vase"),
        captions("word " * 10_000), "<html><body>Bad gateway</body></html>", Reply("", "the server fails with 500"),
    ],
)  # fmt: skip
def test_the_rules_result_is_kept_where_both_answers_are_wrong(answer, tmp_path):
    rules = Rules(subjects=("ghost",))
    chat = ScriptedChat(answer, answer)
    model = refiner(chat, tmp_path, rules=rules)
    source = "a white ghost with a purple background"
    assert model.refine([source], ["in the snow"], "HANA_TOFU") == ["A HANA_TOFU with a purple background, in the snow"]
    assert len(chat.asked) == 2 and "kept as the rules leave it" in model.remarks[source, "in the snow"]


def test_captions_of_a_group_are_judged_each_by_itself():
    other = "A HANA_TOFU with a green background"
    chat = ScriptedChat(captions(SOURCE, f"{other} and a hat"), captions(other))
    model = refiner(chat, group=2)
    assert model.refine([SOURCE, other], ["", ""], "HANA_TOFU") == [SOURCE, other]
    assert "Caption 2" in chat.asked[0].turns[-1] and "Caption 2" not in chat.asked[1].turns[-3]
    assert [*model.remarks] == [(other, "")]


def test_nothing_is_asked_twice_and_a_refined_caption_stays(tmp_path):
    right = "A HANA_TOFU winking with its left eye, with a purple background"
    other = "A HANA_TOFU with a green background"
    wrong = captions(f"{other} and a vase")
    chat = ScriptedChat(captions(right), wrong, wrong)
    first = refiner(chat, tmp_path).refine([SOURCE, other], ["", ""], "HANA_TOFU")
    assert first == [right, other]
    silent = ScriptedChat()  # would fail if it was asked
    assert refiner(silent, tmp_path).refine(first, ["", ""], "HANA_TOFU") == first
    assert refiner(silent, tmp_path).refine([SOURCE, other], ["", ""], "HANA_TOFU") == first
    with pytest.raises(IndexError):  # another hint is another question
        refiner(silent, tmp_path).refine(first[:1], ["in the snow"], "HANA_TOFU")


def test_a_failed_request_is_asked_again_by_the_next_run(tmp_path):
    failure = Reply("", "the server fails with 500")
    assert refiner(ScriptedChat(failure, failure), tmp_path).refine([SOURCE], [""], "HANA_TOFU") == [SOURCE]
    chat = ScriptedChat(captions(SOURCE))
    model = refiner(chat, tmp_path)
    assert model.refine([SOURCE], [""], "HANA_TOFU") == [SOURCE] and len(chat.asked) == 1 and not model.remarks


def test_the_model_is_shown_an_example_that_its_own_checks_accept():
    settings = compose("stage=refine", "refiner=llm").refiner
    example = [settings[f"example_{key}"] for key in ("caption", "hint", "name")]
    for style in settings["styles"]:
        limits = {"max_words": 40, "min_kept": style.get("min_kept", 0.5)}
        assert objections(style["example"], *example, **limits) == [], style


def test_a_chain_of_refiners_has_the_keys_of_each():
    chain = compose("stage=refine", "refiner=[avatars,llm]").refiner
    avatars = compose("stage=refine", "refiner=avatars").refiner
    assert chain["vocabulary"] == avatars["vocabulary"] and chain["_target_"].endswith("load_llm")
    recipe = compose("stage=refine", "experiment=captions_ollama").refiner
    assert recipe["subjects"] and recipe["url"] == "http://localhost:11434/v1"
    for override in ("refiner=[rules,llm]", "refiner=[rules,llm],off", "refiner=off"):
        refuse_foreign([override], "a record")
    for override in ("refiner=[rules,../../x]", "refiner=[rules,/tmp/x],off", "model=[tiny,sdxl]"):
        with pytest.raises(InputError, match="not the name of an option"):
            refuse_foreign([override], "a record")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["refiner=llm", "refiner.base=x", "refiner.url=http://me:secret@host/v1"], "no key belongs into a url"),
        (["refiner=llm", "refiner.base=x", "refiner.url=host:11434"], "http://HOST:PORT/v1"),
        (["refiner=llm", "refiner.base=x", "refiner.group=0"], "refiner.group=0: group must be at least 1"),
        (["refiner=llm", "refiner.base=x", "refiner.style=rhyme", "refiner.url=http://h/v1"], "sentence, tags, short"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_with_the_key(overrides, sentence):
    with pytest.raises(InputError) as refused:
        load_refiner(compose("stage=refine", *overrides).refiner)
    assert sentence in str(refused.value) and "secret" not in str(refused.value)


def test_a_question_with_an_image_has_it_in_the_first_turn():
    from lora_lab.captions.chat import messages_of

    system, first, answer, second = messages_of(Question("be short", ("a", "b", "c"), "data:x"))
    assert system == {"role": "system", "content": "be short"} and answer["role"] == "assistant"
    assert first["content"][1]["image_url"]["url"] == "data:x" and second == {"role": "user", "content": "c"}
