"""A vision model behind a server with OpenAI's interface as a captioner."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lora_lab.captions.chat import Chat, Question, ReplyCache, ask, reply_cache
from lora_lab.captions.chat_server import ServerUrl, connect
from lora_lab.console import say

if TYPE_CHECKING:
    from PIL import Image

QUALITY = 90  # of the JPEG


@dataclass(frozen=True)
class ChatCaptioner:
    """Asks a vision model about each image, several at the same time."""

    chat: Chat
    cache: ReplyCache
    system: str
    prompt: str
    hint_prompt: str  # what is asked besides, if the user wrote something; {hint} is replaced by that
    image_size: int  # pixels of the longer side that is sent

    def caption(self, images: "list[Image.Image]") -> list[str]:
        """One caption for each image, "" where the model gave none, which is told. Images are RGB, of any size.

        Raises InputError or RunError where the server cannot be asked at all; the replies until then are kept."""
        return self.caption_with_hints(images, [""] * len(images))

    def caption_with_hints(self, images: "Sequence[Image.Image]", hints: Sequence[str]) -> list[str]:
        """As `caption`; the hints are what the user wrote of each image, "" for nothing."""
        questions = [
            Question(self.system, (self._prompt(hint),), self._data_url(image))
            for image, hint in zip(images, hints, strict=True)
        ]
        replies = ask(self.chat, self.cache, questions)
        for reply in replies:
            if reply.problem:
                say(f"a picture has no caption: {reply.problem}")
        return [" ".join(reply.text.strip("\"'` \n").split()) for reply in replies]

    def estimate(self, images: "Iterable[Image.Image]") -> str:
        """What captioning will send, in one line."""
        sizes = [len(self._data_url(image)) for image in images]
        return f"{len(sizes)} pictures, {sum(sizes) / 1e6:.1f} MB, will be sent to the server for {self.chat.model}"

    def cost(self) -> str:
        """The requests and tokens in one line; "" where nothing was asked."""
        return self.chat.usage.line()

    def _prompt(self, hint: str) -> str:
        return f"{self.prompt}\n{self.hint_prompt.replace('{hint}', hint)}" if hint else self.prompt

    def _data_url(self, image: "Image.Image") -> str:
        small, file = image.copy(), BytesIO()
        small.thumbnail((self.image_size, self.image_size))
        small.save(file, "JPEG", quality=QUALITY)
        return f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"


def load_openai(
    base: str,
    url: ServerUrl,
    system: str,
    prompt: str,
    hint_prompt: str,
    class_noun: str,
    cache: str | None,
    device: Any,
    key_file: str | None = None,
    image_size: PositiveInt = 1024,
    max_tokens: PositiveInt = 300,
    temperature: NonNegativeFloat | None = 0,
    timeout: PositiveFloat = 120,
    retries: NonNegativeInt = 4,
    batch_size: PositiveInt = 4,
) -> ChatCaptioner:
    """The captioner of conf/captioner/openai.yaml; `batch_size` images are asked about at the same time. `device` is
    the server's affair.

    Raises InputError for a key file that cannot be read, and without the package openai."""
    chat = connect(
        url,
        base,
        key_file,
        timeout=timeout,
        retries=retries,
        max_tokens=max_tokens,
        temperature=temperature,
        parallel=batch_size,
    )
    texts = (text.replace("{class_noun}", class_noun) for text in (system, prompt, hint_prompt))
    return ChatCaptioner(chat, reply_cache(cache), *texts, image_size)
