"""What Hydra's grammar would change of a text: `name=2024_01` is a number to it, and `dataset.root=두부 (1)` nothing.

Such values get the quotes that keep them as they are typed."""

import re
from collections.abc import Iterator

# Hydra has no public way to the tree of its grammar, which has the places of values in the text.
from antlr4 import CommonTokenStream, InputStream, ParserRuleContext, TerminalNode, Token
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser

from lora_lab.settings.schema import text_keys

OF_TEXTS = ("choice", "tag")  # functions of a sweep over texts; Hydra takes the quotes of their arguments away once
NUMBERS = (OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL)
NUMBER_IN_QUOTES = re.compile(
    r"(['\"])([+-]?(\d[\d_]*\.?[\d_]*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)|true|false)\1", re.IGNORECASE
)


def keep_spelling(override: str) -> str:
    """`override` with quotes around what is a number or true to Hydra, if its key wants a text, or a list of texts."""
    key = override.partition("=")[0]
    if key not in text_keys() or not parses(override):
        return override
    parser = OverrideParser(CommonTokenStream(OverrideLexer(InputStream(override))))
    for token, in_function in reversed([*_numbers(parser.override(), in_function=False)]):
        text = token.text.strip("'\"")
        quoted = f"\"'{text}'\"" if in_function else f"'{text}'"
        override = f"{override[: token.start]}{quoted}{override[token.stop + 1 :]}"
    return override


def _numbers(node: ParserRuleContext, in_function: bool) -> Iterator[tuple[Token, bool]]:
    """The numbers and truth values in the tree of an override, in a function also in quotes; and whether it is in one.

    In a dict only `root` is a text."""
    if isinstance(node, OverrideParser.PrimitiveContext):
        tokens = [child.symbol for child in node.getChildren() if child.symbol.type != OverrideLexer.WS]
        if len(tokens) == 1 and (
            tokens[0].type in NUMBERS or (in_function and NUMBER_IN_QUOTES.fullmatch(tokens[0].text))
        ):
            yield tokens[0], in_function
    elif not isinstance(node, TerminalNode) and not _holds_no_text(node):
        for child in node.getChildren():
            yield from _numbers(child, in_function or isinstance(node, OverrideParser.FunctionContext))


def _holds_no_text(node: ParserRuleContext) -> bool:
    if isinstance(node, OverrideParser.FunctionContext):
        return node.ID().getText() not in OF_TEXTS
    return isinstance(node, OverrideParser.DictKeyValuePairContext) and node.dictKey().getText() != "root"


def with_quotes(override: str, multirun: bool) -> str:
    """Put the quotes that Hydra requires around a value such as `두부 (1).jpg`, if no other reading is possible.

    In a list, where it takes no `~`, that is written as `$HOME`."""
    key, equals, value = override.partition("=")
    if parses(override) or not equals:
        return override
    if key in text_keys() and parses(at_home := re.sub(r"([\[,:]\s*)~(?=[/\\,\]])", r"\1$HOME", override)):
        return at_home
    if any(mark in value[:1] + value[-1:] for mark in "[]'\""):
        return override
    values = value.split(",") if multirun else [value]
    quoted = f"{key}={','.join(QuotedString(v, quote=Quote.single).with_quotes() for v in values)}"
    return quoted if parses(quoted) else override


def parses(override: str) -> bool:
    """Whether Hydra's grammar allows `override`."""
    try:
        return bool(OverridesParser.create().parse_override(override).key_or_group)
    except HydraException:
        return False
