"""A language model behind a server with OpenAI's interface: Ollama, LM Studio, vLLM, llama.cpp, `transformers serve`,
or a service."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator

from lora_lab.captions.chat import Question, Reply, Usage, messages_of
from lora_lab.errors import InputError, RunError

if TYPE_CHECKING:
    import openai

KEY_VARIABLE = "OPENAI_API_KEY"
NO_KEY = "none"  # servers of one's own take any
GIVE_UP = 8  # questions in a row without an answer, each after all retries


def _server_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise InputError(f"no key belongs into a url, which is recorded: put it into {KEY_VARIABLE} or into a key_file")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"url={url}: a server is named as http://HOST:PORT/v1")
    return url


ServerUrl = Annotated[str, AfterValidator(_server_url)]


@dataclass(frozen=True)
class ChatServer:
    """A model of a server."""

    client: "openai.OpenAI"
    model: str
    max_tokens: int  # of a reply
    temperature: float | None  # None leaves it to the server
    parallel: int  # requests at the same time
    usage: Usage = field(default_factory=Usage)
    plain: Event = field(default_factory=Event)  # set once the server has refused a schema

    def replies(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """The number of each question and its reply, as they come; failed requests are repeated, ever more slowly.

        Raises InputError for a refused key or model, RunError for a server that does not answer."""
        if not questions:
            return
        # Its threads are daemons: after Ctrl-C the process ends without waiting for a server that does not answer.
        with ThreadPool(min(self.parallel, len(questions))) as pool:
            for number, reply in pool.imap_unordered(self._numbered_reply, enumerate(questions)):
                self.usage.failures = self.usage.failures + 1 if reply.problem else 0
                if self.usage.failures == GIVE_UP:
                    raise RunError(
                        f"{self.client.base_url} failed {GIVE_UP} times in a row ({reply.problem}): what was answered "
                        "is kept, run the same command again when the server works"
                    )
                yield number, reply

    def _numbered_reply(self, numbered: tuple[int, Question]) -> tuple[int, Reply]:
        return numbered[0], self._reply(numbered[1])

    def _reply(self, question: Question) -> Reply:
        import openai

        url, key = str(self.client.base_url), self.client.api_key
        try:
            return self._completion(question)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise InputError(f"{url} refuses the key ({_line(error, key)}): set {KEY_VARIABLE} or key_file") from None
        except openai.NotFoundError as error:
            raise InputError(f"{url} has no model {self.model} ({_line(error, key)}): correct base or url") from None
        except openai.APITimeoutError:
            return Reply("", f"no answer in {self.client.timeout:g} s")
        except openai.APIConnectionError as error:
            reason = _line(error.__cause__ or error, key)
            raise RunError(f"no server answers at {url} ({reason}): start it, or correct url") from None
        except openai.APIStatusError as error:
            return Reply("", f"the server fails with {error.status_code}: {_line(error, key)}")
        except (openai.OpenAIError, ValueError) as error:  # a body that is no JSON
            return Reply("", f"the answer is not of OpenAI's form: {_line(error, key)}")

    def _completion(self, question: Question) -> Reply:
        """One request, and a second one without the schema if the server refuses it. Raises openai.OpenAIError."""
        import openai

        schema: dict[str, Any] = {}
        if question.schema and not self.plain.is_set():
            form = {"name": "answer", "strict": True, "schema": dict(question.schema)}
            schema = {"response_format": {"type": "json_schema", "json_schema": form}}
        limit = "max_completion_tokens" if _is_openai(str(self.client.base_url)) else "max_tokens"
        options = {limit: self.max_tokens} | ({} if self.temperature is None else {"temperature": self.temperature})
        try:
            answer = self.client.chat.completions.create(
                model=self.model, messages=messages_of(question), **options, **schema
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            if not schema:
                raise
            self.plain.set()
            return self._completion(question)
        self.usage.requests += 1
        self.usage.prompt_tokens += getattr(getattr(answer, "usage", None), "prompt_tokens", None) or 0
        self.usage.completion_tokens += getattr(getattr(answer, "usage", None), "completion_tokens", None) or 0
        return _reply_of(answer, self.max_tokens)


def _is_openai(url: str) -> bool:
    """Whether it is OpenAI's own service, which needs a key and calls the limit by a name that others do not know."""
    return f".{urlsplit(url).hostname or ''}".endswith(".openai.com")


def _reply_of(answer: Any, max_tokens: int) -> Reply:
    """The text of a completion, without a model's thoughts; none of one that was cut off."""
    choices = getattr(answer, "choices", None)
    message = getattr(choices[0], "message", None) if choices else None
    if message is None:
        return Reply("", f"the answer is not of OpenAI's form: {' '.join(str(answer).split())[:80]!r}")
    if getattr(choices[0], "finish_reason", None) == "length":
        return Reply("", f"the answer is longer than max_tokens={max_tokens}")
    if getattr(message, "refusal", None):
        return Reply("", f"the model refuses: {message.refusal}")
    text = re.sub(r"<think>.*?(?:</think>|$)", "", message.content or "", flags=re.DOTALL).strip()
    return Reply(text) if text else Reply("", "the answer is empty")


def connect(
    url: str,
    model: str,
    key_file: str | None,
    *,
    timeout: float,
    retries: int,
    max_tokens: int,
    temperature: float | None,
    parallel: int,
) -> ChatServer:
    """The model of a server; nothing is asked yet. `timeout` in seconds; `retries` of a failed request.

    Raises InputError for a key file that cannot be read, for no key where one is needed, and without the package
    openai."""
    try:
        import openai
    except ImportError:
        raise InputError('a server needs the package openai: pip install "lora_lab[llm]"') from None
    key = _key(key_file)
    if key == NO_KEY and _is_openai(url):
        raise InputError(f"{url} needs a key: put it into the environment as {KEY_VARIABLE}, or name a key_file")
    client = openai.OpenAI(api_key=key, base_url=url, timeout=timeout, max_retries=retries)
    return ChatServer(client, model, max_tokens, temperature, parallel)


def _key(key_file: str | None) -> str:
    """The key of the file, else of the environment, else NO_KEY. Raises InputError."""
    if key_file is None:
        return os.environ.get(KEY_VARIABLE, "").strip() or NO_KEY
    try:
        key = Path(key_file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"key_file={key_file}: cannot be read ({error}), name a text file with the key") from None
    if not key or len(key.split()) > 1:
        raise InputError(f"key_file={key_file}: must have the key and nothing else")
    return key


def _line(error: BaseException, key: str) -> str:
    """The error's text on one line, shortened, without the key."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if key == NO_KEY else text.replace(key, "***"))[:200].rstrip(".")
