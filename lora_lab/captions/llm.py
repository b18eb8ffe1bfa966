"""A language model as the refiner: it rewrites captions, and what a person would reject of its answers is not taken."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from pydantic.dataclasses import dataclass as checked_dataclass

from lora_lab.captions.chat import Chat, Question, Reply, ReplyCache, ask, load_local_chat, reply_cache
from lora_lab.captions.chat_server import ServerUrl, connect
from lora_lab.captions.rules import Rule, Rules, agree_article, compile_rules
from lora_lab.captions.syntax import languages_of
from lora_lab.errors import InputError

OWN = "refined"  # in the cache: a caption that is the refiner's own result, and stays


class Answer(BaseModel):
    """What the model must answer: a caption for each that it was given, in order."""

    captions: list[Annotated[str, Field(max_length=2000)]]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Style:
    """How captions are written: in words, and the example's caption."""

    name: str
    instruction: str
    example: str
    min_kept: Annotated[float, Field(ge=0, le=1)] = 0.5  # of the words of each phrase of a caption


@dataclass(frozen=True)
class Limits:
    """What an answer must keep, as checks.objections has it."""

    class_noun: str
    max_words: int
    new_words: int
    min_kept: float


@dataclass(frozen=True)
class Task:
    """A caption to rewrite."""

    given: str
    source: str  # by the rules, without the hint
    hint: str
    by_rules: str  # what is kept if no answer is right


@dataclass(frozen=True)
class LanguageRefiner:
    """A refiner that asks a language model; where both of its answers are rejected, the rules' result is kept."""

    chat: Chat
    cache: ReplyCache
    rules: Rules
    instructions: str  # the system prompt, with the style
    example: tuple[str, str]  # a question and its answer
    group: int  # captions of one question
    limits: Limits
    remarks: dict[tuple[str, str], str] = field(default_factory=dict)  # what was rejected, by caption and hint

    def refine(self, captions: Sequence[str], hints: Sequence[str], trigger: str) -> list[str]:
        """Each caption rewritten, with the trigger exactly once and what its hint says.

        A caption that this refiner wrote with the same hint, model and instructions stays, if there is a cache.
        Raises InputError or RunError where the model cannot be asked at all."""
        by_rules = self.rules.refine(captions, hints, trigger)
        sources = self.rules.refine(captions, [""] * len(captions), trigger)
        tasks = [Task(*each) for each in zip(captions, sources, hints, by_rules, strict=True)]
        new = [task for task in dict.fromkeys(tasks) if not self.cache.get(self._own(task.given, task.hint, trigger))]
        groups = [new[start : start + self.group] for start in range(0, len(new), self.group)]
        first = self._answers(groups, [[_request(group, trigger)] for group in groups], trigger)
        rejected = {task: rejection for task, (_, rejection) in first.items() if rejection}
        turns = [[_request([task], trigger), _answer([first[task][0]]), _again(why)] for task, why in rejected.items()]
        second = self._answers([[task] for task in rejected], turns, trigger)
        results = {task: caption for task, (caption, rejection) in (first | second).items() if not rejection}
        for task, caption in results.items():
            self.cache.put(self._own(caption, task.hint, trigger), OWN)
        for task, (_, rejection) in second.items():
            if rejection:
                self.remarks[task.given, task.hint] = f"kept as the rules leave it, for in both answers {rejection}"
            else:
                self.remarks[task.given, task.hint] = f"asked twice, for in the first answer {rejected[task]}"
        return [results.get(task, task.by_rules if task in first else task.given) for task in tasks]

    def cost(self) -> str:
        """The requests and tokens in one line; "" where nothing was asked."""
        return self.chat.usage.line()

    def _answers(
        self, groups: Sequence[Sequence[Task]], turns: Sequence[Sequence[str]], trigger: str
    ) -> dict[Task, tuple[str, str]]:
        """The answer for each task, and what is wrong with it, "" for nothing; `turns` are the question of each
        group."""
        questions = [self._question(own, len(group)) for own, group in zip(turns, groups, strict=True)]
        answers = {}
        for group, reply in zip(groups, ask(self.chat, self.cache, questions), strict=True):
            captions, problem = read_answer(reply, len(group))
            for number, task in enumerate(group):
                caption = agree_article(captions[number], trigger) if captions else ""
                answers[task] = caption, problem or self._rejection(caption, task, trigger)
        return answers

    def _question(self, turns: Sequence[str], number: int) -> Question:
        captions = {"type": "array", "items": {"type": "string"}, "minItems": number, "maxItems": number}
        schema = {"type": "object", "properties": {"captions": captions}, "required": ["captions"]}
        return Question(self.instructions, (*self.example, *turns), schema=schema | {"additionalProperties": False})

    def _rejection(self, caption: str, task: Task, trigger: str) -> str:
        from lora_lab.captions.checks import objections

        found = objections(caption, task.source, task.hint, trigger, **vars(self.limits))
        return "; ".join(found)

    def _own(self, caption: str, hint: str, trigger: str) -> str:
        return repr((OWN, self.chat.model, self.instructions, self.example, self.limits, trigger, hint, caption))


