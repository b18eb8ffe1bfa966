"""Questions to a language model, and their replies, which are kept so that no question is asked twice.

The model is behind a server (chat_server.py) or in this process (`LocalChat`)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lora_lab.base.locate import loading
from lora_lab.console import quiet_loading
from lora_lab.errors import InputError
from lora_lab.runs import hash_text, write_text


@dataclass(frozen=True)
class Question:
    """What a language model is asked."""

    system: str  # how it should answer; "" for nothing
    turns: Sequence[str]  # of the user, the model, the user, ...; the last one is the user's
    image: str = ""  # a data URL, seen with the first turn
    schema: Mapping[str, Any] | None = None  # JSON schema of the answer; None for plain text


@dataclass(frozen=True)
class Reply:
    """What a language model answered; `problem` says why there is no text."""

    text: str
    problem: str = ""


@dataclass
class Usage:
    """What was asked of a language model."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: int = 0  # in a row, until now

    def line(self) -> str:
        """In one line; "" for nothing."""
        tokens = f"{self.prompt_tokens:,} tokens read and {self.completion_tokens:,} written"
        return f"{self.requests} requests, {tokens}" if self.requests else ""


class Chat(Protocol):
    """A language model."""

    model: str
    max_tokens: int  # of a reply
    usage: Usage

    def replies(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """The number of each question and its reply, as they come.

        Raises InputError or RunError for what would fail for every question."""
        ...


@dataclass(frozen=True)
class ReplyCache:
    """The replies of a language model as text files in a folder; without a folder nothing is kept."""

    folder: Path | None

    def get(self, key: str) -> str | None:
        """What `put` was given under the key; None for nothing."""
        try:
            return self._file(key).read_text(encoding="utf-8") if self.folder else None
        except (OSError, UnicodeDecodeError):
            return None

    def put(self, key: str, text: str) -> None:
        """Keep a text. Raises DiskFullError."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self._file(key), text)

    def _file(self, key: str) -> Path:
        return self.folder / f"{hash_text(key)}.txt"


def reply_cache(folder: str | None) -> ReplyCache:
    """The replies in the cache folder of the configuration; None for none."""
    return ReplyCache(Path(folder).expanduser() / "replies" if folder else None)


def ask(chat: Chat, cache: ReplyCache, questions: Sequence[Question]) -> list[Reply]:
    """The replies, in order. A question that was answered before is not asked, and each new reply is kept at once.

    Raises what `Chat.replies` raises; what was answered until then is kept."""
    keys = [repr((chat.model, chat.max_tokens, question)) for question in questions]
    kept = {key: text for key in dict.fromkeys(keys) if (text := cache.get(key)) is not None}
    replies = {key: Reply(text) for key, text in kept.items()}
    open_questions = {key: question for key, question in zip(keys, questions, strict=True) if key not in replies}
    for number, reply in chat.replies([*open_questions.values()]):
        key = [*open_questions][number]
        replies[key] = reply
        if reply.text:
            cache.put(key, reply.text)
    return [replies[key] for key in keys]


@dataclass(frozen=True)
class LocalChat:
    """A causal language model of transformers."""

    tokenizer: Any
    network: Any
    model: str
    max_tokens: int
    usage: Usage = field(default_factory=Usage)

    def replies(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Greedy answers, one after the other; the schema is only in the words of the question."""
        import torch

        for number, question in enumerate(questions):
            inputs = self.tokenizer.apply_chat_template(
                messages_of(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(self.network.device)
            length = inputs["input_ids"].shape[1]
            with torch.inference_mode():
                tokens = self.network.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)[0, length:]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            whole = len(tokens) < self.max_tokens
            problem = "the answer is empty" if whole else f"the answer is longer than max_tokens={self.max_tokens}"
            self.usage.requests += 1
            self.usage.prompt_tokens += length
            self.usage.completion_tokens += len(tokens)
            yield number, Reply(text) if text and whole else Reply("", problem)


def load_local_chat(base: str, device: str, max_tokens: int) -> LocalChat:
    """Load a chat model of transformers from a folder, a GGUF file or a hub id: bfloat16 on CUDA, float32 elsewhere.

    Raises InputError if it cannot be loaded, or was not trained for chats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_lab.base.load import pick_device

    quiet_loading()
    chosen = pick_device(device)
    location = Path(base).expanduser()
    source, options = base, {}
    if location.suffix.lower() == ".gguf":
        source, options = str(location.parent), {"gguf_file": location.name}
    hint = ": name a folder, a GGUF file or a hub id with refiner.base=, or a server with refiner.url="
    with loading(base, f"the language model {base} cannot be loaded", hint):
        options |= {"trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if not tokenizer.chat_template:
            raise InputError(f"refiner.base={base} has no chat template: name a model that follows instructions")
        tokenizer.apply_chat_template(messages_of(Question("a", ["b"])))  # some take no system prompt
        dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
        network = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    return LocalChat(tokenizer, network.to(chosen).eval(), base, max_tokens)


def messages_of(question: Question) -> list[dict[str, Any]]:
    """The question as messages in OpenAI's form, the image with the first turn."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": question.system}] if question.system else []
    for number, turn in enumerate(question.turns):
        content: Any = turn
        if question.image and not number:
            image = {"type": "image_url", "image_url": {"url": question.image}}
            content = [{"type": "text", "text": turn}, image]
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    return messages
