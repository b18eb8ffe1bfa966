"""The two tokenizers, learnt from the captions: CLIP's byte-level BPE and BLIP's WordPiece."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizerFast, CLIPTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

CLIP_ENTRIES = 1300  # at most; with 512 bytes and two marks
BLIP_ENTRIES = 600
BLIP_MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]

# How CLIP cuts a text before it joins bytes: words, single digits, runs of anything else.
CLIP_PIECES = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def train_clip(captions: list[str]) -> CLIPTokenizerFast:
    """A vocabulary in CLIP's layout: bytes, bytes that end a word, merges, start, end. The end mark also pads."""
    learner = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    letters = list(bytes_to_unicode().values())
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=CLIP_ENTRIES, initial_alphabet=letters, end_of_word_suffix="</w>", min_frequency=8
        ),
    )
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    entries = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizerFast(vocab=vocabulary, merges=merges, model_max_length=77)


def train_blip(captions: list[str]) -> BertTokenizerFast:
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    learner.train_from_iterator(
        captions, trainers.WordPieceTrainer(vocab_size=BLIP_ENTRIES, special_tokens=BLIP_MARKS, min_frequency=2)
    )
    tokenizer = BertTokenizerFast(vocab=learner.get_vocab(), do_lower_case=True, model_max_length=64)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def load(folder: Path) -> tuple[CLIPTokenizerFast, BertTokenizerFast]:
    """What `save` wrote."""
    return CLIPTokenizerFast.from_pretrained(folder / "clip"), BertTokenizerFast.from_pretrained(folder / "blip")


def save(folder: Path, clip: CLIPTokenizerFast, blip: BertTokenizerFast) -> None:
    clip.save_pretrained(folder / "clip")
    blip.save_pretrained(folder / "blip")