def load_llm(
    base: str,
    system: str,
    styles: Sequence[Style],
    example_name: str,
    example_caption: str,
    example_hint: str,
    class_noun: str,
    cache: str | None,
    device: str,
    url: ServerUrl | None = None,
    key_file: str | None = None,
    style: str = "sentence",
    group: PositiveInt = 1,
    max_words: PositiveInt = 40,
    new_words: NonNegativeInt = 0,
    max_tokens: PositiveInt = 400,
    temperature: NonNegativeFloat | None = 0,
    timeout: PositiveFloat = 120,
    retries: NonNegativeInt = 4,
    parallel: PositiveInt = 4,
    replace: Sequence[Rule] = (),
    vocabulary: Sequence[Rule] = (),
    subjects: Sequence[str] = (),
    article: str = "A",
    drop_repeats: bool = True,
) -> LanguageRefiner:
    """The refiner of conf/refiner/llm.yaml: a server's model, or without `url` one of transformers in this process.

    The last five are those of compile_rules. Raises InputError for a model that cannot be loaded, a key file that
    cannot be read, and a package that is not installed."""
    try:
        import snowballstemmer  # noqa: F401  (of the checks)
    except ImportError:
        raise InputError('refiner=llm needs the package snowballstemmer: pip install "lora_lab[llm]"') from None
    rules = compile_rules(replace, vocabulary, subjects, article, drop_repeats)
    if url is None:
        chat: Chat = load_local_chat(base, device, max_tokens)
    else:
        chat = connect(
            url,
            base,
            key_file,
            timeout=timeout,
            retries=retries,
            max_tokens=max_tokens,
            temperature=temperature,
            parallel=parallel,
        )
    chosen = next((each for each in styles if each.name == style), None)
    if chosen is None:
        raise InputError(f"refiner.style={style}: refiner.styles has {', '.join(each.name for each in styles)}")
    instructions = system.replace("{style}", chosen.instruction).replace("{class_noun}", class_noun)
    shown = _request([Task("", example_caption, example_hint, "")], example_name), _answer([chosen.example])
    limits = Limits(class_noun, max_words, new_words, chosen.min_kept)
    return LanguageRefiner(chat, reply_cache(cache), rules, instructions, shown, group, limits)


def read_answer(reply: Reply, number: int) -> tuple[list[str], str]:
    """The captions of a reply, and what is wrong with it; one of them is empty.

    The JSON may stand among other words, as models of a few billion parameters like to write it."""
    if reply.problem:
        return [], reply.problem
    found = re.search(r"\{.*\}", reply.text, re.DOTALL)
    try:
        captions = Answer.model_validate_json(found[0] if found else reply.text).captions
    except ValidationError:
        return [], f"there is no such JSON as asked for: {' '.join(reply.text.split())[:60]!r}"
    if len(captions) != number:
        return [], f"there are {len(captions)} captions, not {number}"
    return [" ".join(caption.split()).removesuffix(".") for caption in captions], ""


def _answer(captions: Sequence[str]) -> str:
    """The answer that has these captions."""
    return json.dumps({"captions": [*captions]}, ensure_ascii=False)


def _again(rejection: str) -> str:
    """The words that ask for another answer."""
    return f"This was rejected: {rejection}. Write it again, with the words of the caption and the note only."


def _request(tasks: Sequence[Task], trigger: str) -> str:
    """The words of a question about some captions."""
    lines = [f"Name: {trigger}"]
    for number, task in enumerate(tasks, 1):
        lines.append(f"Caption {number}: {task.source}")
        if task.hint:
            languages = languages_of(task.hint)
            translate = f" (in {' and '.join(sorted(languages))}, translate it)" if languages else ""
            lines.append(f"Note {number}{translate}: {task.hint}")
    return "\n".join(lines)
