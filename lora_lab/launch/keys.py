"""The right name for a wrong one."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches


def nearest(word: str, choices: Sequence[str], cutoff: float = 0.5) -> str:
    """', did you mean X?', or nothing where no choice is like `word`."""
    matches = get_close_matches(word, choices, n=1, cutoff=cutoff)
    return f", did you mean {matches[0]}?" if matches else ""


def keys_of(tree: Mapping[str, object], prefix: str = "") -> list[str]:
    """Every key of a nested dict, dotted: `lr`, `optimizer`, `optimizer.lr`, `stage.photo`, ..."""
    keys = []
    for key, value in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += keys_of(value, f"{prefix}{key}.")
    return keys


def unknown_key(key: str, known: Sequence[str], of_stages: Mapping[str, Sequence[str]]) -> str:
    """The sentence for a key that is not among `known`. It offers a key of nearly that name in the same group, else one
    of another stage (`of_stages` has the keys of each), else one anywhere."""
    parent, _, leaf = key.rpartition(".")
    siblings = {_leaf(k): k for k in known if k.rpartition(".")[0] == parent}
    others = {k: f"stage.{k} of stage={name}" for name, keys in of_stages.items() for k in keys if parent == "stage"}
    everywhere = {_leaf(k): k for k in reversed(known)}  # the first of several keys of one name wins
    for keys, cutoff in ((siblings, 0.6), (others, 0.7), (everywhere, 0.7)):
        matches = get_close_matches(leaf, keys, n=1, cutoff=cutoff)
        if matches:
            return f"{key}: no such key, did you mean {keys[matches[0]]}?"
    hint = f"{parent} has {', '.join(siblings)}" if parent and siblings else "--cfg job shows all keys"
    return f"{key}: no such key; {hint}"


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]
