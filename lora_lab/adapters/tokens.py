"""New tokens in place of the trigger: their embeddings, the file that holds them, and tokenizers that know them."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_lab.base.protocol import BaseModel
from lora_lab.errors import InputError


def token_names(count: int) -> list[str]:
    """The names of the new tokens: <s0>, <s1> and so on, as in diffusers' documentation."""
    return [f"<s{i}>" for i in range(count)]


def with_new_tokens(tokenizer: PreTrainedTokenizerBase, trigger: str, count: int) -> PreTrainedTokenizerBase:
    """A copy of `tokenizer` that reads `trigger`, in this spelling, as `count` new tokens.

    Raises InputError if the tokenizer has tokens of these names."""
    copied, names = copy.deepcopy(tokenizer), token_names(count)
    if copied.add_tokens(names) < count:
        raise InputError(f"text.tokens={count}: the base's tokenizer has {names[0]} already, use text.tokens=0")
    backend = copied.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Replace(trigger, "".join(names)), backend.normalizer])
    return copied


def tokenizers_of(base: BaseModel, trigger: str, count: int) -> list[PreTrainedTokenizerBase]:
    """The base's tokenizers, or for `count` new tokens copies that read the trigger as these. Raises InputError."""
    return [with_new_tokens(tokenizer, trigger, count) if count else tokenizer for tokenizer in base.tokenizers]


class NewTokens(nn.Module):
    """A text encoder's embedding table, frozen, followed by trainable embeddings of new tokens.

    They are a parameter beside the table: the optimizer would otherwise need state for the whole table."""

    def __init__(self, table: nn.Embedding, first: int, vectors: Tensor) -> None:
        """`first` is the id of the first new token, `vectors` (count, width) their embeddings."""
        super().__init__()
        self.table, self.first = table, first
        self.vectors = nn.Parameter(vectors.to(table.weight))

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (..., width) of token ids (...)."""
        old = self.table(ids.clamp(max=self.first - 1))
        new = F.embedding((ids - self.first).clamp(min=0), self.vectors)
        return torch.where((ids >= self.first).unsqueeze(-1), new, old)


def install_tokens(
    base: BaseModel, tokenizers: Sequence[PreTrainedTokenizerBase], vectors: dict[str, Tensor]
) -> dict[str, NewTokens]:
    """Let the text encoders know the new tokens of `tokenizers`; `vectors` (count, width) and the result are by
    `base.embedding_keys`.

    Raises InputError for vectors that lack a text encoder's, or have another width than the base."""
    if vectors.keys() != set(base.embedding_keys.values()):
        keys = ", ".join(base.embedding_keys.values())
        raise InputError(f"the new tokens' embeddings are {', '.join(vectors)}, but those of this base are {keys}")
    installed: dict[str, NewTokens] = {}
    for (name, encoder), tokenizer in zip(base.text_encoders.items(), tokenizers, strict=True):
        key = base.embedding_keys[name]
        table, first = encoder.get_input_embeddings(), tokenizer.convert_tokens_to_ids(token_names(1)[0])
        if vectors[key].shape[1] != table.embedding_dim:
            raise InputError(f"the new tokens' {key} is of another base: it has another width")
        installed[key] = NewTokens(table, first, vectors[key])
    for (name, encoder), tokenizer in zip(base.text_encoders.items(), tokenizers, strict=True):
        encoder.set_input_embeddings(installed[base.embedding_keys[name]])
        # SDXL's configuration names an end of text for which transformers takes the largest id, which would be that of
        # a new token. Without new tokens both find the same place.
        if hasattr(getattr(encoder, "text_model", None), "eos_token_id"):
            encoder.text_model.eos_token_id = tokenizer.eos_token_id
    return installed


def installed_tokens(base: BaseModel) -> dict[str, NewTokens]:
    """What install_tokens returned, or {} if it was not called."""
    tables = {base.embedding_keys[name]: e.get_input_embeddings() for name, e in base.text_encoders.items()}
    return {key: table for key, table in tables.items() if isinstance(table, NewTokens)}


@contextmanager
def tokens_disabled(base: BaseModel) -> Iterator[None]:
    """Within the context the text encoders have only the base's embedding tables."""
    installed = installed_tokens(base)
    encoders = {base.embedding_keys[name]: encoder for name, encoder in base.text_encoders.items()}
    for key, tokens in installed.items():
        encoders[key].set_input_embeddings(tokens.table)
    try:
        yield
    finally:
        for key, tokens in installed.items():
            encoders[key].set_input_embeddings(tokens)


@contextmanager
def tokens_installed(base: BaseModel, trigger: str, vectors: dict[str, Tensor]) -> Iterator[None]:
    """Within the context `base`, whose text encoders have only their own tables, reads the trigger as new tokens with
    the embeddings `vectors` (count, width), by `base.embedding_keys`. Raises InputError for those of another base."""
    tokenizers = base.tokenizers
    base.tokenizers = copies = tokenizers_of(base, trigger, len(next(iter(vectors.values()))))
    installed = {}
    try:
        installed = install_tokens(base, copies, vectors)
        for tokens in installed.values():
            tokens.requires_grad_(False)
        yield
    finally:
        base.tokenizers = tokenizers
        for name, encoder in base.text_encoders.items():
            if base.embedding_keys[name] in installed:
                encoder.set_input_embeddings(installed[base.embedding_keys[name]].table)


def initial_vectors(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, count: int, text: str | None, source: torch.Generator
) -> Tensor:
    """Initial embeddings (count, width) of new tokens, float32: those of `text`'s tokens, repeated as needed, or normal
    random numbers with the mean and standard deviation that the table has in each dimension."""
    table = encoder.get_input_embeddings().weight.detach().float()
    if text is None:
        noise = torch.randn((count, table.shape[1]), generator=source).to(table.device)
        return table.mean(0) + table.std(0) * noise
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return table[[ids[i % len(ids)] for i in range(count)]].clone()
