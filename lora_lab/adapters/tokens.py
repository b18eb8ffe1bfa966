"""New tokens in the place of the trigger: their embeddings, the file that has them, and texts read with them."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_lab.errors import InputError
from lora_lab.runs import write_atomically

# As ComfyUI, AUTOMATIC1111 and Forge name the embeddings of SDXL's two text encoders.
KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
COUNT = "lora_lab_tokens"  # metadata of a LoRA file: how many tokens stand for its trigger
TRIGGER = "modelspec.trigger_phrase"


def token_names(count: int) -> list[str]:
    """What the new tokens are called: <s0>, <s1> and so on, as in diffusers' pages."""
    return [f"<s{i}>" for i in range(count)]


def with_new_tokens(tokenizer: PreTrainedTokenizerBase, trigger: str, count: int) -> PreTrainedTokenizerBase:
    """A copy of `tokenizer` that reads `trigger`, spelt so, as `count` new tokens. Raises InputError if it has them."""
    copied, names = copy.deepcopy(tokenizer), token_names(count)
    if copied.add_tokens(names) < count:
        raise InputError(f"text.tokens={count}: the base's tokenizer has {names[0]} already, say text.tokens=0")
    rust = copied.backend_tokenizer
    rust.normalizer = normalizers.Sequence([normalizers.Replace(trigger, "".join(names)), rust.normalizer])
    return copied


def tokenizers_of(pipe: StableDiffusionXLPipeline, trigger: str, count: int) -> list[PreTrainedTokenizerBase]:
    """The pipeline's two tokenizers, or where there are new tokens copies that read the trigger as these."""
    both = [pipe.tokenizer, pipe.tokenizer_2]
    return [with_new_tokens(tokenizer, trigger, count) for tokenizer in both] if count else both


class NewTokens(nn.Module):
    """An encoder's table of token embeddings with new ones behind it, which alone learn.

    Beside the table and not in it, as the optimizer would then have to hold all of the table."""

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
    pipe: StableDiffusionXLPipeline, tokenizers: Sequence[PreTrainedTokenizerBase], vectors: dict[str, Tensor]
) -> dict[str, NewTokens]:
    """Let both text encoders know the new tokens of `tokenizers`; returns what they know them by, by the names of KEYS.

    Raises InputError for vectors that are not of this base's width."""
    put = {}
    for (part, key), tokenizer in zip(KEYS.items(), tokenizers, strict=True):
        encoder = getattr(pipe, part)
        table, first = encoder.get_input_embeddings(), tokenizer.convert_tokens_to_ids(token_names(1)[0])
        if vectors[key].shape[1] != table.embedding_dim:
            raise InputError(f"the new tokens' {key} is of another base: it has other widths")
        put[part] = NewTokens(table, first, vectors[key])
    for part, tokens in put.items():
        getattr(pipe, part).set_input_embeddings(tokens)
    # SDXL's configuration names an end of text that makes transformers take the largest id for it, which a new token
    # would be. Of texts without new tokens both are the same place.
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    return {KEYS[part]: tokens for part, tokens in put.items()}


def installed_tokens(pipe: StableDiffusionXLPipeline) -> dict[str, NewTokens]:
    """What `put_in` put there; {} if it did not."""
    tables = {key: getattr(pipe, part).get_input_embeddings() for part, key in KEYS.items()}
    return {key: table for key, table in tables.items() if isinstance(table, NewTokens)}


@contextmanager
def tokens_disabled(pipe: StableDiffusionXLPipeline) -> Iterator[None]:
    """Within the context the text encoders have their own tables alone, as the base has."""
    aside = installed_tokens(pipe)
    encoders = {key: getattr(pipe, part) for part, key in KEYS.items()}
    for key, tokens in aside.items():
        encoders[key].set_input_embeddings(tokens.table)
    try:
        yield
    finally:
        for key, tokens in aside.items():
            encoders[key].set_input_embeddings(tokens)


@contextmanager
def tokens_installed(pipe: StableDiffusionXLPipeline, trigger: str, vectors: dict[str, Tensor]) -> Iterator[None]:
    """Within the context `pipe`, whose encoders have their own tables, draws the trigger by `vectors`."""
    own = [pipe.tokenizer, pipe.tokenizer_2]
    pipe.tokenizer, pipe.tokenizer_2 = copies = tokenizers_of(pipe, trigger, len(vectors["clip_l"]))
    put = {}
    try:
        put = install_tokens(pipe, copies, vectors)
        for tokens in put.values():
            tokens.requires_grad_(False)
        yield
    finally:
        pipe.tokenizer, pipe.tokenizer_2 = own
        for part, key in KEYS.items():
            if key in put:
                getattr(pipe, part).set_input_embeddings(put[key].table)


def initial_vectors(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, count: int, text: str | None, source: torch.Generator
) -> Tensor:
    """Embeddings (count, width) that new tokens begin with: those of `text`'s tokens in turn, or normal random numbers
    with the mean and the spread that the table has in each dimension."""
    table = encoder.get_input_embeddings().weight.detach().float()
    if text is None:
        noise = torch.randn((count, table.shape[1]), generator=source).to(table.device)
        return table.mean(0) + table.std(0) * noise
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return table[[ids[i % len(ids)] for i in range(count)]].clone()


def embeddings_path(lora: Path) -> Path:
    """Where the embeddings of a LoRA file's trigger lie: NAME_emb.safetensors beside NAME.safetensors."""
    return lora.with_name(f"{lora.stem}_emb.safetensors")


def is_embeddings_file(file: Path) -> bool:
    """Whether a file is the embeddings of a LoRA file that is there too, and no LoRA itself."""
    return file.stem.endswith("_emb") and file.with_name(f"{file.stem.removesuffix('_emb')}.safetensors").is_file()


def save_tokens(file: Path, vectors: dict[str, Tensor], notes: dict[str, str]) -> Path:
    """Write the embeddings, in float32: they are few."""
    state = {key: value.detach().float().cpu().contiguous() for key, value in vectors.items()}
    return write_atomically(file, lambda path: save_file(state, str(path), metadata=notes))


def read_tokens(lora: Path) -> tuple[str, dict[str, Tensor]] | None:
    """The trigger of a LoRA file and the embeddings of the tokens that stand for it; None if it is plain words.

    Raises InputError where the embeddings should be beside the file, and are not."""
    try:
        with safe_open(str(lora), "pt") as opened:
            notes = opened.metadata() or {}
    except (OSError, SafetensorError):
        return None  # whoever loads the LoRA says so
    if COUNT not in notes or TRIGGER not in notes:
        return None
    file = embeddings_path(lora)
    try:
        vectors = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{lora}: its trigger {notes[TRIGGER]} is {notes[COUNT]} new tokens, whose embeddings should be in {file}: "
            f"put that file there ({str(error).splitlines()[0][:100]})"
        ) from error
    shapes = {key: vectors[key].ndim == 2 and str(len(vectors[key])) for key in vectors}
    if shapes != dict.fromkeys(KEYS.values(), notes[COUNT]):
        raise InputError(f"{file}: does not hold the {notes[COUNT]} embeddings clip_l and clip_g of {lora.name}")
    return notes[TRIGGER], vectors
